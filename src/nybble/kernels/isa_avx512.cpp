// AVX-512 F, BW, VL and DQ. Compiled with those flags; cpu.cpp runs it only where the machine has them.
#include "kernels.hpp"

#include <immintrin.h>

namespace nybble::avx512 {

#include "lanes_avx512.hpp"
#include "simd_avx512.hpp"

}  // namespace nybble::avx512

#define NYBBLE_ISA avx512
#define NYBBLE_TABLE kAvx512
#include "table.hpp"
