// A program that holds every table of kernels which this machine can run to plain double precision.
//
// It needs neither Python nor nanobind, so that it also runs where neither does: under an emulator
// of another processor, cross-compiled, or under a sanitizer (tests/kernels/test_cpu_machines.py).
// It prints the tables, then one line a check, and exits with 1 if any failed. Names given as
// arguments choose checks: `selftest pool linear`.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "attention.hpp"
#include "compact.hpp"
#include "dequant.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "pool.hpp"
#include "sample.hpp"

using namespace engineroom;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// --------------------------------------------------------------------------------- reporting

int failures = 0;

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

// ------------------------------------------------------------------------------------ inputs

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

// The nearest number with `digits` significant bits and exponents from `lowest` (of the last bit)
// on, ties to even; beyond `largest`, infinity. Double precision holds every step exactly.
double rounded(double x, int digits, int lowest, double largest) {
    if (std::isnan(x) || std::isinf(x) || x == 0) return x;
    int exponent;
    std::frexp(x, &exponent);
    const int last = std::max(exponent - digits, lowest);
    const double y = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
    return std::fabs(y) > largest ? std::copysign(kInfinity, x) : y;
}
double rounded(double x, Dtype dtype) {
    if (dtype == Dtype::kBF16) return rounded(x, 8, -133, 0x1.fep127);
    if (dtype == Dtype::kF16) return rounded(x, 11, -24, 65504.0);
    return x;
}

std::uint16_t bf16_bits(float x) {  // of a value that is one
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>(bits >> 16);
}
float bf16_value(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
std::uint16_t f16_bits(float x) {  // of a normal value that is one
    int exponent;
    const double mantissa = std::frexp(std::fabs(static_cast<double>(x)), &exponent);
    if (x == 0) return 0;
    const int fraction = static_cast<int>(std::ldexp(mantissa, 11)) - 1024;
    return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | fraction);
}
float f16_value(std::uint16_t x) {
    float value;
    find_dequant_format("F16")->run(reinterpret_cast<const std::uint8_t *>(&x), &value, 1);
    return value;
}

const char *name_of(Dtype dtype) {
    const char *const names[] = {"f32", "bf16", "f16", "int8", "int4", "fp8"};
    return names[static_cast<int>(dtype)];
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double clamped_silu(double x) {
    x = x > 7 ? 7 : x;
    return x / (1 + std::exp(-static_cast<double>(1.702f) * x));
}
double clamped_up(double x) { return (x > 7 ? 7 : x < -7 ? -7 : x) + 1; }
double gelu(double x) {
    const double u = std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
    return x / (1 + std::exp(-2 * u));
}

// -------------------------------------------------------------------------------------- rows

const int kLengths[] = {1, 7, 15, 16, 17, 32, 33, 64, 100, 255, 576, 2049};

void check_norm(const Kernels &k) {
    Check check(k.name, "rms_norm", 2e-6);
    Random random{1};
    for (int n : kLengths)
        for (float offset : {0.0f, 1.0f}) {
            const std::vector<float> x = random.normals(n), w = random.normals(n);
            std::vector<float> out(n, kNaN), in_place = x;
            k.rms_norm(x.data(), w.data(), out.data(), n, 1e-5f, offset);
            k.rms_norm(in_place.data(), w.data(), in_place.data(), n, 1e-5f, offset);
            double squares = 0;
            for (float v : x) squares += static_cast<double>(v) * v;
            const double inverse = 1 / std::sqrt(squares / n + static_cast<double>(1e-5f));
            for (int i = 0; i < n; ++i) {
                const double want = x[i] * inverse * (static_cast<double>(w[i]) + offset);
                check.near(out[i], want, std::fabs(want) + std::fabs(x[i]) * 1e-1, "out", i);
            }
            check.same_bits(out.data(), in_place.data(), 4 * out.size(), "in place", n);
        }
}

void check_elementwise(const Kernels &k) {
    Check add(k.name, "add"), scale(k.name, "scale"), softcap(k.name, "softcap", 1e-6),
        silu_mul(k.name, "silu_mul", 2e-6), gelu_mul(k.name, "gelu_tanh_mul", 3e-5),
        clamped_mul(k.name, "clamped_silu_mul", 4e-6);
    Random random{2};
    for (int n : kLengths) {
        std::vector<float> a = random.normals(n), b = random.normals(n);
        const float widths[] = {1.0f, 8.0f, 100.0f};
        for (float &x : a) x *= widths[random.below(3)];
        if (n > 40) {
            a[3] = 1e4f;
            a[20] = -1e4f;
            a[33] = kInfinity;
            a[34] = kNaN;
            a[35] = -0.0f;
        }
        std::vector<float> out(n);
        k.add(a.data(), b.data(), out.data(), n);
        for (int i = 0; i < n; ++i) add.same(out[i], a[i] + b[i], "out", i);
        k.scale(a.data(), 0.3f, out.data(), n);
        for (int i = 0; i < n; ++i) scale.same(out[i], a[i] * 0.3f, "out", i);
        k.softcap(a.data(), 30.0f, out.data(), n);
        for (int i = 0; i < n; ++i) {
            const double want = 30 * std::tanh(a[i] / 30.0);
            softcap.near(out[i], want, std::fabs(want) + 1e-30, "out", i);
        }
        k.silu_mul(a.data(), b.data(), out.data(), n);
        for (int i = 0; i < n; ++i) {
            const double want = silu(a[i]) * b[i];
            silu_mul.near(out[i], want, std::fabs(want) + 1e-30, "out", i);
        }
        k.gelu_tanh_mul(a.data(), b.data(), out.data(), n);
        for (int i = 0; i < n; ++i) {
            const double want = gelu(a[i]) * b[i];
            gelu_mul.near(out[i], want, std::fabs(want) + 1e-20, "out", i);
        }
        k.clamped_silu_mul(a.data(), b.data(), out.data(), n);
        for (int i = 0; i < n; ++i) {
            const double gate = clamped_silu(a[i]), want = gate * clamped_up(b[i]);
            clamped_mul.near(out[i], want, std::fabs(gate) * 8 + 1e-20, "out", i);
        }
    }
}

void check_rope(const Kernels &k) {
    Check check(k.name, "rope", 2e-7);
    Random random{3};
    const int shapes[][2] = {{64, 32}, {80, 40}, {80, 20}, {128, 64}, {6, 3}, {2, 1}, {96, 17}};
    for (const int *shape : shapes)
        for (bool interleaved : {false, true}) {
            const int heads = 3, dim = shape[0], pairs = shape[1];
            const std::vector<float> x = random.normals(heads * dim);
            std::vector<float> cos(pairs), sin(pairs), out(heads * dim, kNaN), in_place = x;
            for (int j = 0; j < pairs; ++j) {
                const float angle = random.between(0, 6.28f);
                cos[j] = std::cos(angle);
                sin[j] = std::sin(angle);
            }
            k.rope(x.data(), cos.data(), sin.data(), out.data(), heads, dim, pairs, interleaved);
            k.rope(in_place.data(), cos.data(), sin.data(), in_place.data(), heads, dim, pairs,
                   interleaved);
            check.same_bits(out.data(), in_place.data(), 4 * out.size(), "in place", dim);
            for (int h = 0; h < heads; ++h) {
                const float *from = x.data() + h * dim, *to = out.data() + h * dim;
                for (int j = 0; j < pairs; ++j) {
                    const int ia = interleaved ? 2 * j : j, ib = interleaved ? ia + 1 : j + pairs;
                    const double a = from[ia], b = from[ib], c = cos[j], s = sin[j];
                    const double unit = std::fabs(a) + std::fabs(b);
                    check.near(to[ia], a * c - b * s, unit, "first", j);
                    check.near(to[ib], b * c + a * s, unit, "second", j);
                }
                for (int j = 2 * pairs; j < dim; ++j) check.same(to[j], from[j], "rest", j);
            }
        }
}

// Numbers of every magnitude, ties, and the edges of both 16-bit formats.
std::vector<float> numbers_to_round(Random &random, int n) {
    std::vector<float> x(n);
    for (float &value : x) {
        const int kind = random.below(4);
        const float unit = kind == 0 ? std::ldexp(1.0f, random.below(250) - 125)
                                     : std::ldexp(1.0f, random.below(44) - 26);
        value = random.normal() * unit;
        // A tie: a 16-bit number and a half of its last place.
        const int odd = 2 * random.below(2048) + 1, last = random.below(24) - 25;
        const std::uint16_t any = static_cast<std::uint16_t>(random.below(0x7f80));
        if (kind == 2) value = std::ldexp(static_cast<float>(odd), last);
        if (kind == 3) value = bf16_value(any) * 0x1.01p0f;
    }
    const float edges[] = {
        0.0f, -0.0f, kInfinity, -kInfinity, kNaN,
        65504.0f, 65519.996f, 65520.0f, -65520.0f, 65536.0f,
        0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f, 0x1.fffp-15f,
        0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1.8p-24f,
        0x1.fep127f, 0x1.fefffep127f, 0x1.ffp127f, 0x1.fffffep127f,
        0x1p-126f, 0x1p-133f, 0x1p-149f,
    };
    for (std::size_t i = 0; i < sizeof edges / sizeof *edges && i < x.size(); ++i) x[i] = edges[i];
    return x;
}

void check_rounding(const Kernels &k) {
    Random random{4};
    for (Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16}) {
        Check check(k.name, std::string("round ") + name_of(dtype));
        for (int n : {1, 15, 16, 33, 4099}) {
            const std::vector<float> x = numbers_to_round(random, n);
            std::vector<float> out = x;
            k.round(out.data(), n, dtype);
            for (int i = 0; i < n; ++i) {
                check.same(out[i], rounded(x[i], dtype), "out", i);
                if (!std::isnan(x[i]))
                    check.truth(std::signbit(out[i]) == std::signbit(x[i]), "sign", i);
            }
        }
    }
    Check check(k.name, "to_bf16");
    for (int n : {1, 16, 31, 32, 33, 1000}) {
        const int stride = (n + 31) / 32 * 32 + (n == 32 ? 32 : 0);
        const std::vector<float> x = numbers_to_round(random, n);
        std::vector<std::uint16_t> out(stride, 0xffff);
        k.to_bf16(x.data(), n, stride, out.data());
        for (int i = 0; i < stride; ++i)
            check.same(bf16_value(out[i]), i < n ? rounded(x[i], Dtype::kBF16) : 0, "out", i);
    }
}

