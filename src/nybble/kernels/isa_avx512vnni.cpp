// AVX-512 F, BW, VL, DQ and VNNI. Compiled with those flags; cpu.cpp runs it only where the machine has them.
#include "kernels.hpp"

#include <immintrin.h>

#define NYBBLE_VNNI

namespace nybble::avx512vnni {

#include "lanes_avx512.hpp"
#include "simd_avx512.hpp"

}  // namespace nybble::avx512vnni

#define NYBBLE_ISA avx512vnni
#define NYBBLE_TABLE kAvx512Vnni
#include "table.hpp"
