// Products y = x W^T with a weight in the kernel layout. Included once per instruction set, after Lanes and body_layout.
//
// Two modes. Exact: activations are floats, every weight is decoded to a float (scale * level, as decode gives it) and
// multiplied in order of its column, in two sums (even and odd columns) a row. Fast: activations are int8 with a float scale
// a block of 64 columns. A part (a unit of 32 columns, or half of it) is summed as integers, exactly; then, in float32,
//
//     block = fma(integer sum, weight scale, block)        for each part; with an offset also fma(sum of codes, shift, block)
//     total = fma(block, activation scale, total)          for each block
//
// Where one scale serves the row it is 1 above and the total is multiplied by it. Neither order depends on M, tiles or
// threads, so prefill and decoding, one thread or eight, give the same bits.

// ---- fast: integer products -------------------------------------------------------------------------------------------

// What the tokens bring along for one weight: -base * sum of codes, and the sum as a float, for each part. [M, parts], or
// [panels][parts][8] as the codes lie.
struct Corrections {
    std::int32_t* integer;
    float* sum;  // only where there is an offset
    std::size_t parts;
};

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
    // Several panels sum whole blocks of two units as integers where one scale serves the row.
    if (in_panels(x.count) && (x.count > kPanel || Lanes::kTokens < 4) && scaled_by_row(w) && w.offset == nullptr)
        for (std::size_t m = 0; m < rows; m += each)
            for (std::size_t p = 0; p + 1 < parts; p += 2)
                for (std::size_t t = 0; t < each; ++t) c.integer[m * parts + p * each + t] += c.integer[m * parts + (p + 1) * each + t];
}

// ---- exact: float products --------------------------------------------------------------------------------------------

// The decoded values of one unit, [32][16]; scratch is used unless the weight is float32 already.
static const float* unit_values(const Tiled& w, std::size_t tile, std::size_t u, float* scratch) {
    const std::uint8_t* data = w.data + tile * w.tile_bytes;
    const std::size_t begin = u * kUnit;
    const std::size_t count = w.columns - begin < kUnit ? w.columns - begin : kUnit;
    if (w.holds == Holds::f32) return reinterpret_cast<const float*>(data) + begin * kRows;
    if (w.holds != Holds::codes) {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(data) + begin * kRows;
        if (w.holds == Holds::f16)
            for (std::size_t k = 0; k < count; ++k) Lanes::store(scratch + k * kRows, Lanes::load_half(halves + k * kRows));
        else
            for (std::size_t k = 0; k < count; ++k) Lanes::store(scratch + k * kRows, Lanes::load_bfloat(halves + k * kRows));
        return scratch;
    }
    alignas(64) std::uint8_t codes[kSteps * kLine];
    with_plane_bits(w.bits, [&]<int B>() { unit_codes<B>(data + u * kLine * B, codes); });
    const F levels = Lanes::load(w.levels);
    const I low = Lanes::whole(0xff), base = Lanes::whole(w.base);
    for (std::size_t half = 0; half < 2; ++half) {
        std::size_t block = (begin + 16 * half) / w.block;
        if (block >= w.blocks) block = w.blocks - 1;  // columns behind the last one
        const std::size_t at = (tile * w.blocks + block) * kRows;
        const F scale = load_parameter(w.scale, w.scale_half, at);
        const bool has = w.offset != nullptr;
        const F offset = has ? load_parameter(w.offset, w.offset_half, at) : Lanes::all(0.0f);
        for (std::size_t s = 4 * half; s < 4 * half + 4; ++s) {
            I line = Lanes::line(codes + s * kLine);
            for (std::size_t j = 0; j < 4; ++j, line = Lanes::template right<8>(line)) {
                F level = w.table ? Lanes::float_table(levels, line)
                                  : Lanes::to_float(Lanes::minus(Lanes::both(line, low), base));
                if (has && w.offset_is_zero) level = Lanes::sub(level, offset);
                F value = Lanes::mul(scale, level);
                if (has && !w.offset_is_zero) value = Lanes::add(value, offset);
                Lanes::store(scratch + (4 * s + j) * kRows, value);
            }
        }
    }
    return scratch;
}