void check_int8(const Kernels &k) {
    Check check(k.name, "to_int8", 2e-6), second(k.name, "to_int8, second digits", 1e-3);
    Random random{5};
    for (int n : {1, 16, 17, 31, 32, 33, 64, 100, 1000}) {
        const int stride = (n + 31) / 32 * 32 + (n == 64 ? 32 : 0), groups = stride / 32;
        std::vector<float> x = random.normals(n);
        for (int i = 0; i < n; ++i) x[i] *= std::ldexp(1.0f, i / 32 % 40 - 20);
        for (int i = 5; i < n; i += 96) x[i] *= 30;  // outliers
        if (n == 1000) {
            std::fill(x.begin() + 320, x.begin() + 352, 0.0f);
            x[400] = kNaN;
            x[480] = -kInfinity;
        }
        std::vector<std::int8_t> q(stride, 99), fine_q(stride, 99);
        std::vector<float> scale(groups, kNaN), scaled(groups, kNaN), fine_scale(groups, kNaN);
        std::vector<std::int32_t> sums(2 * groups, -1), fine_sums = sums, fine_group(groups);
        std::int32_t fine_count = -1;
        k.to_int8(x.data(), n, stride,
                  Int8Row{q.data(), scale.data(), sums.data(), scaled.data(), &fine_count,
                          fine_group.data(), fine_q.data(), fine_scale.data(), fine_sums.data()});
        double border = 0;  // NaN or infinity of a row means: no outliers
        for (int i = 0; i < n; ++i) border += static_cast<double>(kOutlier) * x[i] * x[i] / n;
        int fine = 0;
        for (int g = 0; g < groups; ++g) {
            double most = 0, rest = 0;
            bool odd = false;
            int total = 0;
            for (int i = 32 * g; i < 32 * g + 32; ++i) {
                const double value = i < n ? x[i] : 0;
                odd |= std::isnan(value) || std::isinf(value);
                most = std::max(most, std::fabs(value));
                total += q[i];
                rest = std::max(rest, std::fabs(value - static_cast<double>(scale[g]) * q[i]));
            }
            const bool has_fine = fine < fine_count && fine_group[fine] == g;
            if (odd) {  // what is made of it must not look like a number
                check.truth(std::isnan(scale[g]) && !has_fine, "a group with NaN or infinity", g);
                continue;
            }
            check.near(scale[g], most / 127, most / 127 + 1e-30, "scale", g);
            for (int i = 32 * g; i < 32 * g + 32; ++i) {
                const double want = i < n && most > 0 ? x[i] * (127 / most) : 0;
                check.truth(std::fabs(q[i] - want) <= 0.5001, "q", i);
            }
            for (int h = 2 * g; h < 2 * g + 2; ++h) {
                int sum = 0;
                for (int i = 16 * h; i < 16 * h + 16; ++i) sum += q[i];
                check.same(sums[h], sum, "sum16", h);
            }
            double scaled_sum = static_cast<double>(scale[g]) * total, unit = std::fabs(scaled_sum);
            if (!(most * most > 0.999 * border))
                second.truth(!has_fine, "a group without an outlier", g);
            // A rest of rounding errors alone may count as nothing.
            if (most * most > 1.001 * border && rest > 1e-3 * scale[g])
                second.truth(has_fine, "a group with an outlier", g);
            if (has_fine) {
                const double step = fine_scale[fine];
                int sum[2] = {0, 0};
                second.near(step, rest / 127, rest / 127 + 1e-5 * scale[g], "fine_scale", g);
                for (int i = 0; i < 32; ++i) {
                    const int at = 32 * g + i, digit = fine_q[32 * fine + i];
                    const double all = at < n ? x[at] : 0;
                    const double left = all - static_cast<double>(scale[g]) * q[at];
                    second.truth(std::fabs(digit * step - left) <= 0.501 * step + 1e-5 * scale[g],
                                 "fine_q", at);
                    sum[i / 16] += digit;
                }
                for (int h = 0; h < 2; ++h)
                    second.same(fine_sums[2 * fine + h], sum[h], "fine_sum16", g);
                scaled_sum += step * (sum[0] + sum[1]);
                unit += std::fabs(step * (sum[0] + sum[1]));
                ++fine;
            }
            check.near(scaled[g], scaled_sum, unit + 1e-30, "scaled_sum", g);
        }
        second.same(fine, fine_count, "fine_count", n);
    }
}

// ------------------------------------------------------------------------------------- tiles

struct FormatInfo {
    const char *name;
    int halves[2];  // where a block has its half-precision scales, or -1
    int floats = 0;             // scales that a block begins with
    bool has_exponent = false;  // it begins with one
    bool has_fp8 = false;       // behind the floats; multiplied as bf16, not as int8

