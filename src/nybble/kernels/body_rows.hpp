// Operations on one row of activations: norms, quantization to int8. Included once per instruction set, after body_math.

// int8 codes of one row [K] in blocks of 32: scale = absmax / 127, code = nearest(x * (127 / absmax)), ties to even. A block
// of zeros (or below 1e-30) has scale 0. A block with a value that is not finite has scale NaN, so that it shows.
static void quantize_row(const float* x, std::size_t columns, std::size_t units, std::int8_t* codes, float* scale,
                         std::int32_t* sums) {
    for (std::size_t u = 0; u < units; ++u) {
        const std::size_t begin = u * kUnit, count = columns - begin < kUnit ? columns - begin : kUnit;
        const F a = load_some(x + begin, count), b = count > 16 ? load_some(x + begin + 16, count - 16) : Lanes::all(0.0f);
        const float top = largest(Lanes::max(Lanes::abs(a), Lanes::abs(b)));
        const float zero = fold(Lanes::fma(a, Lanes::all(0.0f), Lanes::mul(b, Lanes::all(0.0f))));  // NaN: not all finite
        const bool some = top > 1e-30f && zero == 0.0f;
        scale[u] = zero == 0.0f ? (some ? top / 127.0f : 0.0f) : zero - zero;
        const F inverse = Lanes::all(some ? 127.0f / top : 0.0f);
        I first = Lanes::to_whole(Lanes::mul(a, inverse)), second = Lanes::to_whole(Lanes::mul(b, inverse));
        if (zero != 0.0f) first = second = Lanes::whole(0);
        Lanes::store_bytes(codes + begin, first);
        Lanes::store_bytes(codes + begin + 16, second);
        alignas(64) std::int32_t at[32];
        Lanes::store_line(at, first);
        Lanes::store_line(at + 16, second);
        std::int32_t low = 0, high = 0;
        for (int i = 0; i < 16; ++i) low += at[i], high += at[16 + i];
        sums[2 * u] = low;
        sums[2 * u + 1] = high;
    }
}

// y = (x - mean) / sqrt(variance + eps) * gain + bias, or without the mean (RMS). In place where y == x.
static void norm_row(const float* x, std::size_t columns, const NormOf& norm, float* y) {
    const std::size_t whole = columns / 16 * 16, rest = columns - whole;
    const float n = static_cast<float>(columns);
    float mean = 0.0f;
    if (norm.centred) {
        F a = Lanes::all(0.0f), b = a;
        std::size_t k = 0;
        for (; k + 32 <= whole; k += 32) {
            a = Lanes::add(a, Lanes::load(x + k));
            b = Lanes::add(b, Lanes::load(x + k + 16));
        }
        if (k < whole) a = Lanes::add(a, Lanes::load(x + k));
        if (rest != 0) b = Lanes::add(b, load_some(x + whole, rest));
        mean = fold(Lanes::add(a, b)) / n;
    }
    const F middle = Lanes::all(mean);
    F a = Lanes::all(0.0f), b = a;
    std::size_t k = 0;
    for (; k + 32 <= whole; k += 32) {
        const F p = Lanes::sub(Lanes::load(x + k), middle), q = Lanes::sub(Lanes::load(x + k + 16), middle);
        a = Lanes::fma(p, p, a);
        b = Lanes::fma(q, q, b);
    }
    if (k < whole) {
        const F p = Lanes::sub(Lanes::load(x + k), middle);
        a = Lanes::fma(p, p, a);
    }
    float square = fold(Lanes::add(a, b));
    for (k = whole; k < columns; ++k) square += (x[k] - mean) * (x[k] - mean);
    const F factor = Lanes::all(1.0f / __builtin_sqrtf(square / n + norm.eps));
    for (k = 0; k < columns; k += 16) {
        const std::size_t count = columns - k < 16 ? columns - k : 16;
        F v = Lanes::mul(Lanes::sub(load_some(x + k, count), middle), factor);
        if (norm.gain != nullptr) v = Lanes::mul(v, load_some(norm.gain + k, count));
        if (norm.bias != nullptr) v = Lanes::add(v, load_some(norm.bias + k, count));
        store_some(y + k, v, count);
    }
}

// Index and value of the largest of count values, the first of equals; NaN gives index count.
static std::size_t best_of(const float* x, std::size_t count) {
    F top = Lanes::all(-__builtin_inff()), zero = Lanes::all(0.0f);
    std::size_t k = 0;
    for (; k + 16 <= count; k += 16) {
        const F v = Lanes::load(x + k);
        top = Lanes::max(top, v);
        zero = Lanes::fma(v, Lanes::all(0.0f), zero);
    }
    float best = largest(top), check = fold(zero);
    for (; k < count; ++k) {
        best = x[k] > best ? x[k] : best;
        check += x[k] * 0.0f;
    }
    if (check != 0.0f) return count;
    for (k = 0; k < count; ++k)
        if (x[k] == best) return k;
    return count;
}

static void activate_row(float* x, std::size_t count, Activation kind) {
    for (std::size_t k = 0; k < count; k += 16) {
        const std::size_t some = count - k < 16 ? count - k : 16;
        store_some(x + k, activate(load_some(x + k, some), kind), some);
    }
}
