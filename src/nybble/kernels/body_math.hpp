// Functions of sixteen lanes: exponential, the activations of feed-forward layers, sums over a row.
// Included once per instruction set, after Lanes. No -ffast-math: the same operations in the same order everywhere, so
// that every instruction set gives the same bits.

using F = typename Lanes::F;
using I = typename Lanes::I;

// e^x within 2 units in the last place; x is clamped to [-87.3, 88.3] (1.2e-38 .. 2.2e38). Range reduction by ln 2 in two
// parts, then a polynomial of degree 6 (Taylor; the remainder at ln 2 / 2 is 1.3e-8).
inline F exponential(F x) {
    x = Lanes::min(Lanes::all(88.3f), Lanes::max(Lanes::all(-87.3f), x));  // in this order NaN stays NaN
    const I n = Lanes::to_whole(Lanes::mul(x, Lanes::all(1.44269504088896341f)));
    const F whole = Lanes::to_float(n);
    F r = Lanes::fma(whole, Lanes::all(-0.693359375f), x);
    r = Lanes::fma(whole, Lanes::all(2.12194440e-4f), r);
    F p = Lanes::fma(r, Lanes::all(1.0f / 720), Lanes::all(1.0f / 120));
    p = Lanes::fma(p, r, Lanes::all(1.0f / 24));
    p = Lanes::fma(p, r, Lanes::all(1.0f / 6));
    p = Lanes::fma(p, r, Lanes::all(0.5f));
    p = Lanes::fma(p, r, Lanes::all(1.0f));
    p = Lanes::fma(p, r, Lanes::all(1.0f));
    return Lanes::mul(p, Lanes::as_float(Lanes::template left<23>(Lanes::plus(n, Lanes::whole(127)))));
}

// 2^x within 2 units in the last place; x is clamped to [-125, 126]. A polynomial with the least relative error, 9e-8: half
// the operations of e^x, for those who can multiply by log2(e) elsewhere.
inline F power_of_two(F x) {
    x = Lanes::min(Lanes::all(126.0f), Lanes::max(Lanes::all(-125.0f), x));  // in this order NaN stays NaN
    const I n = Lanes::to_whole(x);
    const F r = Lanes::sub(x, Lanes::to_float(n));
    F p = Lanes::fma(r, Lanes::all(0.00132647273f), Lanes::all(0.00967151299f));
    p = Lanes::fma(p, r, Lanes::all(0.0555073358f));
    p = Lanes::fma(p, r, Lanes::all(0.240222424f));
    p = Lanes::fma(p, r, Lanes::all(0.693147004f));
    p = Lanes::fma(p, r, Lanes::all(1.0f));
    return Lanes::as_float(Lanes::plus(Lanes::as_whole(p), Lanes::template left<23>(n)));
}

inline constexpr float kLog2E = 1.44269504f;

inline F logistic_times(F x, F z) {  // x / (1 + 2^z): the logistic function of -z / log2(e)
    return Lanes::div(x, Lanes::add(Lanes::all(1.0f), power_of_two(z)));
}

// tanh(x) = 1 - 2 / (1 + e^2x)
inline F tangent(F x) {
    const F e = exponential(Lanes::add(x, x));
    return Lanes::sub(Lanes::all(1.0f), Lanes::div(Lanes::all(2.0f), Lanes::add(Lanes::all(1.0f), e)));
}

// erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
inline F error_function(F x) {
    const F size = Lanes::abs(x);
    const F t = Lanes::div(Lanes::all(1.0f), Lanes::fma(Lanes::all(0.3275911f), size, Lanes::all(1.0f)));
    F p = Lanes::fma(t, Lanes::all(1.061405429f), Lanes::all(-1.453152027f));
    p = Lanes::fma(p, t, Lanes::all(1.421413741f));
    p = Lanes::fma(p, t, Lanes::all(-0.284496736f));
    p = Lanes::fma(p, t, Lanes::all(0.254829592f));
    p = Lanes::mul(p, t);
    const F tail = Lanes::mul(p, exponential(Lanes::sub(Lanes::all(0.0f), Lanes::mul(x, x))));
    const F positive = Lanes::sub(Lanes::all(1.0f), tail);
    // The sign of x: x / |x|, 0 at 0.
    const F sign = Lanes::div(x, Lanes::max(size, Lanes::all(1e-30f)));
    return Lanes::mul(positive, sign);
}

inline F activate(F x, Activation kind) {
    switch (kind) {
        case Activation::gelu:
            return Lanes::mul(Lanes::mul(Lanes::all(0.5f), x),
                              Lanes::add(Lanes::all(1.0f), error_function(Lanes::mul(x, Lanes::all(0.70710678f)))));
        case Activation::gelu_tanh: {
            constexpr float slope = -1.5957691216f * kLog2E;
            return logistic_times(x, Lanes::mul(x, Lanes::fma(Lanes::mul(x, x), Lanes::all(0.044715f * slope), Lanes::all(slope))));
        }
        case Activation::gelu_quick:
            return logistic_times(x, Lanes::mul(Lanes::all(-1.702f * kLog2E), x));
        case Activation::silu:
            return logistic_times(x, Lanes::mul(Lanes::all(-kLog2E), x));
        case Activation::relu:
            return Lanes::max(Lanes::all(0.0f), x);
        case Activation::none:
            break;
    }
    return x;
}

// Up to sixteen values, zeros behind them.
inline F load_some(const float* from, std::size_t count) {
    if (count >= 16) return Lanes::load(from);
    alignas(64) float at[16] = {};
    __builtin_memcpy(at, from, count * sizeof(float));
    return Lanes::load(at);
}

inline void store_some(float* to, F v, std::size_t count) {
    if (count >= 16) return Lanes::store(to, v);
    alignas(64) float at[16];
    Lanes::store(at, v);
    __builtin_memcpy(to, at, count * sizeof(float));
}
