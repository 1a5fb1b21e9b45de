// Integer products of tiles, what body_product.hpp calls fast. Included once per instruction set, after body_layout.

// What the tokens bring along for one weight: -base * sum of codes, and the sum as a float, for each part. [M, parts], or
// [panels][parts][8] as the codes lie.
struct Corrections {
    std::int32_t* integer;
    float* sum;  // only where there is an offset
    std::size_t parts;
};

// One or two panels unpack codes on the way to their products, once each; more of them share codes that were unpacked to bytes.
inline bool on_the_way(std::size_t count) { return Lanes::kTokens >= 4 && count <= 2 * kPanel; }

inline bool scaled_by_row(const Tiled& w) { return w.blocks <= 1 && (w.offset == nullptr || w.offset_is_zero); }

// Scale and shift of one part, as lanes.
struct Grid {
    const Tiled& w;
    const std::size_t first;
    const bool by_row;
    Grid(const Tiled& weight, std::size_t tile) : w(weight), first(tile * weight.blocks * kRows), by_row(scaled_by_row(weight)) {}
    inline F scale(std::size_t block) const {
        return by_row ? Lanes::all(1.0f) : load_parameter(w.scale, w.scale_half, first + block * kRows);
    }
    inline F shift(std::size_t block, F scale) const {  // only where there is an offset
        const F offset = load_parameter(w.offset, w.offset_half, first + block * kRows);
        return w.offset_is_zero ? Lanes::sub(Lanes::all(0.0f), Lanes::mul(scale, offset)) : offset;
    }
    // What the totals are multiplied by.
    inline F after() const {
        const F step = Lanes::all(w.table ? w.byte_step : 1.0f);
        return by_row ? Lanes::mul(step, load_parameter(w.scale, w.scale_half, first)) : step;
    }
};

// The block that a part lies in; parts behind the last column belong to the last block.
inline std::size_t block_of(const Tiled& w, std::size_t part) {
    const std::size_t block = w.halves ? part : part * kUnit / w.block;
    return block < w.blocks ? block : w.blocks - 1;
}

// A few tokens, or one panel (M = 8): codes are unpacked on the way.
template <int B, bool Table, int M, bool Halves>
inline void fast_tile(const Tiled& w, std::size_t tile, const Activations& x, std::size_t m, const Corrections& c, float* to) {
    F total[M], block[M];
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
    const std::size_t per_block = Halves || w.block < kUnit ? 1 : w.block / kUnit;
    std::size_t at = 0, left = per_block;
    for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B) {
        for (std::size_t ahead = 0; ahead < B; ++ahead) __builtin_prefetch(unit + kAhead + ahead * kLine);
        const auto take = [&](auto line, std::size_t s, I* sums) __attribute__((always_inline)) {
            if constexpr (Table) line = Lanes::look_up(table, line);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t)
                sums[t] = Lanes::dot(sums[t], line,
                                     Lanes::four(panel ? side_by_side + ((u * kSteps + s) * kPanel + std::size_t(t)) * 4
                                                       : codes[t] + u * kUnit + 4 * s));
        };
        const auto join = [&](I* sums, std::size_t part, std::size_t b) __attribute__((always_inline)) {
            const F scale = grid.scale(b);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) block[t] = Lanes::fma(Lanes::to_float(sums[t]), scale, block[t]);
            if (w.offset == nullptr) return;
            const F shift = grid.shift(b, scale);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) block[t] = Lanes::fma(Lanes::all(c.sum[place(part, t)]), shift, block[t]);
        };
        I sums[M];
        const std::size_t part = Halves ? 2 * u : u;
