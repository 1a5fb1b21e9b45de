// AVX2, FMA and F16C. Compiled with those flags; cpu.cpp runs it only where the machine has them.
#include "kernels.hpp"

#include <immintrin.h>

namespace nybble::avx2 {

#include "lanes_avx2.hpp"
#include "simd_avx2.hpp"

}  // namespace nybble::avx2

#define NYBBLE_ISA avx2
#define NYBBLE_TABLE kAvx2
#include "table.hpp"