    bool is_bf16() const { return has_fp8 || std::strcmp(name, "BF16") == 0; }
};
const FormatInfo kFormats[] = {
    {"F32", {-1, -1}}, {"F16", {-1, -1}}, {"BF16", {-1, -1}}, {"Q4_0", {0, -1}},
    {"Q4_1", {0, 2}},  {"Q5_0", {0, -1}}, {"Q5_1", {0, 2}},   {"Q8_0", {0, -1}},
    {"Q4_K", {0, 2}},  {"Q5_K", {0, 2}},  {"Q6_K", {208, -1}}, {"INT8", {-1, -1}},
    {"INT4", {-1, -1}}, {"I4G32", {4, -1}, 1}, {"I4G128", {4, -1}, 1},
    {"I8G32", {4, -1}, 1}, {"MXFP4", {-1, -1}, 0, true}, {"NVFP4", {0, 2}},
    {"NF4", {-1, -1}, 1}, {"FP4", {-1, -1}, 1}, {"FP8", {-1, -1}, 0, false, true}, {"FP8_128", {-1, -1}, 1, false, true},
};

// A weight of random blocks: as the checkpoint holds it, in tiles, and its values.
struct Weight {
    std::vector<std::uint8_t> raw;
    std::unique_ptr<Memory> tiles;
    PackedWeight packed;
    std::vector<float> values;  // [N][K]

    Weight(const FormatInfo &info, int num_rows, int num_columns, Random &random) {
        const DequantFormat &format = *find_dequant_format(info.name);
        const std::size_t elements = static_cast<std::size_t>(num_rows) * num_columns;
        const std::size_t blocks = num_columns / format.block_elements;
        const std::size_t row_bytes = format.row_bytes(num_columns);
        raw.resize(row_bytes * num_rows);
        for (std::size_t at = 0; at < raw.size(); at += row_bytes) {
            for (std::size_t i = 0; i < format.header_bytes; i += 4) {
                const float d = random.between(-1e-4f, 1e-3f);
                std::memcpy(raw.data() + at + i, &d, 4);
            }
            for (std::size_t b = 0; b < blocks; ++b)
                fill(raw.data() + at + format.header_bytes + b * format.block_bytes, info, format,
                     random);
        }
        if (std::strcmp(info.name, "NVFP4") == 0) {  // the second tile's are no whole numbers
            const std::uint16_t tiny = 0x0401;
            std::memcpy(raw.data() + kTileRows * row_bytes + format.header_bytes, &tiny, 2);
        }
        values.resize(elements);
        for (int n = 0; n < num_rows; ++n)
            format.run(raw.data() + n * row_bytes,
                       values.data() + static_cast<std::size_t>(n) * num_columns, blocks);
        packed = packed_layout(info.name, num_rows, num_columns);
        tiles = std::make_unique<Memory>(packed_bytes(packed), 0);
        pack_tiles(info.name, raw.data(), packed, tiles->data(), 0, packed.num_tiles());
        packed.data = tiles->data();
    }

    // Makes `values` what int8 rows multiply: those of a table are rounded.
    void round_values() {
        if (packed.elements != Elements::kNF4 && packed.elements != Elements::kFP4) return;
        const CodeTable &table = table_of(packed.elements);
        for (std::size_t i = 0; i < values.size(); ++i) {
            float absmax;
            std::memcpy(&absmax, raw.data() + i / 64 * 36, 4);
            const std::uint8_t pair = raw[i / 64 * 36 + 4 + i % 64 / 2];
            const int u = table.units[i % 2 ? pair & 15 : pair >> 4];
            values[i] = absmax * table.step * static_cast<float>(u - 128);
        }
    }

    // The same bf16 in 12 bits; K is a multiple of 8.
    void compact() {
        const auto rows_of = [&](int tile) {
            return std::min(kTileRows, packed.num_rows - tile * kTileRows);
        };
        const std::size_t from_tile = static_cast<std::size_t>(kTileRows) * 2 * packed.num_columns;
        std::vector<CompactTile> tables;
        for (int tile = 0; tile < packed.num_tiles(); ++tile)
            tables.push_back(
                count_compact(raw.data() + tile * from_tile, rows_of(tile), packed.num_columns));
        if (!make_compact(packed, tables)) std::abort();
        tiles = std::make_unique<Memory>(packed_bytes(packed), 0);
        packed.data = tiles->data();
        for (int tile = 0; tile < packed.num_tiles(); ++tile)
            pack_compact(raw.data() + tile * from_tile, rows_of(tile), packed, tables[tile],
                         tiles->data() + tile * packed.tile_bytes);
    }

    static void fill(std::uint8_t *block, const FormatInfo &info, const DequantFormat &format,
                     Random &random) {
        if (format.block_elements == 1) {
            const float x = random.normal();
            if (format.block_bytes == 4) {
                std::memcpy(block, &x, 4);
                return;
            }
            const bool is_half = info.name[0] == 'F';
            const float y = static_cast<float>(rounded(x, is_half ? Dtype::kF16 : Dtype::kBF16));
            // Subnormal halves are not made here: f16_bits knows normal ones.
            const float z = is_half && std::fabs(y) < 0x1p-14f ? 0.0f : y;
            const std::uint16_t bits = is_half ? f16_bits(z) : bf16_bits(z);
            std::memcpy(block, &bits, 2);
            return;
        }
        for (std::size_t i = 0; i < format.block_bytes; ++i)
            block[i] = static_cast<std::uint8_t>(random.next());
        for (int i = 0; i < info.floats; ++i) {
            const float d = random.between(-1e-3f, 1e-2f);
            std::memcpy(block + 4 * i, &d, 4);
        }
        for (std::size_t i = 4 * info.floats; info.has_fp8 && i < format.block_bytes; ++i)
            if ((block[i] & 0x7f) == 0x7f) block[i] = 0;  // NaN
        if (info.has_exponent) block[0] = static_cast<std::uint8_t>(117 + random.below(8));
        for (int at : info.halves) {
            if (at < 0) continue;
            double d = rounded(random.between(0.01f, 0.05f), Dtype::kF16);
            if (random.below(8) == 0) d = -d;
            const std::uint16_t bits = f16_bits(static_cast<float>(d));
            std::memcpy(block + at, &bits, 2);
        }
    }
};

// Rows prepared by the table itself, and the values that they stand for.
struct Rows {
    std::unique_ptr<Memory> memory;
    Activations ready;
    std::vector<double> values;  // [rows][K]

    Rows(const Kernels &k, Form form, const std::vector<float> &x, int rows, int columns)
        : values(x.begin(), x.end()) {
        memory = std::make_unique<Memory>(prepared_bytes(form, columns, rows));
        ready = place_activations(form, columns, rows, memory->data());
        prepare_rows(k, ready, x.data(), columns, columns, 0, rows, InputNorm(), nullptr);
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < columns; ++i) {
                double &value = values[static_cast<std::size_t>(r) * columns + i];
                if (form == Form::kBF16) value = bf16_value(ready.bf16[r * ready.stride + i]);
                if (form == Form::kInt8)
                    value = static_cast<double>(ready.scale[(r * ready.stride + i) / 32]) *
                            ready.q[r * ready.stride + i];
            }
        for (int r = 0; r < rows && form == Form::kInt8; ++r)
            for (int j = 0; j < ready.fine_count[r]; ++j) {
                const std::ptrdiff_t at = r * (ready.stride / 32) + j;
                const int first = 32 * ready.fine_group[at];
                const double step = ready.fine_scale[at];
                for (int i = first; i < std::min(first + 32, columns); ++i)
                    values[static_cast<std::size_t>(r) * columns + i] +=
                        step * ready.fine_q[32 * at + i - first];
            }
    }
};