#pragma GCC unroll 8
        for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(c.integer[place(part, t)]);
        take(step<B, 0>(unit), 0, sums);
        take(step<B, 1>(unit), 1, sums);
        take(step<B, 2>(unit), 2, sums);
        take(step<B, 3>(unit), 3, sums);
        if constexpr (Halves) {
            join(sums, part, block_of(w, part));
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(c.integer[place(part + 1, t)]);
        }
        take(step<B, 4>(unit), 4, sums);
        take(step<B, 5>(unit), 5, sums);
        take(step<B, 6>(unit), 6, sums);
        take(step<B, 7>(unit), 7, sums);
        if constexpr (Halves) {
            join(sums, part + 1, block_of(w, part + 1));
        } else {
            join(sums, part, at);
            if (--left == 0) {
                left = per_block;
                if (at + 1 < w.blocks) ++at;
            }
        }
        if (u % 2 == 1 || u + 1 == w.units)
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) {
                const std::size_t at_scale = panel ? m * (x.stride / kBlock) + u / 2 * kPanel + std::size_t(t)
                                                   : (m + std::size_t(t)) * (x.stride / kBlock) + u / 2;
                total[t] = Lanes::fma(block[t], Lanes::all(x.scale[at_scale]), total[t]);
                block[t] = Lanes::all(0.0f);
            }
    }
    const F after = grid.after();
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) Lanes::store(to + t * kRows, Lanes::mul(total[t], after));
}

// Products of T tiles with some rows of a panel, R of them: T * R sums stay in registers. Two tiles and four rows load less
// than one tile and eight: a load of four codes serves two products.
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
#pragma GCC unroll 8
        for (std::size_t i = 0; i < Steps; ++i) {
            I lines[T];
#pragma GCC unroll 2
            for (int j = 0; j < T; ++j) lines[j] = Lanes::line(line + i * kLine + std::size_t(j) * apart);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const I x = Lanes::four(four + (i * kPanel + std::size_t(r)) * 4);
#pragma GCC unroll 2
                for (int j = 0; j < T; ++j) sums[j * R + r] = Lanes::dot(sums[j * R + r], lines[j], x);
            }
        }
    }
};

// T tiles from `tile` on, unpacked to bytes once for all panels, against rows [row, row + R) of the panel that begins at m.
// to [T][8][16].
template <bool Row, bool Halves, int T, int R>
inline void panel_tile(const Tiled& w, std::size_t tile, const std::uint8_t* bytes, const Activations& x, std::size_t m,
                       std::size_t row, const Corrections& c, float* to) {
    constexpr int kSums = T * R;
    constexpr int steps = Halves ? 4 : 8;
    const std::size_t parts = c.parts, per_block = Halves ? 4 : 2;
    const Patch<T, R> patch = {bytes, w.units * kSteps * kLine, x.codes + m * x.stride + row * 4};
    const float* scales = x.scale + m * (x.stride / kBlock) + row;
    const std::int32_t* start = c.integer + m * parts + row;
    const float* codes_sum = c.sum + m * parts + row;
    const Grid grid(w, tile), second(w, tile + T - 1);
    const std::size_t share = Halves || w.block < kUnit ? 1 : w.block / kUnit;  // parts that share a scale
    std::size_t at = 0, left = share;
    F scale[T], shift[T], total[kSums];
    for (int j = 0; j < T; ++j) scale[j] = shift[j] = Lanes::all(0.0f);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) total[i] = Lanes::all(0.0f);
    for (std::size_t part = 0; part < parts; part += per_block, scales += kPanel) {
        const std::size_t end = parts - part < per_block ? parts : part + per_block;
        I sums[kSums];
        if (Row && w.offset == nullptr) {  // whole blocks as integers: the same numbers, fewer steps
            // The correction of the second unit was added to that of the first.
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) sums[i] = Lanes::whole(start[part * kPanel + std::size_t(i % R)]);
            for (std::size_t p = part; p < end; ++p) patch.template multiply<steps>(p * steps, sums);
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) total[i] = Lanes::fma(Lanes::to_float(sums[i]), Lanes::all(scales[i % R]), total[i]);
            continue;
        }
        F block[kSums];
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) block[i] = Lanes::all(0.0f);
        for (std::size_t p = part; p < end; ++p) {
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) sums[i] = Lanes::whole(start[p * kPanel + std::size_t(i % R)]);
            patch.template multiply<steps>(p * steps, sums);
            if (left == share) {
                scale[0] = grid.scale(at);
                scale[T - 1] = second.scale(at);
                if (w.offset != nullptr) {
                    shift[0] = grid.shift(at, scale[0]);
                    shift[T - 1] = second.shift(at, scale[T - 1]);
                }
            }
            if (--left == 0 && at + 1 < w.blocks) {
                ++at;
                left = share;
            }
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) block[i] = Lanes::fma(Lanes::to_float(sums[i]), scale[i / R], block[i]);
            if (w.offset != nullptr)
