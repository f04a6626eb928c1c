// What the machine can do at this moment: barrier latency, read bandwidth, int8 and bf16 dot peaks.
// Prints one JSON object. A peak that this processor has no instruction for is null.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

using Clock = std::chrono::steady_clock;
static double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A counter and a phase: what the threads of an engine pay at each meeting. Its latency tells whether
// the cores share a cache, so its form (and the pause) must stay for figures to be comparable.
struct Barrier {
  explicit Barrier(int n) : threads(n) {}
  void wait() {
    int turn = phase.load();
    if (arrived.fetch_add(1) + 1 == threads) {
      arrived.store(0);
      phase.store(turn + 1);
    } else {
      while (phase.load(std::memory_order_acquire) == turn) relax();
    }
  }
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  const int threads;
  std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> phase{0};
};

// Thread i stays on the i-th processor that this process may use.
static void pin(int me) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  int seen = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed) && seen++ == me) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
#endif
  (void)me;
}

template <class F> static void together(int threads, F body) {
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; i++)
    pool.emplace_back([&body, i] {
      pin(i);
      body(i);
    });
  for (auto& t : pool) t.join();
}

// Many short tries, of which the best counts: a moment without anybody else is what is looked for.
static double barrier_ns(int threads) {
  Barrier barrier(threads);
  double best = 1e18;
  for (int repeat = 0; repeat < 40; repeat++) {
    const int rounds = 2500;
    double took = 0;
    together(threads, [&](int me) {
      for (int i = 0; i < 100; i++) barrier.wait();
      auto start = Clock::now();
      for (int i = 0; i < rounds; i++) barrier.wait();
      if (me == 0) took = seconds_since(start);
    });
    if (took / rounds * 1e9 < best) best = took / rounds * 1e9;
  }
  return best;
}

static volatile uint64_t sink;

static double read_gbs(int threads) {
  const size_t huge = size_t(2) << 20, bytes = size_t(192) << 20;  // well above the last-level cache
  char* memory = static_cast<char*>(std::aligned_alloc(huge, bytes));
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 1, bytes);
  Barrier barrier(threads);
  double best = 0;
  for (int repeat = 0; repeat < 12; repeat++) {
    double took = 0;
    together(threads, [&](int me) {
      const uint64_t* from = reinterpret_cast<uint64_t*>(memory + bytes / threads / 64 * 64 * me);
      const size_t count = bytes / threads / 8 / 32 * 32;
      barrier.wait();
      auto start = Clock::now();
      uint64_t sums[32] = {};
      for (size_t i = 0; i < count; i += 32) {
        for (int j = 0; j < 32; j += 8) __builtin_prefetch(from + i + j + 384);
        for (int j = 0; j < 32; j++) sums[j] ^= from[i + j];
      }
      uint64_t total = 0;
      for (uint64_t s : sums) total ^= s;
      sink = total;
      barrier.wait();
      if (me == 0) took = seconds_since(start);
    });
    double rate = bytes / took / 1e9;
    if (rate > best) best = rate;
  }
  std::free(memory);
  return best;
}

// Twelve independent accumulators hide the latency of a dot instruction; 0 where it is missing.
template <class F> static double peak(int threads, double ops_per_call, F dots) {
  Barrier barrier(threads);
  double best = 0;
  for (int repeat = 0; repeat < 15; repeat++) {
    const long rounds = 100000;
    double took = 0;
    together(threads, [&](int me) {
      barrier.wait();
      auto start = Clock::now();
      dots(rounds);
      barrier.wait();
      if (me == 0) took = seconds_since(start);
    });
    double rate = ops_per_call * rounds * threads / took / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}

// The accumulators are named one by one: an array of them would live on the stack, at half the peak.
#define TWELVE(DO) DO(c0) DO(c1) DO(c2) DO(c3) DO(c4) DO(c5) DO(c6) DO(c7) DO(c8) DO(c9) DO(ca) DO(cb)
#define DECLARE(c) auto c = zero;
#define KEEP(c) asm volatile("" ::"v"(c));
#if defined(__AVX512VNNI__)
#define DOT8(c) asm volatile("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
static void int8_dots(long rounds) {
  const __m512i a = _mm512_set1_epi8(1), b = a, zero = _mm512_setzero_si512();
  TWELVE(DECLARE)
  for (long i = 0; i < rounds; i++) {
    TWELVE(DOT8)
  }
  TWELVE(KEEP)
}
#elif defined(__AVXVNNI__)
#define DOT8(c) asm volatile("{vex} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
static void int8_dots(long rounds) {
  const __m256i a = _mm256_set1_epi8(1), b = a, zero = _mm256_setzero_si256();
  TWELVE(DECLARE)
  for (long i = 0; i < rounds; i++) {
    TWELVE(DOT8)
  }
  TWELVE(KEEP)
}
#endif
#if defined(__AVX512BF16__)
#define DOT16(c) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
static void bf16_dots(long rounds) {
  const __m512i a = _mm512_set1_epi32(0x3f803f80), b = a;
  const __m512 zero = _mm512_setzero_ps();
  TWELVE(DECLARE)
  for (long i = 0; i < rounds; i++) {
    TWELVE(DOT16)
  }
  TWELVE(KEEP)
}
#endif

static void show(const char* name, double value, const char* end) {
  if (value > 0)
    std::printf("\"%s\": %.1f%s", name, value, end);
  else
    std::printf("\"%s\": null%s", name, end);
}

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  if (threads < 1) threads = 1;
  double int8 = 0, bf16 = 0;
#if defined(__AVX512VNNI__)
  int8 = peak(threads, 12 * 64 * 2, int8_dots);
#elif defined(__AVXVNNI__)
  int8 = peak(threads, 12 * 32 * 2, int8_dots);
#endif
#if defined(__AVX512BF16__)
  bf16 = peak(threads, 12 * 32 * 2, bf16_dots);
#endif
  std::printf("{\"threads\": %d, ", threads);
  show("barrier_ns", barrier_ns(threads), ", ");
  show("read_gbs", read_gbs(threads), ", ");
  show("int8_gops", int8, ", ");
  show("bf16_gflops", bf16, "}\n");
  return 0;
}
