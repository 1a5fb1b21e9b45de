// Products y = x W^T with a weight in the kernel layout. Included once per instruction set, after Lanes and body_layout.
//
// Two modes. Exact: activations are floats, every weight is decoded to a float (scale * level, as decode gives it) and
// multiplied in order of its column, in two sums (even and odd columns) a row. Fast: activations are int8 with a float scale
// a unit of 32 columns; a unit's products are summed as integers, exactly, and joined to the row's sum as
// fma(integer * activation scale, weight scale, sum). Neither order depends on M, tiles or threads, so prefill and
// decoding, one thread or eight, give the same bits.

// ---- fast: integer products -------------------------------------------------------------------------------------------

// What a group of tokens brings along for one weight: -base * sum of codes, and scale * sum of codes, a unit or half unit.
struct Corrections {
    std::int32_t* integer;  // [M, parts]
    float* sum;             // [M, parts]
    std::size_t parts;
};

template <int B, bool Table, int M, bool Halves>
inline void fast_tile(const Tiled& w, std::size_t tile, const Activations& x, std::size_t m, const Corrections& c, float* to) {
    F total[M];
    const std::int8_t* codes[M];
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) {
        total[t] = Lanes::all(0.0f);
        codes[t] = x.codes + (m + t) * x.units * kUnit;
    }
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    const I table = Lanes::byte_table(w.bytes);
    const std::size_t first = tile * w.blocks * kRows;
    const std::size_t per_block = Halves ? 1 : (w.block / kUnit == 0 ? 1 : w.block / kUnit);
    std::size_t block = 0, left = per_block;
    for (std::size_t u = 0; u < w.units; ++u, unit += kLine * B) {
        __builtin_prefetch(unit + kAhead);
        if constexpr (B >= 2) __builtin_prefetch(unit + kAhead + 64);
        if constexpr (B >= 3) __builtin_prefetch(unit + kAhead + 128);
        if constexpr (B >= 4) __builtin_prefetch(unit + kAhead + 192);
        if constexpr (B >= 5) __builtin_prefetch(unit + kAhead + 256);
        if constexpr (B >= 6) __builtin_prefetch(unit + kAhead + 320);
        if constexpr (B >= 8) {
            __builtin_prefetch(unit + kAhead + 384);
            __builtin_prefetch(unit + kAhead + 448);
        }
        const auto take = [&](auto line, std::size_t s, I* sums) __attribute__((always_inline)) {
            if constexpr (Table) line = Lanes::look_up(table, line);
#pragma GCC unroll 12
            for (int t = 0; t < M; ++t) sums[t] = Lanes::dot(sums[t], line, Lanes::four(codes[t] + u * kUnit + 4 * s));
        };
        const auto join = [&](I* sums, std::size_t part, std::size_t at) __attribute__((always_inline)) {
            const F scale = load_parameter(w.scale, w.scale_half, first + at * kRows);
            F shift = Lanes::all(0.0f);
            if (w.offset != nullptr) {
                shift = load_parameter(w.offset, w.offset_half, first + at * kRows);
                if (w.offset_is_zero) shift = Lanes::sub(Lanes::all(0.0f), Lanes::mul(scale, shift));
            }
#pragma GCC unroll 12
            for (int t = 0; t < M; ++t) {
                const F scaled = Lanes::mul(Lanes::to_float(sums[t]), Lanes::all(x.scale[(m + t) * x.units + u]));
                total[t] = Lanes::fma(scaled, scale, total[t]);
            }
            if (w.offset != nullptr)
#pragma GCC unroll 12
                for (int t = 0; t < M; ++t) total[t] = Lanes::fma(Lanes::all(c.sum[t * c.parts + part]), shift, total[t]);
        };
        I sums[M];
        const std::size_t part = Halves ? 2 * u : u;
#pragma GCC unroll 12
        for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(c.integer[t * c.parts + part]);
        take(step<B, 0>(unit), 0, sums);
        take(step<B, 1>(unit), 1, sums);
        take(step<B, 2>(unit), 2, sums);
        take(step<B, 3>(unit), 3, sums);
        if constexpr (Halves) {
            join(sums, part, part < w.blocks ? part : w.blocks - 1);
#pragma GCC unroll 12
            for (int t = 0; t < M; ++t) sums[t] = Lanes::whole(c.integer[t * c.parts + part + 1]);
        }
        take(step<B, 4>(unit), 4, sums);
        take(step<B, 5>(unit), 5, sums);
        take(step<B, 6>(unit), 6, sums);
        take(step<B, 7>(unit), 7, sums);
        if constexpr (Halves) {
            join(sums, part + 1, part + 1 < w.blocks ? part + 1 : w.blocks - 1);
        } else {
            join(sums, part, block);
            if (--left == 0) {
                left = per_block;
                if (block + 1 < w.blocks) ++block;
            }
        }
    }
    const F after = Lanes::all(Table ? w.byte_step : 1.0f);
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) Lanes::store(to + t * kRows, Table ? Lanes::mul(total[t], after) : total[t]);
}