struct Product {
    double sum = 0, size = 0;  // of the terms and of their magnitudes
};
Product product(const Weight &w, int n, const Rows &x, int row) {
    const int columns = w.packed.num_columns;
    const float *a = w.values.data() + static_cast<std::size_t>(n) * columns;
    const double *b = x.values.data() + static_cast<std::size_t>(row) * columns;
    Product p;
    for (int i = 0; i < columns; ++i) {
        const double term = a[i] * b[i];
        p.sum += term;
        p.size += std::fabs(term);
    }
    return p;
}

const char *name_of(Form form) {
    return form == Form::kF32 ? "f32" : form == Form::kBF16 ? "bf16" : "int8";
}

// What follows the tiles: second digits of int8 rows, and the scale that was left out.
void finish(const Kernels &k, const PackedWeight &w, int tile, const Activations &a, int row0, int rows,
            float *out) {
    if (a.form == Form::kInt8) {
        const std::size_t groups = static_cast<std::size_t>(a.stride) / kGroup;
        std::vector<FineDigits> digits(groups * static_cast<std::size_t>(rows));
        std::vector<std::int32_t> starts(groups + 1);
        const int count = fine_digits(a, row0, rows, digits.data(), starts.data());
        k.tile_fine(w, tile, a, row0, digits.data(), count, out);
    }
    FinishedTile t;
    t.y = out;
    t.scale = channel_scale(w, tile, a.form);
    t.out = out;
    t.out_stride = kTileRows;
    t.rows = rows;
    t.outputs = kTileRows;
    k.finish(t);
}

void check_tiles(const Kernels &k) {
    Random random{6};
    for (const FormatInfo &info : kFormats) {
        const int block = static_cast<int>(find_dequant_format(info.name)->block_elements);
        std::vector<int> columns;
        if (block == 1) columns = {1, 7, 40, 301};
        if (block == 32) columns = {32, 96, 544};
        if (block == 64) columns = {64, 192, 576};
        if (block == 128) columns = {128, 384};
        if (block == 256) columns = {256, 768};
        std::vector<Form> forms = {Form::kF32};
        if (info.is_bf16()) forms.push_back(Form::kBF16);
        if (block > 1 && !info.has_fp8) forms.push_back(Form::kInt8);
        for (Form form : forms) {
            Check check(k.name, std::string("tile ") + info.name + " x " + name_of(form), 3e-6);
            for (int num_columns : columns) {
                const int num_rows = 48 + 1 + random.below(47), rows = 13;
                Weight w(info, num_rows, num_columns, random);
                if (form == Form::kInt8) w.round_values();
                std::vector<float> inputs = random.normals(rows * num_columns);
                for (std::size_t i = 9; i < inputs.size(); i += 150) inputs[i] *= 30;
                const Rows x(k, form, inputs, rows, num_columns);
                const Memory scratch(tile_scratch_bytes(num_columns));
                for (int tile = 0; tile < w.packed.num_tiles(); ++tile) {
                    std::vector<float> all(rows * kTileRows, kNaN);
                    k.tile(w.packed, tile, 0, num_columns, x.ready, 0, rows, true, all.data(),
                           scratch.data());
                    finish(k, w.packed, tile, x.ready, 0, rows, all.data());
                    for (int r = 0; r < rows; ++r)
                        for (int n = 0; n < kTileRows; ++n) {
                            const int output = tile * kTileRows + n;
                            Product p;
                            if (output < num_rows) p = product(w, output, x, r);
                            check.near(all[r * kTileRows + n], p.sum, p.size + 1e-30, "out",
                                       output);
                        }
                    // A row's bits do not depend on what rows are multiplied with it, nor on
                    // blocks of K.
                    int begin = 0;
                    for (int count : {1, 2, 3, 4, 3}) {
                        std::vector<float> some(count * kTileRows, kNaN);
                        for (int k0 = 0; k0 < num_columns; k0 += kSuper)
                            k.tile(w.packed, tile, k0, std::min(k0 + kSuper, num_columns), x.ready,
                                   begin, count, k0 == 0, some.data(), scratch.data());
                        finish(k, w.packed, tile, x.ready, begin, count, some.data());
                        check.same_bits(some.data(), all.data() + begin * kTileRows,
                                        4 * some.size(), "rows apart and blocks of K", begin);
                        begin += count;
                    }
                }
            }
        }
        Check check(k.name, std::string("unpack_row ") + info.name);
        const Weight w(info, 50, 2 * block, random);
        std::vector<float> out(2 * block);
        for (int n = 0; n < 50; ++n) {
            unpack_row(w.packed, n, out.data());
            check.same_bits(out.data(), w.values.data() + n * 2 * block, 4 * out.size(), "row", n);
        }
    }
}

// Any number of rows from any row on has the bits that the same rows have beside many others: of
// int8 in `other`'s table, for tables whose multiply-add rounds once agree in every bit; of bf16,
// which each table sums in its own way, in the same table.
void check_numbers_of_rows(const Kernels &k, const Kernels &other) {
    Random random{8};
    for (const FormatInfo &info : kFormats) {
        const int block = static_cast<int>(find_dequant_format(info.name)->block_elements);
        const bool is_bf16 = info.is_bf16();
        if (block == 1 && !is_bf16) continue;
        const Kernels &oracle = is_bf16 ? k : other;
        Check check(k.name, std::string("rows of ") + info.name + " as in " + oracle.name);
        for (int num_columns : {(block == 1 ? 33 : 1) * block, (block == 1 ? 64 : 3) * block,
                                (block == 1 ? 561 : 17) * block}) {
            constexpr int kMost = 67;
            const Weight w(info, 48 + 1 + random.below(47), num_columns, random);
            const Rows x(other, is_bf16 ? Form::kBF16 : Form::kInt8,
                         random.normals(kMost * num_columns), kMost, num_columns);
            const Memory scratch(tile_scratch_bytes(num_columns));
            const auto product = [&](const Kernels &kernels, int tile, int row0, int rows) {
                std::vector<float> out(rows * kTileRows, kNaN);
                for (int k0 = 0; k0 < num_columns; k0 += 2 * kSuper)
                    kernels.tile(w.packed, tile, k0, std::min(k0 + 2 * kSuper, num_columns), x.ready,
                                 row0, rows, k0 == 0, out.data(), scratch.data());
                return out;
            };
            for (int tile = 0; tile < w.packed.num_tiles(); ++tile) {
                const std::vector<float> want = product(oracle, tile, 0, kMost);
                for (int rows = 1; rows <= 64; rows += num_columns > 100 ? 9 : 1) {
                    const std::vector<float> got = product(k, tile, 3, rows);
                    check.same_bits(got.data(), want.data() + 3 * kTileRows, 4 * got.size(), "rows",
                                    rows);
                }
            }
        }
    }
}

