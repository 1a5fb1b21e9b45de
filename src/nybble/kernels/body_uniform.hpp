// Whole-number codes of a weight: the ends of its blocks, and the steps nearest to weight / scale; reference_uniform.py, to the
// bit. Quotients are doubles: a float divided by a float is then rounded once, where it becomes a whole number.

static void extremes_row(const float* weight, std::size_t columns, std::size_t block, float* low, float* high) {
    for (std::size_t start = 0, b = 0; start < columns; start += block, ++b) {
        const std::size_t count = block < columns - start ? block : columns - start;
        const float* from = weight + start;
        float least = from[0], most = from[0];
        std::size_t k = 0;
        if (count >= 16) {
            F lowest = Lanes::load(from), highest = lowest;
            for (k = 16; k + 16 <= count; k += 16) {
                const F x = Lanes::load(from + k);
                lowest = Lanes::min(x, lowest);
                highest = Lanes::max(x, highest);
            }
            alignas(64) float ends[2][16];
            Lanes::store(ends[0], lowest);
            Lanes::store(ends[1], highest);
            for (int lane = 0; lane < 16; ++lane) {
                least = ends[0][lane] < least ? ends[0][lane] : least;
                most = ends[1][lane] > most ? ends[1][lane] : most;
            }
        }
        for (; k < count; ++k) {
            least = from[k] < least ? from[k] : least;
            most = from[k] > most ? from[k] : most;
        }
        low[b] = least;
        high[b] = most;
    }
}

// Codes of weights with one scale. A product with the reciprocal, in floats, is off by less than 2^-14 as far as codes reach; only
// where it comes so near to half way between two steps do the doubles decide.
static void steps_of(const float* from, std::size_t count, float scale, double up, double top, std::uint8_t* to) {
    const double divisor = scale == 0.0f ? 1.0 : double(scale);
    const float by = 1.0f / float(divisor), size = __builtin_fabsf(float(divisor));
    bool unsure = !(size > 0x1p-100f && size < 0x1p100f);
    const int shift = top > 127.0 ? 128 : 0;  // bytes are stored as signed ones
    const F scaled = Lanes::all(by), lowest = Lanes::all(float(-up)), highest = Lanes::all(float(top - up));
    const I upward = Lanes::whole(int(up) - shift);
    F farthest = Lanes::all(0.0f);
    alignas(64) float part[16] = {};
    for (std::size_t k = 0; k < count; k += 16) {
        const bool whole = k + 16 <= count;
        if (!whole) __builtin_memcpy(part, from + k, 4 * (count - k));
        const F ratio = Lanes::max(Lanes::min(Lanes::mul(Lanes::load(whole ? from + k : part), scaled), highest), lowest);
        const I nearest = Lanes::to_whole(ratio);
        farthest = Lanes::max(Lanes::abs(Lanes::sub(ratio, Lanes::to_float(nearest))), farthest);
        alignas(16) std::int8_t last[16];
        Lanes::store_bytes(whole ? reinterpret_cast<std::int8_t*>(to + k) : last, Lanes::plus(nearest, upward));
        if (!whole) __builtin_memcpy(to + k, last, count - k);
    }
    unsure |= !(Lanes::largest(farthest) <= 0.5f - 0x1p-14f);
    if (shift != 0)
        for (std::size_t k = 0; k < count; ++k) to[k] ^= 0x80u;
    if (!unsure) return;
    for (std::size_t k = 0; k < count; ++k) {
        double step = __builtin_rint(double(from[k]) / divisor) + up;
        step = step > 0.0 ? step : 0.0;
        step = step < top ? step : top;
        to[k] = std::uint8_t(int(step));
    }
}

static void uniform_row(const float* weight, std::size_t columns, std::size_t block, const float* scale, const float* zero,
                        double middle, double top, std::uint8_t* codes) {
    for (std::size_t start = 0, b = 0; start < columns; start += block, ++b) {
        const std::size_t count = block < columns - start ? block : columns - start;
        steps_of(weight + start, count, scale[b], zero == nullptr ? middle : double(zero[b]), top, codes + start);
    }
}

// The least float, or half, that is no less than a value of at most the largest; the half as bits.
static inline float float_up(double value) {
    float near = float(value);
    std::uint32_t bits;
    __builtin_memcpy(&bits, &near, 4);
    bits += double(near) < value;  // not negative: the next float is the next whole number
    __builtin_memcpy(&near, &bits, 4);
    return near;
}

static inline std::uint16_t half_up(double value) {
    const float above = float_up(value);
    if (above < 0x1p-14f) return std::uint16_t(__builtin_ceilf(above * 0x1p24f));  // less than a half's least normal: steps of 2^-24
    std::uint32_t bits;
    __builtin_memcpy(&bits, &above, 4);
    bits -= (127u - 15u) << 23;
    return std::uint16_t((bits >> 13) + ((bits & 0x1fffu) != 0));
}

static inline float of_half(std::uint16_t half) {  // not negative, finite
    if (half < 0x400u) return float(half) * 0x1p-24f;
    const std::uint32_t bits = (std::uint32_t(half) << 13) + ((127u - 15u) << 23);
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// One row as a file has it, to codes and what is stored with them; false where a weight is not finite, or too large.
static bool round_row(const RoundRow& row) {
    const float* weight = static_cast<const float*>(row.from);
    if (row.holds != Holds::f32) {
        const auto* from = static_cast<const std::uint16_t*>(row.from);
        const bool bfloat = row.holds == Holds::bf16;
        std::size_t k = 0;
        for (; k + 16 <= row.columns; k += 16) Lanes::store(row.floats + k, bfloat ? Lanes::load_bfloat(from + k) : Lanes::load_half(from + k));
        if (k < row.columns) {
            std::uint16_t last[16] = {};
            alignas(64) float wide[16];
            __builtin_memcpy(last, from + k, 2 * (row.columns - k));
            Lanes::store(wide, bfloat ? Lanes::load_bfloat(last) : Lanes::load_half(last));
            __builtin_memcpy(row.floats + k, wide, 4 * (row.columns - k));
        }
        weight = row.floats;
    }
    std::uint32_t largest = 0;
    for (std::size_t k = 0; k < row.columns; ++k) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, weight + k, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7e800000u) return false;  // 2^126 and more, infinity, NaN
    const double top = double((1 << row.bits) - 1), half = double(1 << (row.bits - 1));
    for (std::size_t start = 0, b = 0; start < row.columns; start += row.block, ++b) {
        const std::size_t count = row.block < row.columns - start ? row.block : row.columns - start;
        float low, high;
        extremes_row(weight + start, count, count, &low, &high);
        if (row.zero != nullptr) {
            low = low < 0.0f ? low : 0.0f;
            high = high > 0.0f ? high : 0.0f;
        }
        const double wanted = row.zero != nullptr ? (double(high) - double(low)) / top : double(-low > high ? -low : high) / (half - 1.0);
        float scale;
        if (row.halves != nullptr) {
            if (wanted > 65504.0) return false;
            row.halves[b] = half_up(wanted);
            scale = of_half(row.halves[b]);
        } else {
            row.scale[b] = scale = float_up(wanted + 0.0);  // of zeros: not -0
        }
        double up = half;
        if (row.zero != nullptr) {
            up = __builtin_rint(double(-low) / (scale == 0.0f ? 1.0 : double(scale)));
            up = up > 0.0 ? up : 0.0;
            up = up < top ? up : top;
            row.zero[b] = std::uint8_t(up);
        }
        steps_of(weight + start, count, scale, up, top, row.codes + start);
    }
    return true;
}
