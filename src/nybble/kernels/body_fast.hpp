// Integer products of tiles, what body_product.hpp calls fast. Included once per instruction set, after body_layout.

// Added to a sum of 16 bits it is never negative; flipped, the sum is back.
inline constexpr std::int32_t kLift = 0x8000;

// What the tokens bring along for one weight: -base * sum of codes (and kLift for every second part where panel_tile sums two
// at once), and the sum as a float, for each part. [M, parts], or [panels][parts][8] as the codes lie.
struct Corrections {
    std::int32_t* integer;
    float* sum;  // only where there is an offset
    std::size_t parts;
};

// One or two panels unpack codes on the way to their products, once each; more of them share codes that were unpacked to bytes.
inline bool on_the_way(std::size_t count) { return Lanes::kTokens >= 4 && count <= 2 * kPanel; }

inline bool scaled_by_row(const Tiled& w) { return w.blocks <= 1 && (w.offset == nullptr || w.offset_is_zero); }

// How the scales of parts meet their sums; body_product.hpp has the sums.
enum class Scales { row, whole, parts };

// Scale and shift of one block of one tile, as lanes.
struct Grid {
    const Tiled& w;
    const std::size_t tile;
    const bool by_row;
    const std::uint8_t* steps;
    Grid(const Tiled& weight, std::size_t which)
        : w(weight),
          tile(which),
          by_row(scaled_by_row(weight)),
          steps(weight.steps == nullptr ? nullptr : weight.steps + which * kRows) {}
    inline F scale(std::size_t block) const {
        return by_row ? Lanes::all(1.0f) : scale_of(w, tile, block);
    }
    // The scale in steps, in the low half of a lane.
    inline I whole(std::size_t block) const {
        const F inverse = Lanes::as_float(Lanes::left<23>(Lanes::minus(Lanes::whole(254), Lanes::load_bytes(steps))));
        // Added to 1.5 * 2**23 a number is rounded to a whole one, which then lies in the low bits.
        return Lanes::both(Lanes::as_whole(Lanes::fma(scale(block), inverse, Lanes::all(12582912.0f))), Lanes::whole(0xffff));
    }
    inline F shift(std::size_t block, F scale) const {  // only where there is an offset
        const F offset = offset_of(w, tile, block);
        return w.offset_is_zero ? Lanes::sub(Lanes::all(0.0f), Lanes::mul(scale, offset)) : offset;
    }
    // What the totals are multiplied by.
    inline F after() const {
        const F step = Lanes::all(w.table ? w.byte_step : 1.0f);
        if (steps != nullptr) return Lanes::as_float(Lanes::left<23>(Lanes::load_bytes(steps)));
        return by_row ? Lanes::mul(step, scale_of(w, tile, 0)) : step;
    }
};

// The block of one part after the other; parts behind the last column belong to the last block.
struct Blocks {
    const std::size_t count, share;  // share: parts of a block
    std::size_t at = 0, left;
    explicit Blocks(const Tiled& w) : count(w.blocks), share(w.block < w.part ? 1 : w.block / w.part), left(share) {}
    inline bool begins() const { return left == share; }
    inline void next() {
        if (--left == 0) {
            left = share;
            if (at + 1 < count) ++at;
        }
    }
};