// bf16 in 12 bits gives the bits of plain bf16, in both forms, with exceptions and without.
void check_compact(const Kernels &k) {
    Random random{16};
    for (Form form : {Form::kF32, Form::kBF16}) {
        Check check(k.name, std::string("tile of compact BF16 x ") + name_of(form));
        const int num_rows = 60, num_columns = 520, rows = 13;
        Weight w({"BF16", {-1, -1}}, num_rows, num_columns, random);
        const std::uint16_t rare = 0x1001;  // its high byte is in no table
        for (int i = 0; i < 30; ++i) {
            const int at = random.below(kTileRows * num_columns);  // the first tile's
            std::memcpy(w.raw.data() + 2 * at, &rare, 2);
            w.values[at] = bf16_value(rare);
        }
        pack_tiles("BF16", w.raw.data(), w.packed, w.tiles->data(), 0, 1);
        const Rows x(k, form, random.normals(rows * num_columns), rows, num_columns);
        const Memory scratch(tile_scratch_bytes(num_columns));
        std::vector<std::vector<float>> plain;
        const auto products = [&](int tile, int count) {
            std::vector<float> out(count * kTileRows, kNaN);
            for (int k0 = 0; k0 < num_columns; k0 += kSuper)
                k.tile(w.packed, tile, k0, std::min(k0 + kSuper, num_columns), x.ready, 0, count,
                       k0 == 0, out.data(), scratch.data());
            return out;
        };
        for (int tile = 0; tile < 2; ++tile) plain.push_back(products(tile, rows));
        w.compact();
        for (int tile = 0; tile < 2; ++tile)
            for (int count : {1, 2, 3, 4, 5, 8, 9, 13}) {
                const std::vector<float> out = products(tile, count);
                check.same_bits(out.data(), plain[tile].data(), 4 * out.size(), "rows", count);
            }
        std::vector<float> out(num_columns);
        for (int n = 0; n < num_rows; ++n) {
            unpack_row(w.packed, n, out.data());
            check.same_bits(out.data(), w.values.data() + static_cast<std::size_t>(n) * num_columns,
                            4 * out.size(), "row", n);
        }
    }
}

// ----------------------------------------------------------------------------- linear layers

void check_linear(const Kernels &k) {
    Random random{7};
    struct Case {
        const char *format;
        Form form;
        Epilogue epilogue;
        Dtype dtype;
        int rows;
    };
    const Case cases[] = {
        {"F32", Form::kF32, Epilogue::kStore, Dtype::kF32, 5},
        {"BF16", Form::kBF16, Epilogue::kAddResidual, Dtype::kBF16, 1},
        {"Q8_0", Form::kInt8, Epilogue::kAddResidual, Dtype::kF32, 3},
        {"Q4_K", Form::kInt8, Epilogue::kSiluMul, Dtype::kF32, 17},
        {"Q6_K", Form::kF32, Epilogue::kGeluMul, Dtype::kF16, 2},
        {"Q4_0", Form::kInt8, Epilogue::kClampedSiluMul, Dtype::kF32, 9},
        {"Q5_1", Form::kInt8, Epilogue::kStore, Dtype::kBF16, 9},
        {"INT8", Form::kInt8, Epilogue::kAddResidual, Dtype::kF32, 1},
        {"INT4", Form::kInt8, Epilogue::kSiluMul, Dtype::kF32, 9},
        {"I4G128", Form::kInt8, Epilogue::kStore, Dtype::kF32, 9},
    };
    for (const Case &c : cases) {
        const double tolerance =
            c.dtype == Dtype::kF32 ? 2e-5 : c.dtype == Dtype::kBF16 ? 2e-2 : 3e-3;
        Check check(k.name, std::string("linear ") + c.format + " x " + name_of(c.form), tolerance);
        const FormatInfo *info = kFormats;
        while (std::strcmp(info->name, c.format) != 0) ++info;
        const int columns = 512, outputs = 500, rows = c.rows;
        const bool paired = is_paired(c.epilogue);
        const Weight a(*info, outputs, columns, random);
        const Weight b(*info, paired ? outputs : 77, columns, random);
        const std::vector<float> x = random.normals(rows * columns), bias = random.normals(outputs);
        const std::vector<float> residual = random.normals(rows * outputs);
        const Rows from(k, c.form, x, rows, columns);

        std::vector<float> out(rows * outputs), second(rows * b.packed.num_rows), first_out;
        LinearPart parts[2];
        parts[0].weight = &a.packed;
        parts[0].bias = bias.data();
        parts[0].out = out.data();
        parts[0].out_stride = outputs;
        parts[1].weight = &b.packed;
        parts[1].out = second.data();
        parts[1].out_stride = b.packed.num_rows;
        Linear linear;
        linear.parts = parts;
        linear.num_parts = c.epilogue == Epilogue::kAddResidual ? 1 : 2;
        linear.epilogue = c.epilogue;
        linear.dtype = c.dtype;
        linear.residual = residual.data();
        linear.residual_stride = outputs;
        for (int threads = 1; threads <= 3; ++threads) {
            std::fill(out.begin(), out.end(), kNaN);
            Pool pool(threads);
            const std::size_t bytes = (linear_scratch_bytes(columns) + 63) / 64 * 64;
            const Memory scratch(bytes * threads), prepared(prepared_bytes(c.form, columns, rows));
            const Activations ready = place_activations(c.form, columns, rows, prepared.data());
            pool.run([&](int thread) {
                prepare_rows(k, ready, x.data(), columns, columns, rows * thread / threads,
                             rows * (thread + 1) / threads, InputNorm(), nullptr);
                pool.barrier();
                linear_tiles(k, linear, ready, rows, thread, threads,
                             scratch.data() + bytes * thread);
            });
            if (threads == 1) first_out = out;
            check.same_bits(out.data(), first_out.data(), 4 * out.size(), "threads", threads);
        }
        for (int r = 0; r < rows; ++r)
            for (int n = 0; n < outputs; ++n) {
                const Product p = product(a, n, from, r);
                double want = p.sum + bias[n], unit = std::fabs(want) + p.size;
                if (c.epilogue == Epilogue::kAddResidual) {
                    want += residual[r * outputs + n];
                    unit = std::max(unit, 1.0);
                } else if (paired) {
                    const Product up = product(b, n, from, r);
                    const bool clamps = c.epilogue == Epilogue::kClampedSiluMul;
                    const double gate = clamps                               ? clamped_silu(want)
                                        : c.epilogue == Epilogue::kSiluMul ? silu(want)
                                                                             : gelu(want);
                    const double by = clamps ? clamped_up(up.sum) : up.sum;
                    want = gate * by;
                    unit = unit * std::fabs(by) + std::fabs(gate) * up.size + up.size;
                }
                if (std::fabs(want) < 60000) check.near(out[r * outputs + n], want, unit, "out", n);
            }
    }
}

// --------------------------------------------------------------------------------- attention

class Cache {
  public:
    KVCacheView view;
    Memory memory;

    Cache(Dtype keys, Dtype values, int num_blocks, int block_size, int num_kv_heads, int head_dim)
        : view(kv_cache_view(keys, values, num_kv_heads, head_dim, block_size)),
          memory(static_cast<std::size_t>(num_blocks) * view.block_stride) {
        view.layer = memory.data();  // filled with 0xff: NaN, whatever the dtype
    }

    // Dim i of all heads' dims.
    double key(int slot, int i) const {
        return element(false, slot, i / view.head_dim, i % view.head_dim);
    }
    double value(int slot, int i) const {
        return element(true, slot, i / view.head_dim, i % view.head_dim);
    }