template <int M>
inline void exact_tile(const Tiled& w, std::size_t tile, const Activations& x, std::size_t m, float* to) {
    alignas(64) float scratch[kUnit * kRows];
    F even[M], odd[M];
    const float* values[M];
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) {
        even[t] = odd[t] = Lanes::all(0.0f);
        values[t] = x.values + (m + t) * x.stride;
    }
    for (std::size_t u = 0; u < w.units; ++u) {
        const float* column = unit_values(w, tile, u, scratch);
        const std::size_t begin = u * kUnit;
        const std::size_t count = w.columns - begin < kUnit ? w.columns - begin : kUnit;
        std::size_t k = 0;
        for (; k + 2 <= count; k += 2) {
            __builtin_prefetch(column + k * kRows + kAhead / 4);
            __builtin_prefetch(column + k * kRows + kAhead / 4 + 16);
            const F a = Lanes::load(column + k * kRows), b = Lanes::load(column + k * kRows + kRows);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) {
                even[t] = Lanes::fma(a, Lanes::all(values[t][begin + k]), even[t]);
                odd[t] = Lanes::fma(b, Lanes::all(values[t][begin + k + 1]), odd[t]);
            }
        }
        if (k < count) {
            const F a = Lanes::load(column + k * kRows);
#pragma GCC unroll 8
            for (int t = 0; t < M; ++t) even[t] = Lanes::fma(a, Lanes::all(values[t][begin + k]), even[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t) Lanes::store(to + t * kRows, Lanes::add(even[t], odd[t]));
}

// One token and whole units: values go from codes to sums without a stop in memory, in the same order.
template <int B, bool Table>
static void exact_codes(const Tiled& w, std::size_t tile, const float* x, float* to) {
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    const F levels = Lanes::load(w.levels);
    const I low = Lanes::whole(0xff), base = Lanes::whole(w.base);
    const bool has = w.offset != nullptr, zero = w.offset_is_zero;
    F even = Lanes::all(0.0f), odd = even;
    for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B) {
        const std::size_t begin = u * kUnit;
        const float* columns = x + begin;
        F scale = even, offset = even;
        const auto grid = [&](std::size_t column) __attribute__((always_inline)) {
            std::size_t block = column / w.block;
            if (block >= w.blocks) block = w.blocks - 1;
            const std::size_t at = (tile * w.blocks + block) * kRows;
            scale = load_parameter(w.scale, w.scale_half, at);
            if (has) offset = load_parameter(w.offset, w.offset_half, at);
        };
        const auto value = [&](I line) __attribute__((always_inline)) {
            F level = Table ? Lanes::float_table(levels, line) : Lanes::to_float(Lanes::minus(Lanes::both(line, low), base));
            if (has && zero) level = Lanes::sub(level, offset);
            const F scaled = Lanes::mul(scale, level);
            return has && !zero ? Lanes::add(scaled, offset) : scaled;
        };
        const auto take = [&](I line, std::size_t s) __attribute__((always_inline)) {
            even = Lanes::fma(value(line), Lanes::all(columns[4 * s]), even);
            odd = Lanes::fma(value(Lanes::template right<8>(line)), Lanes::all(columns[4 * s + 1]), odd);
            even = Lanes::fma(value(Lanes::template right<16>(line)), Lanes::all(columns[4 * s + 2]), even);
            odd = Lanes::fma(value(Lanes::template right<24>(line)), Lanes::all(columns[4 * s + 3]), odd);
        };
        for (std::size_t ahead = 0; ahead < B; ++ahead) __builtin_prefetch(unit + kAhead + ahead * kLine);
        grid(begin);
        take(step<B, 0>(unit), 0);
        take(step<B, 1>(unit), 1);
        take(step<B, 2>(unit), 2);
        take(step<B, 3>(unit), 3);
        if (w.halves) grid(begin + kUnit / 2);
        take(step<B, 4>(unit), 4);
        take(step<B, 5>(unit), 5);
        take(step<B, 6>(unit), 6);
        take(step<B, 7>(unit), 7);
    }
    Lanes::store(to, Lanes::add(even, odd));
}

