// Numbers that break things, and the comparison to the bit; for neon.cpp and neon_operations.cpp.
#pragma once

#include "../../src/nybble/kernels/cpu.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace nybble {

inline std::mt19937 random_bits(7);
inline std::uint64_t digest = 14695981039346656037u;
inline std::size_t compared = 0;

inline std::size_t below(std::size_t count) { return random_bits() % count; }

inline float float_of(std::uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline std::uint32_t bits_of(float v) {  // any NaN as one
    std::uint32_t out;
    std::memcpy(&out, &v, 4);
    return v == v ? out : 0x7fc00000u;
}

inline float normal() { return (float(random_bits() >> 8) / 16777216.0f - 0.5f) * 4.0f; }

// A number that conversions, comparisons or roundings may get wrong.
inline float hostile() {
    static const std::uint32_t some[] = {
        0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x00000001, 0x80000001,
        0x007fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x4f000000, 0xcf000000, 0x4effffff, 0xcf000001, 0x3f000000, 0xbf000000,
        0x3fc00000, 0x40200000, 0xbfc00000, 0x42fd0000, 0x42ff0000, 0x43000000, 0x43008000, 0xc3008000, 0x477fe000, 0x477fefff,
        0x477ff000, 0xc77ff000, 0x33800000, 0x33000000, 0x33000001, 0x33c00000, 0x32ffffff, 0x38800000, 0x387fffff, 0x387fe000,
        0x387fdfff, 0x387ff000, 0x3f801000, 0x3f803000, 0x3f801001, 0x42b17218, 0xc2aeac50, 0x0da24260, 0x0da2425f, 0x4b000001};
    switch (below(4)) {
        case 0: return float_of(std::uint32_t(random_bits()));
        case 1: return normal();
        default: return float_of(some[below(sizeof some / sizeof *some)]);
    }
}

inline std::int32_t hostile_whole() {
    static const std::int32_t some[] = {0, 1, -1, 127, 128, -127, -128, -129, 255, 256,
                                        32767, 32768, -32769, 16777217, 33554433, INT32_MAX, INT32_MIN};
    return below(2) == 0 ? std::int32_t(random_bits()) : some[below(sizeof some / sizeof *some)];
}

[[noreturn]] inline void fail(const std::string& what, const char* name, std::size_t at) {
    std::fprintf(stderr, "neon: %s of %s differs at %zu\n", what.c_str(), name, at);
    std::exit(1);
}

inline void note(const void* from, std::size_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(from);
    for (std::size_t i = 0; i < bytes; ++i) digest = (digest ^ at[i]) * 1099511628211u;
}

// Results of plain C++ go to the digest; those of `name` must be the same.
template <class T>
void same(const std::string& what, const char* name, const std::vector<T>& wanted, const std::vector<T>& got) {
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        bool right;
        if constexpr (std::is_same_v<T, float>)
            right = bits_of(wanted[i]) == bits_of(got[i]);
        else
            right = wanted[i] == got[i];
        if (!right) fail(what, name, i);
    }
    compared += wanted.size();
}

template <class T>
void note(const std::vector<T>& values) {
    for (const T v : values) {
        if constexpr (std::is_same_v<T, float>) {
            const std::uint32_t bits = bits_of(v);
            note(&bits, 4);
        } else {
            note(&v, sizeof v);
        }
    }
}

// f(kernels) gives a vector: the same for every instruction set.
template <class F>
void with_each(const std::string& what, F f) {
    const auto wanted = f(kScalar);
    note(wanted);
    for (const Kernels* k : usable())
        if (k != &kScalar) same(what, k->name, wanted, f(*k));
}

std::uint16_t half(float v);  // the nearest half, by plain C++
void operations();             // compares every operation on sixteen lanes

}  // namespace nybble