  private:
    // By the layout that kernels.hpp states.
    double element(bool is_value, int slot, int head, int d) const {
        const Dtype dtype = is_value ? view.value_dtype : view.key_dtype;
        const bool int4 = dtype == Dtype::kInt4;
        const int size = view.block_size, s = slot % size, group = d / 32, groups = (view.head_dim + 31) / 32;
        const int dim = int4 ? 16 * groups : view.head_dim;
        const bool high = int4 && d % 32 >= 16;
        if (int4) d = 16 * group + d % 16;
        std::size_t at = static_cast<std::size_t>(s) * dim + d;
        const bool pairs = dtype == Dtype::kBF16 || dtype == Dtype::kFp8;
        const int step = pairs ? 2 : dtype == Dtype::kInt8 || int4 ? 4 : 1;
        const int exchanged[] = {0, 2, 1, 3};
        if (view.is_tiled(dtype) && is_value)
            at = (static_cast<std::size_t>(s / step) * dim + d) * step +
                 (int4 ? exchanged[s % 4] : s % step);
        if (view.is_tiled(dtype) && !is_value)
            at = (static_cast<std::size_t>(s / 16) * (dim / step) + d / step) * 16 * step +
                 s % 16 * step + d % step;
        std::uint8_t *from =
            is_value ? view.values(slot / size, head) : view.keys(slot / size, head);
        if (int4) {
            std::uint16_t scale, offset;
            const std::uint8_t *scales = from + static_cast<std::size_t>(size) * dim;
            std::memcpy(&scale, scales + 2 * (group * size + s), 2);
            std::memcpy(&offset, scales + 2 * ((groups + group) * size + s), 2);
            const int code = high ? from[at] >> 4 : from[at] & 15;
            return bf16_value(scale) * static_cast<float>(code) + bf16_value(offset);
        }
        if (dtype == Dtype::kInt8) {
            float scale;
            std::memcpy(&scale, view.scales(from, dtype) + 4 * s, 4);
            return scale * static_cast<float>(from[at] - 128);
        }
        if (dtype == Dtype::kFp8) {
            float scale;
            std::memcpy(&scale, view.scales(from, dtype) + 4 * s, 4);
            return scale * e4m3_value(from[at]);
        }
        if (dtype == Dtype::kF32) {
            float x;
            std::memcpy(&x, from + 4 * at, 4);
            return x;
        }
        std::uint16_t bits;
        std::memcpy(&bits, from + 2 * at, 2);
        return dtype == Dtype::kF16 ? f16_value(bits) : bf16_value(bits);
    }
};

// Makes of one head's numbers what a cache of that dtype holds.
void round_head(float *x, int dim, Dtype dtype) {
    if (dtype == Dtype::kInt4) {
        // The 8 bits of a number from its first on, rounded down or up.
        const auto eight = [](float value, bool up) {
            int exponent;
            const double fraction = std::ldexp(std::frexp(value, &exponent), 8);
            const double whole = up ? std::ceil(fraction) : std::floor(fraction);
            return static_cast<float>(std::ldexp(whole, exponent - 8));
        };
        for (int g = 0; g < dim; g += 32) {
            float *end = x + std::min(dim, g + 32);
            const float offset = eight(*std::min_element(x + g, end), false);
            const float scale = eight((*std::max_element(x + g, end) - offset) / 15.0f, true);
            const float by = 1.0f / scale;
            for (float *at = x + g; at < end; ++at)
                *at = scale * std::min(15.0f, std::nearbyint((*at - offset) * by)) + offset;
        }
        return;
    }
    float most = 0;
    for (int d = 0; d < dim; ++d) most = std::max(most, std::fabs(x[d]));
    if (dtype == Dtype::kFp8) {
        for (int d = 0; d < dim; ++d) {  // 4 bits of significand, steps of 2^-9 at least
            const float scaled = x[d] * (448 / most);
            int exponent;
            std::frexp(scaled, &exponent);
            const int last = std::max(exponent - 4, -9);
            x[d] = most / 448 *
                   static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(scaled, -last)), last));
        }
        return;
    }
    for (int d = 0; d < dim; ++d)
        x[d] = dtype == Dtype::kInt8 ? most / 127 * std::nearbyint(x[d] * (127 / most))
                                     : static_cast<float>(rounded(x[d], dtype));
}