static void exact_one(const Tiled& w, std::size_t tile, const Activations& x, std::size_t m, float* to) {
    const float* row = x.values + m * x.stride;
    if (w.holds != Holds::codes || w.columns % kUnit != 0) return exact_tile<1>(w, tile, x, m, to);
    if (w.table) return exact_codes<4, true>(w, tile, row, to);
    switch (w.bits) {
        case 2: return exact_codes<2, false>(w, tile, row, to);
        case 3: return exact_codes<3, false>(w, tile, row, to);
        case 4: return exact_codes<4, false>(w, tile, row, to);
        case 5: return exact_codes<5, false>(w, tile, row, to);
        case 6: return exact_codes<6, false>(w, tile, row, to);
        case 7: return exact_codes<7, false>(w, tile, row, to);
        default: return exact_codes<8, false>(w, tile, row, to);
    }
}

// ---- both: from sums to the output ------------------------------------------------------------------------------------

inline void put(const Output& out, std::size_t row, std::size_t count, std::size_t m, const float* sums, int tokens) {
    const F bias = out.bias == nullptr ? Lanes::all(0.0f) : Lanes::load(out.bias + row);
    const F scale = Lanes::all(out.scale);
    for (int t = 0; t < tokens; ++t) {
        float* to = out.to + (m + std::size_t(t)) * out.stride + row;
        F y = Lanes::add(Lanes::mul(Lanes::load(sums + t * int(kRows)), scale), bias);
        if (out.activation != Activation::none) y = activate(y, out.activation);
        if (out.add) y = Lanes::add(load_some(to, count), y);
        if (out.times) y = Lanes::mul(load_some(to, count), y);
        store_some(to, y, count);
    }
}

template <int B, bool Table, int M>
inline void fast_tiles(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                       std::size_t last, const Corrections& c) {
    alignas(64) float sums[M * kRows];
    const int tokens = x.count - m < std::size_t(M) ? int(x.count - m) : M;
    for (std::size_t tile = first; tile < last; ++tile) {
        if (w.halves)
            fast_tile<B, Table, M, true>(w, tile, x, m, c, sums);
        else
            fast_tile<B, Table, M, false>(w, tile, x, m, c, sums);
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, tokens);
    }
}

template <int M>
static void fast_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                       std::size_t last, const Corrections& c) {
    if (w.table) return fast_tiles<4, true, M>(w, x, m, out, first, last, c);
    switch (w.bits) {
        case 2: return fast_tiles<2, false, M>(w, x, m, out, first, last, c);
        case 3: return fast_tiles<3, false, M>(w, x, m, out, first, last, c);
        case 4: return fast_tiles<4, false, M>(w, x, m, out, first, last, c);
        case 5: return fast_tiles<5, false, M>(w, x, m, out, first, last, c);
        case 6: return fast_tiles<6, false, M>(w, x, m, out, first, last, c);
        case 7: return fast_tiles<7, false, M>(w, x, m, out, first, last, c);
        default: return fast_tiles<8, false, M>(w, x, m, out, first, last, c);
    }
}

