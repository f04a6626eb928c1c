// Asks CPUID and XGETBV (x86-64), the auxiliary vector (Linux arm64) or sysctl (macOS arm64).
#include "features.hpp"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#include <sys/types.h>
#endif

namespace engineroom {

#if defined(__x86_64__) || defined(_M_X64)

namespace {

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros where the processor does not know the leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Registers{};
    return r;
}

// Which register states the operating system saves. Call only where OSXSAVE is set.
std::uint64_t xgetbv0() {
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool bit(std::uint32_t word, int i) { return (word >> i) & 1; }

// Whether this process may use the tile registers: Linux gives it their 8 KB a thread on request.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

std::vector<CpuFeature> cpu_features() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    const std::uint64_t saved = bit(one.ecx, 27) ? xgetbv0() : 0;
    const bool ymm = (saved & 0x6) == 0x6;               // SSE and AVX state
    const bool zmm = ymm && (saved & 0xe0) == 0xe0;      // mask registers, both ZMM halves
    const bool tiles = (saved & 0x60000) == 0x60000 &&   // AMX configuration and data
                       bit(seven.edx, 24) && tiles_granted();
    const bool avx512f = zmm && bit(seven.ebx, 16);
    return {
        {"sse4_2", bit(one.ecx, 20)},
        {"avx", ymm && bit(one.ecx, 28)},
        {"f16c", ymm && bit(one.ecx, 29)},
        {"fma", ymm && bit(one.ecx, 12)},
        {"avx2", ymm && bit(seven.ebx, 5)},
        {"avx_vnni", ymm && bit(seven_one.eax, 4)},
        {"avx512f", avx512f},
        {"avx512bw", avx512f && bit(seven.ebx, 30)},
        {"avx512dq", avx512f && bit(seven.ebx, 17)},
        {"avx512vl", avx512f && bit(seven.ebx, 31)},
        {"avx512_vnni", avx512f && bit(seven.ecx, 11)},
        {"avx512_bf16", avx512f && bit(seven_one.eax, 5)},
        {"avx512_fp16", avx512f && bit(seven.edx, 23)},
        {"amx_tile", tiles},
        {"amx_bf16", tiles && bit(seven.edx, 22)},
        {"amx_int8", tiles && bit(seven.edx, 25)},
    };
}

#elif defined(__aarch64__) && defined(__linux__)

// Bit numbers of AT_HWCAP and AT_HWCAP2 (Linux, arch/arm64/include/uapi/asm/hwcap.h), written out
// because older system headers lack the newer names.
std::vector<CpuFeature> cpu_features() {
    const unsigned long caps = getauxval(AT_HWCAP), caps2 = getauxval(AT_HWCAP2);
    const auto bit = [](unsigned long word, int i) { return ((word >> i) & 1) != 0; };
    return {
        {"neon", bit(caps, 1)},   {"fp16", bit(caps, 10)}, {"dotprod", bit(caps, 20)},
        {"i8mm", bit(caps2, 13)}, {"bf16", bit(caps2, 14)}, {"sve", bit(caps, 22)},
        {"sve2", bit(caps2, 1)},
    };
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {

bool has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

}  // namespace

std::vector<CpuFeature> cpu_features() {
    return {
        {"neon", true},  // part of every arm64
        {"fp16", has("hw.optional.arm.FEAT_FP16")},
        {"dotprod", has("hw.optional.arm.FEAT_DotProd")},
        {"i8mm", has("hw.optional.arm.FEAT_I8MM")},
        {"bf16", has("hw.optional.arm.FEAT_BF16")},
        {"sme", has("hw.optional.arm.FEAT_SME")},
    };
}

#else

std::vector<CpuFeature> cpu_features() { return {}; }

#endif

}  // namespace engineroom