void check_attention(const Kernels &k) {
    Random random{8};
    struct Case {
        Dtype dtype;
        int block_size, head_dim, kv_heads, group, window;
        float softcap;
        Dtype other = Dtype::kF32;  // of the values, where it is integers
        Dtype values() const { return other == Dtype::kF32 ? dtype : other; }
    };
    const Case cases[] = {
        {Dtype::kF32, 16, 64, 2, 1, 0, 0},     {Dtype::kF32, 5, 20, 1, 3, 0, 0},
        {Dtype::kF16, 32, 80, 1, 7, 100, 0},   {Dtype::kF16, 8, 34, 2, 2, 0, 30.0f},
        {Dtype::kBF16, 16, 128, 1, 4, 0, 0},   {Dtype::kBF16, 48, 18, 2, 2, 300, 0},
        {Dtype::kBF16, 7, 64, 1, 1, 0, 20.0f}, {Dtype::kF32, 64, 6, 3, 13, 17, 0},
        {Dtype::kInt8, 16, 64, 2, 3, 0, 0},    {Dtype::kInt8, 32, 20, 1, 5, 100, 0},
        {Dtype::kInt8, 5, 34, 2, 1, 0, 30.0f}, {Dtype::kInt4, 16, 64, 2, 3, 0, 0},
        {Dtype::kInt4, 32, 40, 1, 5, 100, 0},  {Dtype::kInt4, 16, 20, 1, 2, 0, 0},
        {Dtype::kInt4, 5, 34, 2, 1, 0, 30.0f}, {Dtype::kInt4, 16, 96, 1, 6, 0, 0},
        {Dtype::kInt8, 16, 64, 2, 3, 0, 0, Dtype::kInt4},
        {Dtype::kInt8, 32, 34, 1, 7, 100, 0, Dtype::kInt4},
        {Dtype::kInt8, 5, 128, 1, 2, 0, 30.0f, Dtype::kInt4},
        {Dtype::kFp8, 16, 64, 2, 3, 0, 0},     {Dtype::kFp8, 32, 20, 1, 5, 100, 0},
        {Dtype::kFp8, 5, 34, 2, 1, 0, 30.0f},
    };
    // Sequences: their length, and how many of its last tokens are queries.
    const int lengths[] = {1, 40, 530, 257}, queries[] = {1, 23, 3, 1};
    const int num_sequences = 4, padding = 2;  // rows of slot -1 behind the last
    for (const Case &c : cases) {
        char title[64];
        std::snprintf(title, sizeof title, "attention %s %s block %d dim %d", name_of(c.dtype),
                      name_of(c.values()), c.block_size, c.head_dim);
        // The weights of values of bf16, of 4 bits and of fp8 are bf16 too.
        // Those of an int8 cache have 15 bits; tests/kernels/test_cpu_attention.py has the bound.
        const Dtype values_of = c.values();
        const bool has_digits = values_of == Dtype::kInt8;
        const bool is_float = values_of == Dtype::kF32 || values_of == Dtype::kF16;
        const double tolerance = is_float ? 2e-6 : has_digits ? 6e-4 : 4e-3;
        Check written(k.name, std::string("kv_write") + (title + 9));
        Check check(k.name, title, tolerance);
        const int dim = c.head_dim, heads = c.kv_heads * c.group, kv_width = c.kv_heads * dim;
        int max_blocks = 0, num_blocks = 0, num_tokens = padding;
        for (int s = 0; s < num_sequences; ++s) {
            const int blocks = (lengths[s] + c.block_size - 1) / c.block_size;
            max_blocks = std::max(max_blocks, blocks);
            num_blocks += blocks;
            num_tokens += queries[s];
        }
        Cache cache(c.dtype, c.values(), num_blocks, c.block_size, c.kv_heads, dim);
        std::vector<std::int32_t> shuffled(num_blocks), table(num_sequences * max_blocks, 0);
        for (int i = 0; i < num_blocks; ++i) {
            shuffled[i] = i;
            std::swap(shuffled[i], shuffled[random.below(i + 1)]);
        }
        std::vector<std::int32_t> positions(num_tokens, 0), slots(num_tokens, -1);
        std::vector<std::int32_t> starts = {0}, lens;
        std::vector<std::vector<float>> keys, values;  // by sequence [length][kv_width]
        std::vector<char> taken(static_cast<std::size_t>(num_blocks) * c.block_size, 0);
        int next_block = 0, token = 0;
        for (int s = 0; s < num_sequences; ++s) {
            const int blocks = (lengths[s] + c.block_size - 1) / c.block_size;
            for (int i = 0; i < blocks; ++i) table[s * max_blocks + i] = shuffled[next_block++];
            keys.push_back(random.normals(static_cast<std::size_t>(lengths[s]) * kv_width));
            values.push_back(random.normals(static_cast<std::size_t>(lengths[s]) * kv_width));
            for (int p = 0; p < lengths[s]; ++p) {
                const std::int32_t slot =
                    table[s * max_blocks + p / c.block_size] * c.block_size + p % c.block_size;
                k.kv_write(cache.view, slot, keys[s].data() + p * kv_width,
                           values[s].data() + p * kv_width);
                taken[slot] = 1;
                for (int i = 0; i < kv_width; i += dim) {
                    round_head(keys[s].data() + p * kv_width + i, dim, c.dtype);
                    round_head(values[s].data() + p * kv_width + i, dim, c.values());
                }
                for (int i = 0; i < kv_width; ++i) {
                    const std::size_t at = static_cast<std::size_t>(p) * kv_width + i;
                    written.same(cache.key(slot, i), keys[s][at], "key", i);
                    written.same(cache.value(slot, i), values[s][at], "value", i);
                }
                if (p >= lengths[s] - queries[s]) {
                    positions[token] = p;
                    slots[token++] = slot;
                }
            }
            starts.push_back(token);
            lens.push_back(lengths[s]);
        }
        for (std::size_t slot = 0; slot < taken.size(); ++slot)  // nothing else was written
            for (int i = 0; i < kv_width && !taken[slot]; ++i) {
                const int at = static_cast<int>(slot);
                written.truth(std::isnan(cache.key(at, i)), "free key", at);
                written.truth(std::isnan(cache.value(at, i)), "free value", at);
            }
        starts.back() = num_tokens;  // the padding rows count to the last sequence

        std::vector<float> q = random.normals(static_cast<std::size_t>(num_tokens) * heads * dim);
        for (float &x : q) x = static_cast<float>(rounded(x, Dtype::kBF16));
        Attention attention;
        attention.cache = cache.view;
        attention.num_heads = heads;
        attention.scale = 1 / std::sqrt(static_cast<float>(dim));
        attention.window = c.window;
        attention.softcap = c.softcap;
        StepView step;
        step.num_tokens = num_tokens;
        step.num_sequences = num_sequences;
        step.max_blocks = max_blocks;
        step.positions = positions.data();
        step.query_start = starts.data();
        step.seq_len = lens.data();
        step.block_table = table.data();
        step.slot = slots.data();
        std::vector<float> out(q.size()), first_out;
        for (int threads = 1; threads <= 3; ++threads) {
            std::fill(out.begin(), out.end(), kNaN);
            Pool pool(threads);
            const Memory shared(attention_shared_bytes(attention, step, threads));
            const std::size_t bytes = (attention_scratch_bytes(attention) + 63) / 64 * 64;
            std::vector<std::unique_ptr<Memory>> scratch;
            for (int i = 0; i < threads; ++i) scratch.push_back(std::make_unique<Memory>(bytes));
            const std::size_t bound =
                attention_shared_bound(attention, num_tokens, num_sequences, 530, threads);
            check.truth(shared.size() <= bound, "bound of shared bytes", threads);
            pool.run([&](int thread) {
                run_attention(k, attention, step, q.data(), heads * dim, out.data(), heads * dim,
                              pool, thread, shared.data(), scratch[thread]->data());
            });
            if (threads == 1) first_out = out;
            check.same_bits(out.data(), first_out.data(), 4 * out.size(), "threads", threads);
        }
        for (int s = 0; s < num_sequences; ++s)
            for (int t = starts[s]; t < starts[s + 1]; ++t)
                for (int h = 0; h < heads; ++h) {
                    const float *to = out.data() + (static_cast<std::size_t>(t) * heads + h) * dim;
                    if (slots[t] < 0) {
                        for (int d = 0; d < dim; ++d) check.same(to[d], 0, "padding", t);
                        continue;
                    }
                    const float *from = q.data() + (static_cast<std::size_t>(t) * heads + h) * dim;
                    const int begin = c.window > 0 ? std::max(0, positions[t] - c.window + 1) : 0;
                    std::vector<double> weight, sum(dim, 0.0);
                    double most = -HUGE_VAL, total = 0;
                    for (int p = begin; p <= positions[t]; ++p) {
                        const float *key = keys[s].data() + p * kv_width + h / c.group * dim;
                        double score = 0;
                        for (int d = 0; d < dim; ++d)
                            score += static_cast<double>(from[d]) * key[d];
                        score *= attention.scale;
                        if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
                        weight.push_back(score);
                        most = std::max(most, score);
                    }
                    for (int p = begin; p <= positions[t]; ++p) {
                        const double w = std::exp(weight[p - begin] - most);
                        const float *value = values[s].data() + p * kv_width + h / c.group * dim;
                        total += w;
                        for (int d = 0; d < dim; ++d) sum[d] += w * value[d];
                    }
                    for (int d = 0; d < dim; ++d) check.near(to[d], sum[d] / total, 4, "out", t);
                }
    }
}

// ----------------------------------------------------------------------------------- sampling

// What every machine must answer, to the bit: tokens and logprobs of check_sampler, FNV-1a. Another
// number is right only where kernels/sampling.py has changed.
constexpr std::uint64_t kSampled = 0xfa2363f9abd8b1c4u;

