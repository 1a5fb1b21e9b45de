// AVX2, FMA, F16C and AVX-VNNI. Compiled with those flags; cpu.cpp runs it only where the machine has them.
#include "kernels.hpp"

#include <immintrin.h>

#define NYBBLE_VNNI

namespace nybble::avx2vnni {

#include "lanes_avx2.hpp"
#include "simd_avx2.hpp"

}  // namespace nybble::avx2vnni

#define NYBBLE_ISA avx2vnni
#define NYBBLE_TABLE kAvx2Vnni
#include "table.hpp"