// All panels against tiles [first, last), which lie unpacked in `bytes`.
template <bool Row, bool Halves>
static void panels(const Tiled& w, const std::uint8_t* bytes, const Activations& x, const Output& out, std::size_t first,
                   std::size_t last, const Corrections& c) {
    constexpr int tiles = Lanes::kTokens >= 8 ? 2 : 1, rows = Lanes::kTokens >= 8 ? 4 : Lanes::kTokens;
    alignas(64) float sums[tiles * kPanel * kRows];
    for (std::size_t m = 0; m < x.count; m += kPanel) {
        const std::size_t tokens = x.count - m < kPanel ? x.count - m : kPanel;
        for (std::size_t tile = first; tile < last;) {
            const std::uint8_t* at = bytes + (tile - first) * w.units * kSteps * kLine;
            const std::size_t together = last - tile < tiles ? 1 : tiles;
            for (std::size_t t = 0; t < tokens; ++t)  // the products take long enough for these to come
                for (std::size_t i = 0; i < together; ++i)
                    __builtin_prefetch(out.to + (m + t) * out.stride + (tile + i) * kRows, 1);
            for (std::size_t row = 0; row < tokens; row += rows) {
                if (together == tiles)
                    panel_tile<Row, Halves, tiles, rows>(w, tile, at, x, m, row, c, sums);
                else
                    panel_tile<Row, Halves, 1, rows>(w, tile, at, x, m, row, c, sums);
            }
            for (std::size_t i = 0; i < together; ++i, ++tile) {
                const std::size_t row = tile * kRows;
                put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums + i * kPanel * kRows, int(tokens));
            }
        }
    }
}

template <int M>
static void exact_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                        std::size_t last) {
    alignas(64) float sums[M * kRows];
    for (std::size_t tile = first; tile < last; ++tile) {
        if constexpr (M == 1)
            exact_one(w, tile, x, m, sums);
        else
            exact_tile<M>(w, tile, x, m, sums);
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, M);
    }
}

// Tiles [first, last) for all tokens. fast needs a weight of codes, x.codes and a scratch that was prepared.
static void product(const Tiled& w, const Activations& x, const Output& out, std::size_t first, std::size_t last, bool fast,
                    void* scratch) {
    if (fast && in_panels(x.count)) {
        const Corrections c = corrections(w, x, scratch);
        if (Lanes::kTokens >= 4 && x.count <= kPanel) return fast_group<Lanes::kTokens >= 4 ? 8 : 1>(w, x, 0, out, first, last, c);
        // So many tiles that they stay in the second cache while one panel after the other meets them.
        const std::size_t tile_bytes = w.units * kSteps * kLine, chunk = tile_bytes == 0 || tile_bytes > kKept ? 1 : kKept / tile_bytes;
        auto* bytes = static_cast<std::uint8_t*>(scratch) + correction_bytes(w, x.count);
        for (std::size_t begin = first; begin < last; begin += chunk) {
            const std::size_t end = last - begin < chunk ? last : begin + chunk;
            for (std::size_t tile = begin; tile < end; ++tile) widen(w, tile, bytes + (tile - begin) * tile_bytes);
            if (scaled_by_row(w))
                panels<true, false>(w, bytes, x, out, begin, end, c);
            else if (w.halves)
                panels<false, true>(w, bytes, x, out, begin, end, c);
            else
                panels<false, false>(w, bytes, x, out, begin, end, c);
        }
        return;
    }
    if (fast) {
        const Corrections c = corrections(w, x, scratch);
        if (Lanes::kTokens >= 4 && x.count == 4) return fast_group<4>(w, x, 0, out, first, last, c);
        for (std::size_t m = 0; m < x.count; ++m) fast_group<1>(w, x, m, out, first, last, c);
        return;
    }
    const std::size_t chunk = w.tile_bytes == 0 || w.tile_bytes > kKept ? 1 : kKept / w.tile_bytes;
    for (std::size_t begin = first; begin < last; begin += chunk) {
        const std::size_t end = last - begin < chunk ? last : begin + chunk;
        std::size_t m = 0;
        if constexpr (Lanes::kTokens >= 8)
            for (; m + 8 <= x.count; m += 8) exact_group<8>(w, x, m, out, begin, end);
        if constexpr (Lanes::kTokens >= 4)
            for (; m + 4 <= x.count; m += 4) exact_group<4>(w, x, m, out, begin, end);
        for (; m < x.count; ++m) exact_group<1>(w, x, m, out, begin, end);
    }
}