void check_sampler() {
    Check check("-", "sampler", 2e-5);
    constexpr int kVocab = 999, kRows = 24, kTop = 5;
    Random random{9};
    std::vector<float> logits = random.normals(kRows * kVocab);
    for (float &x : logits) x *= 3;
    // Rows by remainder of 6: greedy, the first alone, sampled from most of the mass, a failure, a
    // given token, greedy with the largest token banned.
    const auto kind = [](int r) { return r % 6; };
    const auto row = [&](int r) { return logits.data() + r * kVocab; };
    const auto first = [&](int r) {
        return static_cast<int>(std::max_element(row(r), row(r) + kVocab) - row(r));
    };
    std::vector<float> temperature(kRows, 1), top_p(kRows, 1), one(kRows, 1), zero(kRows, 0);
    std::vector<std::int32_t> top_k(kRows, 0), target(kRows, -1), num(kRows, kTop), mask(kRows, 0);
    std::vector<std::uint64_t> seed(kRows, 77);
    std::vector<std::uint32_t> index(kRows, 0), position(kRows), table((kVocab + 31) / 32, ~0u);
    std::vector<std::int32_t> none(kRows + 1, 0), ban_start(1, 0), ban_ids;
    for (int r = 0; r < kRows; ++r) {
        position[r] = static_cast<std::uint32_t>(r);
        if (kind(r) == 0 || kind(r) == 5) temperature[r] = 0;
        if (kind(r) == 1) top_k[r] = 1;
        if (kind(r) == 2) top_p[r] = 0.8f;
        if (kind(r) == 3) row(r)[500] = kNaN;
        if (kind(r) == 4) target[r] = 7;
        if (kind(r) == 5) ban_ids.push_back(first(r));
        ban_start.push_back(static_cast<std::int32_t>(ban_ids.size()));
    }
    SampleRows rows = {};
    rows.count = kRows;
    rows.temperature = temperature.data();
    rows.top_k = top_k.data();
    rows.top_p = top_p.data();
    rows.min_p = zero.data();
    rows.typical_p = one.data();
    rows.top_n_sigma = zero.data();
    rows.xtc_probability = zero.data();
    rows.xtc_threshold = zero.data();
    rows.repetition_penalty = one.data();
    rows.presence_penalty = zero.data();
    rows.frequency_penalty = zero.data();
    rows.seed = seed.data();
    rows.sample_index = index.data();
    rows.position = position.data();
    rows.target = target.data();
    rows.num_logprobs = num.data();
    rows.history_start = none.data();
    rows.bias_start = none.data();
    rows.ban_start = ban_start.data();
    rows.ban_ids = ban_ids.data();
    rows.mask_row = mask.data();
    rows.mask_table = table.data();
    rows.mask_words = table.size();

    std::vector<std::int32_t> tokens(kRows), ranks(kRows), top_ids(kRows * kTop), first_tokens;
    std::vector<float> logprobs(kRows), top(kRows * kTop), all(kRows * kVocab);
    std::uint64_t hash = 0;
    for (int threads = 1; threads <= 3; ++threads) {
        RowSampler sampler(kVocab, std::make_shared<Pool>(threads));
        sampler.run(logits.data(), kVocab, rows,
                    SampleAnswers{tokens.data(), logprobs.data(), ranks.data(), top_ids.data(),
                                  top.data(), kTop});
        sampler.log_softmax(logits.data(), kVocab, kRows, all.data());
        std::uint64_t bits = 0xcbf29ce484222325u;
        const auto take = [&bits](const void *from, std::size_t bytes) {
            for (std::size_t i = 0; i < bytes; ++i)
                bits = (bits ^ static_cast<const std::uint8_t *>(from)[i]) * 0x100000001b3u;
        };
        for (int r = 0; r < kRows; ++r) {
            if (kind(r) == 3) continue;  // NaN has many bits
            take(&tokens[r], 4);
            take(&logprobs[r], 4);
            take(all.data() + r * kVocab, 4 * kVocab);
        }
        check.truth(threads == 1 || bits == hash, "the same on threads", threads);
        hash = bits;
    }
    char text[80];
    std::snprintf(text, sizeof text, "bits are %#llx", static_cast<unsigned long long>(hash));
    check.truth(hash == kSampled, text);

    for (int r = 0; r < kRows; ++r) {
        const float *x = row(r);
        if (kind(r) == 3) {
            check.same(tokens[r], -1, "a row with NaN", r);
            continue;
        }
        std::vector<int> order(kVocab);
        for (int i = 0; i < kVocab; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [x](int a, int b) { return x[a] > x[b]; });
        double total = 0, before = 0;
        for (int i = 0; i < kVocab; ++i) total += std::exp(static_cast<double>(x[i]));
        for (int i = 0; i < kVocab; ++i)
            check.near(all[r * kVocab + i], x[i] - std::log(total), 1, "log_softmax", i);
        if (kind(r) == 0 || kind(r) == 1) check.same(tokens[r], order[0], "the first", r);
        if (kind(r) == 4) check.same(tokens[r], 7, "the target", r);
        if (kind(r) == 5) check.same(tokens[r], order[1], "the second", r);
        for (int i = 0; i < kTop; ++i) {
            check.same(top_ids[r * kTop + i], order[i], "top", r);
            check.same_bits(&top[r * kTop + i], &all[r * kVocab + order[i]], 4, "top logprob", r);
        }
        int rank = 0;
        while (order[rank] != tokens[r]) before += std::exp(static_cast<double>(x[order[rank++]]));
        check.same(ranks[r], rank + 1, "rank", r);
        check.same_bits(&logprobs[r], &all[r * kVocab + tokens[r]], 4, "logprob", r);
        if (kind(r) == 2) check.truth(before / total < 0.8001, "beyond the mass", r);
    }
}

// ------------------------------------------------------------------------------------ threads

void check_pool() {
    for (int size = 1; size <= 4; ++size) {
        Check check("-", "pool of " + std::to_string(size));
        Pool pool(size);
        check.same(pool.size(), size, "size", 0);
        std::vector<int> seen(size), before(size), wrong(size, 0);
        std::atomic<int> calls{0};
        const auto run = [&](int round) {
            pool.run([&](int thread) {  // plain memory: a sanitizer sees what is not ordered
                calls.fetch_add(1, std::memory_order_relaxed);
                for (int phase = 0; phase < 3; ++phase) {
                    seen[thread] = 3 * round + phase;
                    pool.barrier();
                    for (int other = 0; other < size; ++other)
                        wrong[thread] += seen[other] != 3 * round + phase;
                    pool.barrier();
                }
                before[thread] = round;
            });
            for (int thread = 0; thread < size; ++thread) {
                check.same(before[thread], round, "thread", thread);
                check.same(wrong[thread], 0, "seen by", thread);
            }
        };
        int rounds = 0;
        while (rounds < (size <= 2 ? 200 : 50)) run(rounds++);  // slow where cores are fewer
        for (int i = 0; i < 12; ++i) {  // workers go to sleep after 2 ms; some wake at that moment
            std::this_thread::sleep_for(std::chrono::microseconds(1800 + 100 * i));
            run(rounds++);
        }
        check.same(calls.load(), rounds * size, "calls", 0);

        std::vector<int> taken(1000, 0);
        pool.run([&](int thread) {
            if (thread == 0) pool.reset_tickets();
            pool.barrier();
            for (int i = pool.take_ticket(); i < 1000; i = pool.take_ticket()) ++taken[i];
            pool.barrier();
        });
        for (int i = 0; i < 1000; ++i) check.same(taken[i], 1, "ticket", i);
        for (int i = 0; i < 20; ++i) {
            Pool brief(size);  // ends while its workers begin
            if (i % 2) brief.run([](int) {});
        }
    }
    Check check("-", "usable_cores");
    check.truth(usable_cores() >= 1, "cores");
}

}  // namespace

int main(int argc, char **argv) {
    const auto wanted = [&](const char *name) {
        for (int i = 1; i < argc; ++i)
            if (std::strcmp(argv[i], name) == 0) return true;
        return argc == 1;
    };
    std::printf("tables:");
    for (int i = 0; usable_kernels(i) != nullptr; ++i) std::printf(" %s", usable_kernels(i)->name);
    std::printf("\n");
    if (find_kernels(nullptr) != usable_kernels(0) || find_kernels("no such table") != nullptr) {
        std::printf("find_kernels FAILED\n");
        ++failures;
    }
    for (int i = 0; usable_kernels(i) != nullptr; ++i) {
        const Kernels &k = *usable_kernels(i);
        if (wanted("rows")) {
            check_norm(k);
            check_elementwise(k);
            check_rope(k);
            check_rounding(k);
            check_int8(k);
        }
        if (wanted("tiles")) check_tiles(k);
        if (wanted("compact")) check_compact(k);
        if (wanted("numbers")) {  // generic, the last table, rounds its multiply-adds twice
            const bool has_peer = usable_kernels(i + 1) != nullptr && usable_kernels(i + 2) != nullptr;
            check_numbers_of_rows(k, has_peer ? *usable_kernels(i + 1) : k);
        }
        if (wanted("linear")) check_linear(k);
        if (wanted("attention")) check_attention(k);
    }
    if (wanted("sampler")) check_sampler();
    if (wanted("pool")) check_pool();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
