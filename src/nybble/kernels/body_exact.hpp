// Float products of tiles, what body_product.hpp calls exact. Included once per instruction set, after body_layout.

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
        const F scale = scale_of(w, tile, block);
        const bool has = w.offset != nullptr;
        const F offset = has ? offset_of(w, tile, block) : Lanes::all(0.0f);
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
            scale = scale_of(w, tile, block);
            if (has) offset = offset_of(w, tile, block);
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
        if (w.part < kUnit) grid(begin + kUnit / 2);
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