#pragma GCC unroll 8
                for (int i = 0; i < kSums; ++i)
                    block[i] = Lanes::fma(Lanes::all(codes_sum[p * kPanel + std::size_t(i % R)]), shift[i / R], block[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) total[i] = Lanes::fma(block[i], Lanes::all(scales[i % R]), total[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i)
        Lanes::store(to + (std::size_t(i / R) * kPanel + row + std::size_t(i % R)) * kRows,
                     Lanes::mul(total[i], i / R == 0 ? grid.after() : second.after()));
}

// The bytes of one tile: codes, or a table's rounded levels.
static void widen(const Tiled& w, std::size_t tile, std::uint8_t* to) {
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    const I table = Lanes::byte_table(w.bytes);
    with_plane_bits(w.bits, [&]<int B>() {
        for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B, to += kSteps * kLine) {
            for (std::size_t ahead = 0; ahead < B; ++ahead) __builtin_prefetch(unit + kAhead + ahead * kLine);
            unit_codes<B>(unit, to);
            if (w.table)
                for (std::size_t s = 0; s < kSteps; ++s)
                    Lanes::store_line(to + s * kLine, Lanes::look_up(table, Lanes::line(to + s * kLine)));
        }
    });
}

// Where the corrections of x lie in scratch. Rows are counted in whole panels where the codes lie so.
inline Corrections corrections(const Tiled& w, const Activations& x, void* scratch) {
    const std::size_t parts = w.halves ? 2 * w.units : w.units, each = in_panels(x.count) ? kPanel : 1;
    auto* integer = static_cast<std::int32_t*>(scratch);
    return {integer, reinterpret_cast<float*>(integer + (x.count + each - 1) / each * each * parts), parts};
}

static void prepare(const Tiled& w, const Activations& x, void* scratch) {
    const Corrections c = corrections(w, x, scratch);
    const std::int32_t base = w.table ? 128 : w.base;
    const std::size_t parts = c.parts, each = in_panels(x.count) ? kPanel : 1, rows = (x.count + each - 1) / each * each;
    for (std::size_t m = 0; m < rows; m += each)
        for (std::size_t p = 0; p < parts; ++p) {
            const std::int32_t* sums = x.sums + m * (x.stride / 16) + (w.halves ? p : 2 * p) * each;
            const std::size_t at = m * parts + p * each;
            for (std::size_t t = 0; t < each; ++t) {
                const std::int32_t sum = w.halves ? sums[t] : sums[t] + sums[each + t];
                c.integer[at + t] = -base * sum;
                if (w.offset != nullptr) c.sum[at + t] = static_cast<float>(sum);
            }
        }
    // Many panels sum whole blocks of two units as integers where one scale serves the row.
    if (in_panels(x.count) && !on_the_way(x.count) && scaled_by_row(w) && w.offset == nullptr)
        for (std::size_t m = 0; m < rows; m += each)
            for (std::size_t p = 0; p + 1 < parts; p += 2)
                for (std::size_t t = 0; t < each; ++t) c.integer[m * parts + p * each + t] += c.integer[m * parts + (p + 1) * each + t];
}
