// The kernel layout of a weight, and what else the product kernels share. Private: no file ever holds it.
//
// A weight [N, K] is cut into tiles of 16 rows and units of 32 columns; rows and columns are filled up with zeros. A line is
// 64 bytes: for row r of the tile four bytes at 4 r, one for each of four columns that follow each other. So one register
// holds four columns of sixteen rows, a lane belongs to a row, and a product needs no sum across lanes.
//
// A unit of codes with B bits takes B lines, in planes of 4, 2 and 1 bits (8 bits: one plane of bytes). A step is four
// columns; the eight steps of a unit lie in the planes so:
//
//     byte plane     line s               step s                          (B = 8)
//     nibble plane   line s / 2           low nibble: even s, high: odd s (B = 4 to 7)
//     pair plane     line s / 4           bits 2 (s % 4)                  (B = 2, 3, 6, 7; above the nibble)
//     single plane   one line             bit s                           (B = 1, 3, 5, 7; above the others)
//
// Float weights (f32, f16, bf16) are [tiles][K][16]: column after column, sixteen rows side by side.
//
// The value of a code is scale * level + shift: level = code - base (integers), or a table of sixteen. Scales and shifts
// are [tiles][blocks][16], half or float; a block is 16 columns, a multiple of 32, or the row. Files store zero points as
// codes; layouts keep those (offset_is_zero) and make shift = -scale * zero on the way. Where the scales of some blocks are
// small whole numbers of one half (ggml's runs of 256 columns), both are kept as they are: see Nested.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

inline constexpr std::size_t kRows = 16;   // rows of a tile
inline constexpr std::size_t kUnit = 32;   // columns of a unit
inline constexpr std::size_t kBlock = 64;  // columns of a block of quantized activations
inline constexpr std::size_t kSteps = 8;   // steps of a unit
inline constexpr std::size_t kLine = 64;   // bytes of a line

enum class Holds : std::uint8_t { codes, f32, f16, bf16 };

// Scales or shifts that are outer * (code - bias), the product in float: codes [tiles][blocks][16], outer [tiles][count][16],
// one outer half for 2**shift blocks.
struct Nested {
    const std::uint8_t* codes = nullptr;  // nullptr: not nested
    const std::uint16_t* outer = nullptr;
    std::int32_t bias = 0;
    unsigned shift = 0;
    std::size_t count = 0;
};

struct Tiled {
    Holds holds = Holds::codes;
    int bits = 0;
    bool table = false;           // levels from `levels`, not code - base
    bool scale_half = false;
    bool offset_half = false;
    bool offset_is_zero = false;  // offset is a zero point in codes; else a shift in values
    std::size_t part = 32;        // columns whose products are summed before a scale meets them: 16, 32 or 64
    std::int32_t base = 0;
    std::size_t rows = 0, columns = 0;
    std::size_t tiles = 0, units = 0, blocks = 0;
    std::size_t block = 0;        // columns a block
    const std::uint8_t* data = nullptr;
    std::size_t tile_bytes = 0;
    const void* scale = nullptr;
    const void* offset = nullptr;  // nullptr: none
    Nested nested_scale, nested_offset;  // in the place of what scale and offset point at, which then are the codes
    const std::uint8_t* steps = nullptr;  // [tiles][16]: of whole scales (body_product.hpp), the exponents of steps as floats have them
    float levels[16] = {};         // float levels of a table
    std::uint8_t bytes[16] = {};   // the same as bytes: level is about (byte - 128) * byte_step
    float byte_step = 1.0f;
};

// x [M, K] for the products, filled up with zeros. Which of the two forms is there depends on the mode.
//
// Codes of up to four rows lie row by row; those of more in panels of eight rows, [panels][stride / 4][8][4]: the four codes
// of a step for eight rows side by side, so that one pointer reaches all. Scales and sums are [panels][..][8] likewise.
struct Activations {
    std::size_t count = 0;             // M
    std::size_t stride = 0;            // values from row to row, a multiple of 64
    const float* values = nullptr;     // [M, stride]
    const std::int8_t* codes = nullptr;  // [M, stride]
    const float* scale = nullptr;      // [M, stride / 64]
    const std::int32_t* sums = nullptr;  // [M, stride / 16]: sums of sixteen codes each
};

inline constexpr std::size_t kPanel = 8;
inline bool in_panels(std::size_t rows) { return rows > 4; }

// Where the codes of one row go.
struct CodesOut {
    std::int8_t* codes;
    float* scale;
    std::int32_t* sums;
    std::size_t apart;  // rows side by side: 1, or 8 in a panel
    // Row m of `rows` of the arrays that Activations describes.
    CodesOut(std::int8_t* c, float* f, std::int32_t* s, std::size_t stride, std::size_t rows, std::size_t m)
        : codes(c + m * stride), scale(f + m * (stride / kBlock)), sums(s + m * (stride / 16)), apart(1) {
        if (!in_panels(rows)) return;
        const std::size_t panel = m / kPanel * kPanel, lane = m % kPanel;
        codes = c + panel * stride + 4 * lane;
        scale = f + panel * (stride / kBlock) + lane;
        sums = s + panel * (stride / 16) + lane;
        apart = kPanel;
    }
};

enum class Activation : std::uint8_t { none, gelu, gelu_tanh, gelu_quick, silu, relu };

// What becomes of the rows that a product gives.
struct Output {
    float* to = nullptr;          // [M, stride]
    std::size_t stride = 0;
    const float* bias = nullptr;  // [tiles * 16], zeros behind the last row
    Activation activation = Activation::none;
    bool add = false;             // to += instead of to =
    bool times = false;           // to *= instead of to =: the second half of a gated layer
    float scale = 1.0f;           // of the product, before the bias
};

}  // namespace nybble