// A few tokens, or one panel (M = 8): codes are unpacked on the way.
template <int B, bool Table, int M, int Parts>
inline void fast_tile(const Tiled& w, std::size_t tile, const Activations& x, std::size_t m, const Corrections& c, float* to) {
    F total[M], block[M];  // where scales are whole numbers, block holds integers
    constexpr bool panel = M == int(kPanel);
    const std::int8_t* codes[M];
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) {
        total[t] = block[t] = Lanes::all(0.0f);
        codes[t] = x.codes + (m + std::size_t(t)) * x.stride;
    }
    const std::int8_t* side_by_side = x.codes + m * x.stride;
    const auto place = [&](std::size_t part, int t) __attribute__((always_inline)) {
        return panel ? m * c.parts + part * kPanel + std::size_t(t) : (m + std::size_t(t)) * c.parts + part;
    };
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    const I table = Lanes::byte_table(w.bytes);
    const Grid grid(w, tile);
    Blocks blocks(w);
    const bool plain = Parts == 1 && grid.by_row && w.offset == nullptr;
    const bool whole = Parts > 1 && B <= 4 && !Table && w.steps != nullptr;
    std::size_t part = 0;
    I sums[M];
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(0);
    const auto begin = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(c.integer[place(part, t)]);
    };
    const auto join = [&]() __attribute__((always_inline)) {
        if (plain) {
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) block[t] = Lanes::to_float(sums[t]);
        } else if (whole) {
            const I scale = grid.whole(blocks.at);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) block[t] = Lanes::as_float(Lanes::dot_shorts(Lanes::as_whole(block[t]), sums[t], scale));
        } else {
            const F scale = grid.scale(blocks.at);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) block[t] = Lanes::fma(Lanes::to_float(sums[t]), scale, block[t]);
            if (w.offset != nullptr) {
                const F shift = grid.shift(blocks.at, scale);
#pragma GCC unroll 8
                for (int t = 0; t < M; ++t) block[t] = Lanes::fma(Lanes::all(c.sum[place(part, t)]), shift, block[t]);
            }
        }
        blocks.next();
        ++part;
    };
    for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B) {
        for (std::size_t ahead = 0; ahead < B; ++ahead) __builtin_prefetch(unit + kAhead + ahead * kLine);
        const auto take = [&](auto line, std::size_t s) __attribute__((always_inline)) {
            if constexpr (Table) line = Lanes::look_up(table, line);
            line = Lanes::moved(line);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t)
                sums[t] = Lanes::dot(sums[t], line,
                                     Lanes::four(panel ? side_by_side + ((u * kSteps + s) * kPanel + std::size_t(t)) * 4
                                                       : codes[t] + u * kUnit + 4 * s));
        };
        const bool last = u % 2 == 1 || u + 1 == w.units;  // of a block of activations
        if (Parts > 1 || u % 2 == 0) begin();
        take(step<B, 0>(unit), 0);
        take(step<B, 1>(unit), 1);
        take(step<B, 2>(unit), 2);
        take(step<B, 3>(unit), 3);
        if constexpr (Parts == 4) {
            join();
            begin();
        }
        take(step<B, 4>(unit), 4);
        take(step<B, 5>(unit), 5);
        take(step<B, 6>(unit), 6);
        take(step<B, 7>(unit), 7);
        if (Parts > 1 || last) join();
        if (last)
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) {
                const std::size_t at_scale = panel ? m * (x.stride / kBlock) + u / 2 * kPanel + std::size_t(t)
                                                   : (m + std::size_t(t)) * (x.stride / kBlock) + u / 2;
                const F sum = whole ? Lanes::to_float(Lanes::as_whole(block[t])) : block[t];
                total[t] = Lanes::fma(sum, Lanes::all(x.scale[at_scale]), total[t]);
                block[t] = Lanes::all(0.0f);
            }
    }
    const F after = grid.after();
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) Lanes::store(to + t * kRows, Lanes::mul(total[t], after));
}

// Products of T tiles with some rows of a panel, R of them: T * R sums stay in registers. Two tiles and eight rows are sixteen
// sums: with eight of them every product would wait for the one before the last (a processor that begins two in a cycle ends
// each after four or five).
template <int T, int R>
struct Patch {
    static constexpr int kSums = T * R;
    const std::uint8_t* bytes;  // of the first tile, [units][8][64]
    std::size_t apart;          // bytes from tile to tile
    const std::int8_t* codes;   // of the first row

    // sums[T * R] += Steps steps from `first` on.
    template <int Steps>
    inline __attribute__((always_inline)) void multiply(std::size_t first, I* sums) const {
        const std::uint8_t* line = bytes + first * kLine;
        const std::int8_t* four = codes + first * 4 * kPanel;
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Steps; ++i) {
            I lines[T];
#pragma GCC unroll 2
            for (int j = 0; j < T; ++j) lines[j] = Lanes::line(line + i * kLine + std::size_t(j) * apart);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const I x = Lanes::four(four + (i * kPanel + std::size_t(r)) * 4);
#pragma GCC unroll 2
                for (int j = 0; j < T; ++j) sums[j * R + r] = Lanes::dot(sums[j * R + r], lines[j], x);
            }
        }
    }
};

