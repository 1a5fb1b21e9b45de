// What the instruction sets share: plain structs and one table of function pointers per instruction set.
//
// body.hpp is compiled once per instruction set (scalar.cpp, avx2.cpp, avx512.cpp), each time into a namespace of its
// own and with its own compiler flags; module.cpp picks a table at run time. Files compiled with special flags include
// nothing from the C++ library that would leave an inline function behind: the linker could keep the AVX-512 copy of it
// for every caller, and the program would die on an older machine.
//
// Not here: argument checks (module.cpp does them before any kernel runs) and threads (threads.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

// Bytes past the end of a row that a kernel may load (never use): rows nearer to the end of the buffer than this are
// copied to scratch first.
inline constexpr std::size_t kOverread = 64;
// Blocks of x are padded with zeros to a multiple of this many floats, the widest vector of all instruction sets.
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
    bool affine;  // level[i] == i + shift exactly: a conversion instead of a table
    std::int32_t shift;
};

// x [M, K] laid out for the kernels: [M, blocks, padded], zeros in the padding, 64-byte aligned.
struct Activations {
    const float* values;
    const float* sums;   // [M, blocks], the sum of x over each block; read only when there are offsets
    std::size_t count;   // M
    std::size_t padded;  // floats a block
};

struct Kernels {
    const char* name;
    void (*pack)(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows, std::size_t columns, int bits);
    void (*unpack)(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows, std::size_t columns, int bits);
    // Decodes one row to out[columns]. scratch: scratch_bytes(weight).
    void (*decode_row)(const Weight&, std::size_t row, float* out, void* scratch);
    // y[m * rows + n] for n in [first, last) and every m.
    void (*matmul)(const Weight&, const Activations&, float* y, std::size_t first, std::size_t last, void* scratch);
    std::uint64_t (*sum)(const std::uint64_t* words, std::size_t count);
};

extern const Kernels kScalar;
#ifdef NYBBLE_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Scratch a thread needs: scales and offsets of one row as floats, a padded copy of one row, its codes one a byte.
inline std::size_t scratch_bytes(const Weight& w) {
    const std::size_t parameters = (w.blocks + 2 * kPad) * sizeof(float);
    return 2 * ((parameters + 63) / 64 * 64) + (w.row_bytes + 2 * kOverread) / 64 * 64 +
           (w.columns + 2 * kOverread) / 64 * 64 + 64;
}

}  // namespace nybble
