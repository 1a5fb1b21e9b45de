// NEON with the dot product of bytes. Compiled with that flag; cpu.cpp runs it only where the machine has it.
#include "kernels.hpp"

#include <arm_neon.h>

#define NYBBLE_DOT

namespace nybble::neondot {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed codes are read as little-endian words");

#include "lanes_neon.hpp"
#include "simd_scalar.hpp"

}  // namespace nybble::neondot

#define NYBBLE_ISA neondot
#define NYBBLE_TABLE kNeonDot
#include "table.hpp"