// T tiles from `tile` on, unpacked once for all panels, against rows [row, row + R) of the panel that begins at m.
// to [T][8][16].
template <Scales How, int Parts, int T, int R>
inline void panel_tile(const Tiled& w, std::size_t tile, const std::uint8_t* bytes, const Activations& x, std::size_t m,
                       std::size_t row, const Corrections& c, float* to) {
    constexpr int kSums = T * R;
    constexpr std::size_t parts_steps = 2 * kSteps / Parts;
    const std::size_t apart = unpacked_bytes(w);
    const Patch<T, R> patch = {bytes, apart, x.codes + m * x.stride + row * 4};
    const float* scales = x.scale + m * (x.stride / kBlock) + row;
    const std::int32_t* start = c.integer + m * c.parts + row;
    const float* codes_sum = c.sum + m * c.parts + row;
    const std::uint8_t* pairs = bytes + w.units * kSteps * kLine;  // of whole scales
    const Grid grid(w, tile), second(w, tile + T - 1);
    Blocks blocks(w);
    F scale[2], shift[2], total[kSums];
    for (int j = 0; j < T; ++j) scale[j] = shift[j] = Lanes::all(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) total[i] = Lanes::all(0.0f);
    // The sums of one part. One of 64 columns may be half there, at the end.
    const auto sum_part = [&](std::size_t part, I* sums) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = Lanes::whole(start[part * kPanel + std::size_t(i % R)]);
        if constexpr (Parts == 1) {
            patch.template multiply<8>(part * 16, sums);
            if (2 * part + 1 < w.units) patch.template multiply<8>(part * 16 + 8, sums);
        } else {
            patch.template multiply<parts_steps>(part * parts_steps, sums);
        }
    };
    for (std::size_t part = 0; part < c.parts; part += Parts, scales += kPanel) {
        const std::size_t end = c.parts - part < Parts ? c.parts : part + Parts;
        F block[kSums];
        if constexpr (How == Scales::row) {
            I sums[kSums];
            sum_part(part, sums);
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) block[i] = Lanes::to_float(sums[i]);
        } else if constexpr (How == Scales::whole) {
            I sums[kSums];
            // Two parts in one sum: the first lies in the upper half, and the lower one is 2**15 too large (prepare), so that
            // it borrows nothing.
            const auto join = [&](std::size_t p) __attribute__((always_inline)) {
                I both[kSums];
                sum_part(p, both);
#pragma GCC unroll 16
                for (int i = 0; i < kSums; ++i) both[i] = Lanes::left<16>(both[i]);
                if (p + 1 < c.parts) {
#pragma GCC unroll 16
                    for (int i = 0; i < kSums; ++i)
                        both[i] = Lanes::plus(both[i], Lanes::whole(start[(p + 1) * kPanel + std::size_t(i % R)]));
                    patch.template multiply<parts_steps>((p + 1) * parts_steps, both);
                    const I sign = Lanes::whole(kLift);
#pragma GCC unroll 16
                    for (int i = 0; i < kSums; ++i) both[i] = Lanes::flip(both[i], sign);
                }
                const I scale[2] = {Lanes::line(pairs), Lanes::line(pairs + (T - 1) * apart)};
                pairs += kLine;
#pragma GCC unroll 16
                for (int i = 0; i < kSums; ++i)
                    sums[i] = Lanes::dot_shorts(p == part ? Lanes::whole(0) : sums[i], both[i], scale[i / R]);
            };
            join(part);
            if constexpr (Parts == 4)
                if (part + 2 < c.parts) join(part + 2);
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) block[i] = Lanes::to_float(sums[i]);
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < kSums; ++i) block[i] = Lanes::all(0.0f);
            for (std::size_t p = part; p < end; ++p) {
                I sums[kSums];
                sum_part(p, sums);
                if (blocks.begins()) {
                    scale[0] = grid.scale(blocks.at);
                    scale[T - 1] = second.scale(blocks.at);
                    if (w.offset != nullptr) {
                        shift[0] = grid.shift(blocks.at, scale[0]);
                        shift[T - 1] = second.shift(blocks.at, scale[T - 1]);
                    }
                }
                blocks.next();
#pragma GCC unroll 16
                for (int i = 0; i < kSums; ++i) block[i] = Lanes::fma(Lanes::to_float(sums[i]), scale[i / R], block[i]);
                if (w.offset != nullptr)
#pragma GCC unroll 16
                    for (int i = 0; i < kSums; ++i)
                        block[i] = Lanes::fma(Lanes::all(codes_sum[p * kPanel + std::size_t(i % R)]), shift[i / R], block[i]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) total[i] = Lanes::fma(block[i], Lanes::all(scales[i % R]), total[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i)
        Lanes::store(to + (std::size_t(i / R) * kPanel + row + std::size_t(i % R)) * kRows,
                     Lanes::mul(total[i], i / R == 0 ? grid.after() : second.after()));
}

// One tile to bytes: moved codes, or a table's rounded levels; then its whole scales in pairs (unpacked_bytes).
static void widen(const Tiled& w, std::size_t tile, std::uint8_t* to) {
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    const I table = Lanes::byte_table(w.bytes);
    with_plane_bits(w.bits, [&]<int B>() {
        for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B, to += kSteps * kLine) {
            for (std::size_t ahead = 0; ahead < B; ++ahead) __builtin_prefetch(unit + kAhead + ahead * kLine);
            unit_codes<B>(unit, to);
            if (!w.table && Lanes::kMoved == 0) continue;
            for (std::size_t s = 0; s < kSteps; ++s) {
                const I line = Lanes::line(to + s * kLine);
                Lanes::store_line(to + s * kLine, Lanes::moved(w.table ? Lanes::look_up(table, line) : line));
            }
        }
    });
    if (w.steps == nullptr) return;
    const Grid grid(w, tile);
    Blocks blocks(w);
    const std::size_t parts = parts_of(w);
    for (std::size_t part = 0; part < parts; part += 2, to += kLine) {
        I scales = Lanes::left<16>(grid.whole(blocks.at));
        blocks.next();
        if (part + 1 < parts) scales = Lanes::either(scales, grid.whole(blocks.at));
        blocks.next();
        Lanes::store_line(to, scales);
    }
}

