// What every subject of the self-test uses: its report, random inputs, memory of an exact size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace engineroom {
namespace selftest {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- the subjects: a line or more of the report each

void check_rows(const Kernels &k);       // selftest_rows.cpp
void check_tiles(const Kernels &k);      // selftest_tiles.cpp
void check_compact(const Kernels &k);
void check_numbers_of_rows(const Kernels &k, const Kernels &other);
void check_linear(const Kernels &k);     // selftest_linear.cpp
void check_attention(const Kernels &k);  // selftest_attention.cpp
void check_sampler();                    // selftest_sampler.cpp
void check_pool();                       // selftest_pool.cpp

// ---- the report

inline int failures = 0;

// One line of the report: the worst error of many comparisons, or the first difference.
class Check {
  public:
    Check(const char *table, std::string name, double tolerance = 0)
        : table_(table), name_(std::move(name)), tolerance_(tolerance) {}
    Check(const Check &) = delete;
    Check &operator=(const Check &) = delete;
    ~Check() {
        const bool ok = first_.empty() && worst_ <= tolerance_ && count_ > 0;
        failures += !ok;
        std::printf("%-8s %-34s %s", table_, name_.c_str(), ok ? "ok" : "FAILED");
        if (tolerance_ > 0) std::printf("  worst %.2g of %.2g", worst_, tolerance_);
        std::printf("  (%ld)%s%s\n", count_, first_.empty() ? "" : ": ", first_.c_str());
        std::fflush(stdout);
    }

    // |got - want| / unit is within the tolerance; NaN equals NaN, an infinity itself.
    void near(double got, double want, double unit, const char *where, long i) {
        ++count_;
        if (std::isnan(want) || std::isinf(want) || std::isnan(got) || std::isinf(got)) {
            const bool equal = std::isnan(want) ? std::isnan(got) : got == want;
            if (!equal) differ(where, i, got, want);
            return;
        }
        const double error = std::fabs(got - want) / unit;
        worst_ = std::max(worst_, error);
        if (error > tolerance_) differ(where, i, got, want);
    }
    void same(double got, double want, const char *where, long i) {
        ++count_;
        if (!(got == want || (std::isnan(got) && std::isnan(want)))) differ(where, i, got, want);
    }
    void same_bits(const void *a, const void *b, std::size_t bytes, const char *where, long i) {
        ++count_;
        if (std::memcmp(a, b, bytes) != 0 && first_.empty())
            first_ = std::string(where) + " [" + std::to_string(i) + "] differ in bits";
    }
    void truth(bool ok, const char *where, long i = 0) {
        ++count_;
        if (!ok && first_.empty()) first_ = std::string(where) + " [" + std::to_string(i) + "]";
    }

  private:
    void differ(const char *where, long i, double got, double want) {
        if (!first_.empty()) return;
        char text[160];
        std::snprintf(text, sizeof text, "%s [%ld] is %.9g, should be %.9g", where, i, got, want);
        first_ = text;
    }

    const char *table_;
    std::string name_;
    double tolerance_, worst_ = 0;
    long count_ = 0;
    std::string first_;
};

// ---- inputs

// Sebastiano Vigna's splitmix64 (public domain).
struct Random {
    std::uint64_t state;
    std::uint64_t next() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
    float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
    float between(float low, float high) { return low + (high - low) * uniform(); }
    // Of mean 0 and deviation 1, nearly normal.
    float normal() {
        float sum = 0;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum - 6.0f;
    }
    std::vector<float> normals(std::size_t n) {
        std::vector<float> x(n);
        for (float &value : x) value = normal();
        return x;
    }
};

// Memory of exactly that many bytes on a 64-byte boundary: a sanitizer sees what goes past its end.
class Memory {
  public:
    explicit Memory(std::size_t bytes, int fill = 0xff) : size_(bytes) {
        if (posix_memalign(&at_, 64, bytes + (bytes == 0)) != 0) std::abort();
        std::memset(at_, fill, bytes);
    }
    ~Memory() { std::free(at_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    std::uint8_t *data() const { return static_cast<std::uint8_t *>(at_); }
    std::size_t size() const { return size_; }

  private:
    void *at_ = nullptr;
    std::size_t size_;
};

}  // namespace selftest
}  // namespace engineroom
