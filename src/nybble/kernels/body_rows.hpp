// Operations on one row of activations: norms, quantization to int8. Included once per instruction set, after body_math.

// int8 codes of one row [K] in blocks of 64: scale = absmax / 127, code = nearest(x * (127 / absmax)), ties to even. A block
// of zeros (or below 1e-30) has scale 0. A block with a value that is not finite has scale NaN, so that it shows. codes has
// room for whole blocks, sums is one for sixteen codes.
static void quantize_row(const float* x, std::size_t columns, const CodesOut& out) {
    constexpr std::size_t some_blocks = 16;
    float* scale = out.scale;
    std::int32_t* sums = out.sums;
    std::int8_t* to = out.codes;
    const std::size_t apart = out.apart;
    const auto load = [&](std::size_t at) {
        return at + 16 <= columns ? Lanes::load(x + at) : at < columns ? load_some(x + at, columns - at) : Lanes::all(0.0f);
    };
    for (std::size_t first = 0; first < columns; first += some_blocks * kBlock) {
        const std::size_t end = columns - first < some_blocks * kBlock ? columns : first + some_blocks * kBlock;
        float inverses[some_blocks];  // NaN: not finite
        // In two passes: the codes of one block need not wait for the largest value of the next and the divisions by it.
        float* inverse = inverses;
        for (std::size_t begin = first; begin < end; begin += kBlock, scale += apart, ++inverse) {
            I top = Lanes::whole(0);  // bits of magnitudes: as whole numbers they order as the floats do, NaN above infinity
            for (std::size_t i = 0; i < kBlock; i += 16) top = Lanes::most(top, Lanes::as_whole(Lanes::abs(load(begin + i))));
            const std::int32_t bits = Lanes::largest(top);
            float most;
            __builtin_memcpy(&most, &bits, 4);
            const bool finite = bits < 0x7f800000, some = finite && most > 1e-30f;
            *scale = finite ? (some ? most / 127.0f : 0.0f) : __builtin_nanf("");
            *inverse = finite ? (some ? 127.0f / most : 0.0f) : __builtin_nanf("");
        }
        inverse = inverses;
        for (std::size_t begin = first; begin < end; begin += kBlock, ++inverse) {
            const F by = Lanes::all(*inverse);
            I code[4];
            for (std::size_t i = 0; i < 4; ++i)
                code[i] = *inverse == *inverse ? Lanes::to_whole(Lanes::mul(load(begin + 16 * i), by)) : Lanes::whole(0);
            std::int32_t totals[4];
            Lanes::totals(code, totals);
            for (std::size_t i = 0; i < 4; ++i, sums += apart) *sums = totals[i];
            if (apart == 1) {
                for (std::size_t i = 0; i < 4; ++i, to += 16) Lanes::store_bytes(to, code[i]);
                continue;
            }
            alignas(16) std::int8_t codes[kBlock];
            for (std::size_t i = 0; i < 4; ++i) Lanes::store_bytes(codes + 16 * i, code[i]);
            for (std::size_t s = 0; s < kBlock / 4; ++s, to += 4 * kPanel) __builtin_memcpy(to, codes + 4 * s, 4);
        }
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
        mean = Lanes::sum(Lanes::add(a, b)) / n;
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
    float square = Lanes::sum(Lanes::add(a, b));
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
    float best = Lanes::largest(top), check = Lanes::sum(zero);
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
