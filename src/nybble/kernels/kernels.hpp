// What the instruction sets share: plain structs and one table of function pointers per instruction set.
//
// The bodies (body_*.hpp) are compiled once per instruction set (isa_*.cpp), each time into a namespace of its own and with
// its own compiler flags; cpu.cpp picks a table at run time. Files compiled with special flags include nothing from the
// C++ library that would leave an inline function behind: the linker could keep the AVX-512 copy of it for every caller,
// and the program would die on an older machine.
//
// Not here: argument checks (the modules do them before any kernel runs) and threads (threads.hpp).
#pragma once

#include "attention.hpp"
#include "layout.hpp"

#include <cstddef>
#include <cstdint>

namespace nybble {

// Bytes past the end of a row that a kernel may load (never use): rows nearer to the end of the buffer than this are
// copied to scratch first.
inline constexpr std::size_t kOverread = 64;
// Scales of a row are converted in runs of this many floats, the widest vector of all instruction sets.
inline constexpr std::size_t kPad = 16;

// A packed weight [rows, columns]; everything a kernel needs to turn codes into numbers.
struct Weight {
    const std::uint8_t* packed;      // [rows, row_bytes], a little-endian bit stream per row
    const std::uint8_t* packed_end;  // one past the last byte of the buffer
    const float* levels;             // [256], the 2**bits levels repeated until the table is full
    const void* scale;               // float or half [rows, blocks], or [1, 1]
    const void* offset;              // the same, or nullptr for 0
    std::size_t rows, columns, row_bytes;
    std::size_t block, blocks;  // columns a block, blocks a row
    std::size_t scale_stride;   // elements from row to row: blocks, or 0 for one value in all
    std::size_t offset_stride;
    int bits;
    bool scale_half, offset_half;
    bool shifted;  // value = scale * level + offset, not scale * (level - offset)
    bool affine;  // level[i] == i + shift exactly: a conversion instead of a table
    std::int32_t shift;
};

// Levels in ascending order: whole numbers one apart, or a table of at most sixteen, filled up with its last.
struct Levels {
    float at[16];       // of a table
    float between[16];  // midway between two of a table; infinite behind the last
    float lowest, highest;
    bool whole;
};

// How scales are searched; reference_search.py says what each part is for.
struct Search {
    Levels levels;
    std::size_t block, blocks;  // columns a block, blocks a run (at most 16)
    float low, high;            // multipliers
    bool shifted;
    const float* tries;  // [tries_count, 2]
    const float* dividers;
    std::size_t plains, tries_count, dividers_count;
};

// Where sixteen runs lie, and where what is found goes; lane i is run i.
struct SixteenRuns {
    const float* weight[16];
    const float* importance[16];  // all nullptr: all alike
    std::uint8_t* codes[16];      // nullptr: no such run, its weight is any other's
    std::uint16_t* d;             // half [16]
    std::uint16_t* dmin;
    std::int8_t* m;  // [16 blocks, 16 runs]
    std::int8_t* n;
};

// How ggml rounds blocks (reference_round.py).
enum class RoundBy { range, ends, away };

// One row of a weight as a file has it, and where its codes and what is stored with them go.
struct RoundRow {
    const void* from = nullptr;
    Holds holds = Holds::f32;
    std::size_t columns = 0, block = 0;
    int bits = 0;
    float* floats = nullptr;          // room for the row, where it is not floats
    std::uint8_t* codes = nullptr;
    std::uint16_t* halves = nullptr;  // scales as halves, or
    float* scale = nullptr;           // as floats
    std::uint8_t* zero = nullptr;     // nullptr: the middle
};

// Where sixteen blocks lie, and where their codes go; lane i is block i.
struct SixteenBlocks {
    const float* weight[16];
    std::uint8_t* codes[16];  // nullptr: no such block, its weight is any other's
    float* scale;             // [16], not rounded yet
    float* shift;
    std::size_t block;  // columns, at most 256
    int bits;
};

// How far ahead of its use a weight is asked for, in bytes.
inline constexpr std::size_t kAhead = 2048;
// Bytes of weights that stay near while groups of tokens pass over them.
inline constexpr std::size_t kKept = 131072;
struct Kernels {
    const char* name;
    void (*pack)(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows, std::size_t columns, int bits);
    void (*unpack)(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows, std::size_t columns, int bits);
    // Decodes one row to out[columns]. scratch: scratch_bytes(weight).
    void (*decode_row)(const Weight&, std::size_t row, float* out, void* scratch);
    std::uint64_t (*sum)(const std::uint64_t* words, std::size_t count);
    // The kernel layout: sixteen rows of packed codes to the lines of a tile (scratch: 16 * units * 32 bytes), and back to
    // codes [16, columns]; one row as floats.
    void (*tile_codes)(const std::uint8_t* const* rows, std::size_t columns, std::size_t units, int bits, std::uint8_t* to,
                       std::uint8_t* scratch);
    void (*untile_codes)(const Tiled&, std::size_t tile, std::uint8_t* to);
    void (*tiled_row)(const Tiled&, std::size_t row, float* to);
    // The largest magnitude of the scales of each row of a tile [16]; what is not finite counts as largest.
    void (*largest_scales)(const Tiled&, std::size_t tile, float* to);
    // What all fast products of w and x with one scratch share; once, before the first of them.
    void (*prepare)(const Tiled&, const Activations& x, void* scratch);
    // out for the rows of tiles [first, last) and every token of x. fast: integer products, of a scratch that was prepared
    // (product_scratch bytes).
    void (*product)(const Tiled&, const Activations& x, const Output& out, std::size_t first, std::size_t last, bool fast,
                    void* scratch);
    void (*quantize_row)(const float* x, std::size_t columns, const CodesOut& out);
    void (*norm_row)(const float* x, std::size_t columns, const NormOf& norm, float* y);
    std::size_t (*best_of)(const float* x, std::size_t count);
    void (*append)(const CacheHead& cache, std::size_t position, const float* key, const float* value);
    // The first `positions` positions of a cache, from a multiple of 16 on, as floats: for many queries.
    void (*widen_head)(const CacheHead& from, std::size_t first, std::size_t positions, const CacheHead& to);
    std::size_t (*attend_scratch)(std::size_t depth, std::size_t positions);
    void (*attend)(const Attend&, void* scratch);
    void (*activate_row)(float* x, std::size_t count, Activation kind);
    // Scales and codes of sixteen runs of weights.
    void (*search_runs)(const Search&, const SixteenRuns&);
    // The places in levels nearest to (weight - offset) / scale, for one row of blocks of search.block columns.
    void (*nearest_row)(const Levels& levels, const float* weight, std::size_t columns, std::size_t block, const float* scale,
                        const float* offset, std::uint8_t* codes);
    void (*round_sixteen)(const SixteenBlocks&, RoundBy rule);
    // Lowest and highest weight of every block of a row.
    void (*extremes_row)(const float* weight, std::size_t columns, std::size_t block, float* low, float* high);
    // rint(weight / scale) + zero (`middle` where there are none), cut off at 0 and top.
    void (*uniform_row)(const float* weight, std::size_t columns, std::size_t block, const float* scale, const float* zero,
                        double middle, double top, std::uint8_t* codes);
    bool (*round_row)(const RoundRow&);
};

// Scratch of a product with so many rows of x: corrections, and for panels some tiles unpacked to bytes.
inline std::size_t correction_bytes(const Tiled& w, std::size_t rows) {
    return ((rows + kPanel) * w.units * 2 * 8 + 63) / 64 * 64;
}
// Sums of integers that a row has.
inline std::size_t parts_of(const Tiled& w) { return (w.units * kUnit + w.part - 1) / w.part; }
// A tile unpacked to bytes, [units][8][64], and behind it its whole scales, [pairs of parts][16][2].
inline std::size_t unpacked_bytes(const Tiled& w) {
    return (w.units * kSteps + (w.steps == nullptr ? 0 : (parts_of(w) + 1) / 2)) * kLine;
}
inline std::size_t product_scratch(const Tiled& w, std::size_t rows) {
    const std::size_t tile = unpacked_bytes(w);
    return correction_bytes(w, rows) + (tile > kKept ? tile : kKept) + 64;
}

// What `prepare` left for one weight serves the other too.
inline bool prepared_alike(const Tiled& a, const Tiled& b) {
    return a.units == b.units && a.part == b.part && a.table == b.table && a.base == b.base &&
           (a.offset == nullptr) == (b.offset == nullptr) && (a.steps == nullptr) == (b.steps == nullptr);
}

extern const Kernels kScalar;
#ifdef NYBBLE_X86
extern const Kernels kAvx2;
extern const Kernels kAvx2Vnni;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
#endif

// Scratch a thread needs: scales and offsets of one row as floats, a padded copy of one row, its codes one a byte.
inline std::size_t scratch_bytes(const Weight& w) {
    const std::size_t parameters = (w.blocks + 2 * kPad) * sizeof(float);
    return 2 * ((parameters + 63) / 64 * 64) + (w.row_bytes + 2 * kOverread) / 64 * 64 +
           (w.columns + 2 * kOverread) / 64 * 64 + 64;
}

}  // namespace nybble
