// What attention needs to know: the shape of a layer's cache and of one task. Private to kernels and engine.
//
// The cache of one layer, sequence and key-value head holds `capacity` positions of `depth` values (the head's dimensions
// filled up to a multiple of 16, of 32 in four bits). Keys lie in tiles of sixteen positions, [tiles][depth][16], so that
// one register holds one dimension of sixteen positions; values lie row after row, [capacity][depth].
//
//     f32, f16   as they are
//     int16      codes as shorts, with a float scale for each key and value. Keys: [tiles][depth/2][16][2], so that one
//                register holds two dimensions of sixteen positions; values: [capacity/2][depth][2], two positions side by
//                side. Whole numbers are multiplied with them: body_shorts.hpp
//     int8       codes + 128 as bytes; a half scale for 32 dimensions (16 where depth is no multiple of 32) of a position
//     int4       codes + 8 as nibbles; a half scale for 32 dimensions. Keys: byte [depth/2][16], dimension 2 i low and
//                2 i + 1 high. Values: byte j of a group of 32 holds value j low and j + 16 high
//
// Scales of int8 and int4 are absmax / 127 (7) rounded up to half, as formats/ rounds them; codes round to nearest, ties to
// even.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

enum class CacheType : std::uint8_t { f32, f16, int16, int8, int4 };

struct CacheShape {
    CacheType type = CacheType::f16;
    std::size_t capacity = 0;  // positions, a multiple of 16
    std::size_t depth = 0;
    std::size_t group() const { return depth % 32 == 0 ? 32 : 16; }
    std::size_t code_bytes() const {  // of all keys (or values) of one head
        const std::size_t values = capacity * depth;
        switch (type) {
            case CacheType::f32: return 4 * values;
            case CacheType::f16:
            case CacheType::int16: return 2 * values;
            case CacheType::int8: return values;
            default: return values / 2;
        }
    }
    std::size_t scale_bytes() const {
        if (type == CacheType::int16) return capacity * sizeof(float);
        return type == CacheType::int8 || type == CacheType::int4 ? capacity * (depth / group()) * 2 : 0;
    }
    bool widens() const { return type != CacheType::f32 && type != CacheType::int16; }  // to floats, for many queries
    std::size_t head_bytes() const { return 2 * (code_bytes() + scale_bytes()); }
};

// One head's part of a cache; keys, key scales, values, value scales follow each other at `base`.
struct CacheHead {
    const CacheShape* shape;
    std::uint8_t* base;
    std::uint8_t* keys() const { return base; }
    std::uint8_t* values() const { return base + shape->code_bytes(); }
    std::uint8_t* key_scales() const { return base + 2 * shape->code_bytes(); }
    std::uint8_t* value_scales() const { return key_scales() + shape->scale_bytes(); }
};

inline constexpr std::size_t kQueries = 8;  // queries that meet one head's cache together

// Up to eight queries against one head of one sequence.
struct Attend {
    CacheHead cache;
    std::size_t count;                // of queries, 1 to 8
    const float* queries[kQueries];   // [dimensions], not scaled
    float* out[kQueries];             // [dimensions]
    std::size_t first[kQueries];      // positions [first, last) are seen
    std::size_t last[kQueries];
    std::size_t dimensions;
    float scale;
    float cap;                        // scores become cap * tanh(score / cap); 0: not
};

struct NormOf {
    bool centred;       // subtract the mean
    float eps;
    const float* gain;  // nullptr: 1
    const float* bias;  // nullptr: 0
};

}  // namespace nybble