// Where the corrections of x lie in scratch. Rows are counted in whole panels where the codes lie so.
inline Corrections corrections(const Tiled& w, const Activations& x, void* scratch) {
    const std::size_t parts = parts_of(w), each = in_panels(x.count) ? kPanel : 1;
    auto* integer = static_cast<std::int32_t*>(scratch);
    return {integer, reinterpret_cast<float*>(integer + (x.count + each - 1) / each * each * parts), parts};
}

static void prepare(const Tiled& w, const Activations& x, void* scratch) {
    const Corrections c = corrections(w, x, scratch);
    const std::int32_t base = (w.table ? 128 : w.base) - Lanes::kMoved;
    const std::size_t each = in_panels(x.count) ? kPanel : 1, rows = (x.count + each - 1) / each * each;
    const std::size_t sixteens = w.part / 16;
    const std::int32_t lift = w.steps != nullptr && in_panels(x.count) && !on_the_way(x.count) ? kLift : 0;
    for (std::size_t m = 0; m < rows; m += each)
        for (std::size_t p = 0; p < c.parts; ++p) {
            const std::int32_t* sums = x.sums + m * (x.stride / 16) + sixteens * p * each;
            const std::size_t at = m * c.parts + p * each;
            for (std::size_t t = 0; t < each; ++t) {
                std::int32_t sum = 0;
                for (std::size_t i = 0; i < sixteens; ++i) sum += sums[i * each + t];
                c.integer[at + t] = -base * sum + (p % 2 == 0 ? 0 : lift);
                if (w.offset != nullptr) c.sum[at + t] = static_cast<float>(sum);
            }
        }
}
