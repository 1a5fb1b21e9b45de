// The portable kernels: plain C++, which compilers turn into SSE2 or NEON where they can.
#include "kernels.hpp"

namespace nybble::scalar {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed codes are read as little-endian words");

static inline float float_of(std::uint32_t word) {
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
}

// One IEEE half as a float, without the help of the machine; subnormals, infinities and NaN included.
static inline float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
    const std::uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // The exponent and mantissa read as a float are 2**112 times too small; the product is exact, subnormals too.
    const float value = float_of(rest << 13) * 5.192296858534828e33f;
    return sign != 0 ? -value : value;
}

// The nearest half, ties to even; too large gives infinity, NaN stays NaN.
static inline std::uint16_t float_to_half(float value) {
    std::uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    const std::uint32_t sign = (word >> 16) & 0x8000u, size = word & 0x7fffffffu;
    if (size > 0x7f800000u) return std::uint16_t(sign | 0x7e00u | ((size >> 13) & 0x3ffu));
    if (size >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // from 65520 on
    if (size < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2**-24 in the low bits
        const float rounded = float_of(size) + 0.5f;
        std::uint32_t bits;
        __builtin_memcpy(&bits, &rounded, 4);
        return std::uint16_t(sign | (bits - 0x3f000000u));
    }
    const std::uint32_t odd = (size >> 13) & 1u;
    return std::uint16_t(sign | ((size - 0x38000000u + 0xfffu + odd) >> 13));
}

#include "lanes_scalar.hpp"
#include "simd_scalar.hpp"

}  // namespace nybble::scalar

#define NYBBLE_ISA scalar
#define NYBBLE_TABLE kScalar
#include "table.hpp"
