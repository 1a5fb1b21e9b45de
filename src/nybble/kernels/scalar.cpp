// The portable kernels: plain C++ over eight lanes, which compilers turn into SSE2 or NEON where they can.
#include "kernels.hpp"

namespace nybble::scalar {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed codes are read as little-endian words");

// One IEEE half as a float, without the help of the machine; subnormals, infinities and NaN included.
static inline float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
    const std::uint32_t rest = half & 0x7fffu;
    float value;
    if (rest >= 0x7c00u) {
        const std::uint32_t word = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
        __builtin_memcpy(&value, &word, 4);
        return value;
    }
    // The exponent and mantissa read as a float are 2**112 times too small; the product is exact, subnormals too.
    const std::uint32_t word = rest << 13;
    __builtin_memcpy(&value, &word, 4);
    value *= 5.192296858534828e33f;
    return sign != 0 ? -value : value;
}

struct Simd {
    static constexpr int W = 8;
    struct Float {
        float lane[W];
    };
    struct Int {
        std::uint32_t lane[W];
    };

    template <int B>
    static inline Int codes(const std::uint8_t* from) {
        std::uint64_t word;
        __builtin_memcpy(&word, from, 8);
        Int out;
        for (int i = 0; i < W; ++i) out.lane[i] = std::uint32_t(word >> (i * B)) & ((1u << B) - 1);
        return out;
    }

    template <int B, bool Affine>
    struct Map {
        const float* levels;
        std::int32_t shift;
        explicit Map(const Weight& w) : levels(w.levels), shift(w.shift) {}
        inline Float operator()(const Int& codes) const {
            Float out;
            for (int i = 0; i < W; ++i) {
                if constexpr (Affine)
                    out.lane[i] = float(std::int32_t(codes.lane[i]) + shift);
                else
                    out.lane[i] = levels[codes.lane[i]];
            }
            return out;
        }
    };

    static inline Float all(float v) {
        Float out;
        for (int i = 0; i < W; ++i) out.lane[i] = v;
        return out;
    }
    static inline Float load(const float* from) {
        Float out;
        __builtin_memcpy(out.lane, from, sizeof out.lane);
        return out;
    }
    static inline void store(float* to, const Float& v) { __builtin_memcpy(to, v.lane, sizeof v.lane); }
    static inline Float mul(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    static inline Float sub(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] -= b.lane[i];
        return a;
    }
    static inline Float add(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    static inline Float fma(const Float& a, const Float& b, Float c) {
#ifdef __FP_FAST_FMAF
        for (int i = 0; i < W; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
#else  // a call into the C library for each product would be far slower than two roundings
        for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
#endif
        return c;
    }
    static inline float fold(const Float& v) {
        float four[4];
        for (int i = 0; i < 4; ++i) four[i] = v.lane[i] + v.lane[i + 4];
        return (four[0] + four[2]) + (four[1] + four[3]);
    }
    static inline void halves(const std::uint16_t* from, std::size_t count, float* to) {
        for (std::size_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
    }
};

#include "body.hpp"

}  // namespace nybble::scalar

namespace nybble {
const Kernels kScalar = {"scalar", scalar::pack, scalar::unpack, scalar::decode_row, scalar::matmul, scalar::sum};
}
