// NEON, which every 64-bit ARM machine has.
#include "kernels.hpp"

#include <arm_neon.h>

namespace nybble::neon {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed codes are read as little-endian words");

#include "lanes_neon.hpp"
#include "simd_scalar.hpp"

}  // namespace nybble::neon

#define NYBBLE_ISA neon
#define NYBBLE_TABLE kNeon
#include "table.hpp"
