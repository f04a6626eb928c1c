// What the machine can do at this moment: read bandwidth and the peak of its dot instructions. The
// figures that `engineroom bench` sets beside a kernel's are measured by these, in the same run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "features.hpp"
#include "pack.hpp"
#include "pages.hpp"
#include "pool.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace engineroom {
namespace {

using Clock = std::chrono::steady_clock;

// The fastest of `repeats` runs of body(thread) on all threads, in seconds: a moment without anybody
// else is what is looked for.
template <class Body>
double fastest(Pool &pool, int repeats, Body body) {
    double best = 0;
    for (int i = 0; i < std::max(1, repeats); ++i) {
        Clock::time_point begin;
        double took = 0;
        pool.run([&](int thread) {
            pool.barrier();  // every thread is awake
            if (thread == 0) begin = Clock::now();
            body(thread);
            pool.barrier();
            if (thread == 0)
                took = std::chrono::duration<double>(Clock::now() - begin).count();
        });
        if (i == 0 || took < best) best = took;
    }
    return best;
}

// Bytes a second of `num_bytes` read once by all threads together, each its own part.
double probe_read(Pool &pool, std::size_t num_bytes, int repeats) {
    constexpr std::size_t kWords = 32, kStep = kWords * sizeof(std::uint64_t);
    const std::size_t threads = static_cast<std::size_t>(pool.size());
    const std::size_t steps = num_bytes / threads / kStep;
    if (steps == 0) throw std::invalid_argument("num_bytes must be at least 256 a thread");
    const std::size_t words = steps * kWords;
    const Pages pages(words * threads * sizeof(std::uint64_t));  // as packed weights have them
    std::uint64_t *memory = reinterpret_cast<std::uint64_t *>(pages.data());
    pool.run([&](int thread) {  // each thread touches its own first: its pages lie near it
        std::memset(memory + words * static_cast<std::size_t>(thread), 1, words * 8);
    });
    std::atomic<std::uint64_t> kept{0};  // so that no compiler leaves the reads out
    const double seconds = fastest(pool, repeats, [&](int thread) {
        const std::uint64_t *from = memory + words * static_cast<std::size_t>(thread);
        std::uint64_t sums[kWords] = {};
        for (std::size_t i = 0; i < words; i += kWords) {
            for (std::size_t j = 0; j < kWords; j += 8) __builtin_prefetch(from + i + j + 384);
            for (std::size_t j = 0; j < kWords; ++j) sums[j] ^= from[i + j];
        }
        std::uint64_t all = 0;
        for (std::uint64_t sum : sums) all ^= sum;
        kept.fetch_xor(all, std::memory_order_relaxed);
    });
    return static_cast<double>(steps * kStep * threads) / seconds;
}

constexpr long kRounds = 100000;  // of twelve instructions: a millisecond or less

// Twelve independent accumulators hide an instruction's latency. They are named one by one: an array
// of them would live on the stack, at half the peak.
#if defined(__x86_64__)
#define ER_TWELVE(DO) \
    DO(c0) DO(c1) DO(c2) DO(c3) DO(c4) DO(c5) DO(c6) DO(c7) DO(c8) DO(c9) DO(ca) DO(cb)
#define ER_KEEP(c) asm volatile("" ::"v"(c));
#define ER_DOTS(NAME, TARGET, TYPE, ZERO, ONES, INSTRUCTION)            \
    __attribute__((target(TARGET))) void NAME() {                       \
        const TYPE a = ONES, b = a, zero = ZERO;                        \
        ER_TWELVE(ER_DECLARE)                                           \
        for (long i = 0; i < kRounds; ++i) {                            \
            ER_TWELVE(INSTRUCTION)                                      \
        }                                                               \
        ER_TWELVE(ER_KEEP)                                              \
    }
#define ER_DECLARE(c) auto c = zero;
#define ER_INT8(c) asm volatile("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#define ER_BF16(c) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#define ER_F32(c) asm volatile("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));

ER_DOTS(int8_wide, "avx512f,avx512bw,avx512vnni", __m512i, _mm512_setzero_si512(),
        _mm512_set1_epi32(0x01010101), ER_INT8)
ER_DOTS(bf16_wide, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
        _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)), ER_BF16)
ER_DOTS(f32_wide, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(1), ER_F32)
#undef ER_KEEP
#define ER_KEEP(c) asm volatile("" ::"x"(c));
#undef ER_F32
#define ER_F32(c) asm volatile("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
ER_DOTS(f32_narrow, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(1), ER_F32)
#endif

struct Peak {
    const char *kind;
    const char *feature;  // that the processor must have
    void (*run)();
    double operations;  // of one instruction; a multiplication and an addition are two
};

// Those of one kind come widest first.
const Peak kPeaks[] = {
#if defined(__x86_64__)
    {"int8", "avx512_vnni", int8_wide, 128},
    {"bf16", "avx512_bf16", bf16_wide, 64},
    {"f32", "avx512f", f32_wide, 32},
    {"f32", "fma", f32_narrow, 16},
#endif
    {nullptr, nullptr, nullptr, 0},
};

bool has(const char *feature) {
    for (const CpuFeature &found : cpu_features())
        if (std::strcmp(found.name, feature) == 0) return found.usable;
    return false;
}

double probe_dots(Pool &pool, const std::string &kind, int repeats) {
    if (kind != "int8" && kind != "bf16" && kind != "f32")
        throw std::invalid_argument("unknown kind '" + kind + "'; known: int8, bf16, f32");
    for (const Peak *peak = kPeaks; peak->kind != nullptr; ++peak) {
        if (kind != peak->kind || !has(peak->feature)) continue;
        const double seconds = fastest(pool, repeats, [&](int) { peak->run(); });
        return peak->operations * 12 * kRounds * pool.size() / seconds;
    }
    return 0;
}

}  // namespace

void register_probe(nb::module_ &m) {
    m.def("probe_read",
          [](const std::shared_ptr<Pool> &pool, std::size_t num_bytes, int repeats) {
              nb::gil_scoped_release unlocked;
              return probe_read(*pool, num_bytes, repeats);
          },
          nb::arg("pool"), nb::arg("num_bytes"), nb::arg("repeats") = 8,
          "Bytes a second that the pool's threads read together.");
    m.def("probe_dots",
          [](const std::shared_ptr<Pool> &pool, const std::string &kind, int repeats) {
              nb::gil_scoped_release unlocked;
              return probe_dots(*pool, kind, repeats);
          },
          nb::arg("pool"), nb::arg("kind"), nb::arg("repeats") = 10,
          "Operations a second of dot instructions, 0 where this processor has none known here.");
}

}  // namespace engineroom