template <int M>
inline void corrections(const Tiled& w, const Activations& x, std::size_t m, Corrections& c) {
    const std::int32_t base = w.table ? 128 : w.base;
    c.parts = w.halves ? 2 * w.units : w.units;
    for (int t = 0; t < M; ++t)
        for (std::size_t p = 0; p < c.parts; ++p) {
            const std::int32_t* sums = x.sums + (m + t) * x.units * 2;
            const std::int32_t sum = w.halves ? sums[p] : sums[2 * p] + sums[2 * p + 1];
            const float scale = x.scale[(m + t) * x.units + (w.halves ? p / 2 : p)];
            c.integer[t * c.parts + p] = -base * sum;
            c.sum[t * c.parts + p] = scale * static_cast<float>(sum);
        }
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
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) {
        even[t] = odd[t] = Lanes::all(0.0f);
        values[t] = x.values + (m + t) * x.units * kUnit;
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
#pragma GCC unroll 12
            for (int t = 0; t < M; ++t) {
                even[t] = Lanes::fma(a, Lanes::all(values[t][begin + k]), even[t]);
                odd[t] = Lanes::fma(b, Lanes::all(values[t][begin + k + 1]), odd[t]);
            }
        }
        if (k < count) {
            const F a = Lanes::load(column + k * kRows);
#pragma GCC unroll 12
            for (int t = 0; t < M; ++t) even[t] = Lanes::fma(a, Lanes::all(values[t][begin + k]), even[t]);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < M; ++t) Lanes::store(to + t * kRows, Lanes::add(even[t], odd[t]));
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
                       std::size_t last, Corrections& c) {
    alignas(64) float sums[M * kRows];
    for (std::size_t tile = first; tile < last; ++tile) {
        if constexpr (M <= 4) {  // few formats have blocks of 16: they do without the wide groups
            if (w.halves)
                fast_tile<B, Table, M, true>(w, tile, x, m, c, sums);
            else
                fast_tile<B, Table, M, false>(w, tile, x, m, c, sums);
        } else {
            fast_tile<B, Table, M, false>(w, tile, x, m, c, sums);
        }
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, M);
    }
}

template <int M>
static void fast_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                       std::size_t last, Corrections& c) {
    corrections<M>(w, x, m, c);
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

template <int M>
static void exact_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                        std::size_t last) {
    alignas(64) float sums[M * kRows];
    for (std::size_t tile = first; tile < last; ++tile) {
        exact_tile<M>(w, tile, x, m, sums);
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, M);
    }
}

// Tiles [first, last) for all tokens. fast needs a weight of codes and x.codes; scratch: product_scratch(w) bytes.
static void product(const Tiled& w, const Activations& x, const Output& out, std::size_t first, std::size_t last, bool fast,
                    void* scratch) {
    Corrections c;
    c.parts = 0;
    c.integer = static_cast<std::int32_t*>(scratch);
    c.sum = reinterpret_cast<float*>(c.integer + kMostTokens * 2 * w.units);
    // So many tiles that they stay in the second cache while one group of tokens after the other meets them.
    const std::size_t chunk = w.tile_bytes == 0 || w.tile_bytes > kKept ? 1 : kKept / w.tile_bytes;
    for (std::size_t begin = first; begin < last; begin += chunk) {
        const std::size_t end = last - begin < chunk ? last : begin + chunk;
        std::size_t m = 0;
        if (fast) {
            if constexpr (Lanes::kTokens >= 12) {
                for (; m + 12 <= x.count && !w.halves; m += 12) fast_group<12>(w, x, m, out, begin, end, c);
                for (; m + 8 <= x.count && !w.halves; m += 8) fast_group<8>(w, x, m, out, begin, end, c);
            }
            if constexpr (Lanes::kTokens >= 4)
                for (; m + 4 <= x.count; m += 4) fast_group<4>(w, x, m, out, begin, end, c);
            if constexpr (Lanes::kTokens == 2)
                for (; m + 2 <= x.count; m += 2) fast_group<2>(w, x, m, out, begin, end, c);
            for (; m < x.count; ++m) fast_group<1>(w, x, m, out, begin, end, c);
        } else {
            if constexpr (Lanes::kTokens >= 12)
                for (; m + 12 <= x.count; m += 12) exact_group<12>(w, x, m, out, begin, end);
            if constexpr (Lanes::kTokens >= 2)
                for (; m + 4 <= x.count; m += 4) exact_group<4>(w, x, m, out, begin, end);
            for (; m < x.count; ++m) exact_group<1>(w, x, m, out, begin, end);
        }
    }
}
