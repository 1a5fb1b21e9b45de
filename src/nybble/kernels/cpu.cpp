#include "cpu.hpp"

#include <atomic>

#ifdef NYBBLE_X86
#include <cpuid.h>
#endif
#if defined(NYBBLE_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace nybble {

#ifdef NYBBLE_ARM64
extern const Kernels kNeon;
extern const Kernels kNeonDot;
#endif

namespace {

#ifdef NYBBLE_X86
// The flags of the processor and whether the system saves the wide registers, straight from the machine: the compiler's
// own __builtin_cpu_supports needs a run-time library that not every compiler ships.
struct Machine {
    bool avx2 = false, avx2vnni = false, avx512 = false, avx512vnni = false;
    Machine() {
        unsigned a, b, c, d;
        if (__get_cpuid(1, &a, &b, &c, &d) == 0) return;
        const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
        if (!osxsave || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
        const unsigned leaves = a;
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
        avx2 = ymm && fma && f16c && (b >> 5 & 1);
        avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
        avx512vnni = avx512 && (c >> 11 & 1);
        if (avx2 && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) avx2vnni = a >> 4 & 1;
    }
};
#endif

#ifdef NYBBLE_ARM64
// The dot product of bytes: every Apple machine has it; Linux tells; where nobody tells, plain NEON serves.
bool has_dot() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP, which old headers do not name
#else
    return false;
#endif
}
#endif

std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> out = {&kScalar};
#ifdef NYBBLE_X86
    const Machine machine;
    if (machine.avx2) out.push_back(&kAvx2);
    if (machine.avx2vnni) out.push_back(&kAvx2Vnni);
    if (machine.avx512) out.push_back(&kAvx512);
    if (machine.avx512vnni) out.push_back(&kAvx512Vnni);
#endif
#ifdef NYBBLE_ARM64
    out.push_back(&kNeon);
    if (has_dot()) out.push_back(&kNeonDot);
#endif
    return out;
}

const Kernels& kernels() {
    const Kernels* now = active.load(std::memory_order_relaxed);
    if (now == nullptr) active = now = usable().back();
    return *now;
}

bool select(const std::string& name) {
    for (const Kernels* k : usable())
        if (name == k->name) {
            active = k;
            return true;
        }
    return false;
}

}  // namespace nybble
