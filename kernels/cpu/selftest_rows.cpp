// Self-test of what is done to rows alone: norms, activations, rope, roundings, int8.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "selftest_numbers.hpp"

namespace engineroom {
namespace selftest {
namespace {

const int kLengths[] = {1, 7, 15, 16, 17, 32, 33, 64, 100, 255, 576, 2049};

void check_norm(const Kernels &k) {
    Check check(k.name, "rms_norm", 2e-6);
    Random random{1};
    for (int n : kLengths)
        for (float offset : {0.0f, 1.0f}) {
            const std::vector<float> x = random.normals(n), w = random.normals(n);
            std::vector<float> out(n, kNaN), in_place = x;
            k.rms_norm(x.data(), w.data(), out.data(), n, 1e-5f, offset, Dtype::kF32);
            k.rms_norm(in_place.data(), w.data(), in_place.data(), n, 1e-5f, offset, Dtype::kF32);
            double squares = 0;
            for (float v : x) squares += static_cast<double>(v) * v;
            const double inverse = 1 / std::sqrt(squares / n + static_cast<double>(1e-5f));
            for (int i = 0; i < n; ++i) {
                const double want = x[i] * inverse * (static_cast<double>(w[i]) + offset);
                check.near(out[i], want, std::fabs(want) + std::fabs(x[i]) * 1e-1, "out", i);
            }
            check.same_bits(out.data(), in_place.data(), 4 * out.size(), "in place", n);
            for (Dtype dtype : {Dtype::kBF16, Dtype::kF16}) {
                std::vector<float> narrow(n, kNaN);
                k.rms_norm(x.data(), w.data(), narrow.data(), n, 1e-5f, offset, dtype);
                for (int i = 0; i < n; ++i)
                    check.same(narrow[i], rounded(out[i], dtype), "rounded", i);
            }
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
                check.truth(has_fine && std::isnan(fine_scale[fine]) && std::isnan(scaled[g]),
                            "a group with NaN or infinity", g);
                ++fine;
                continue;
            }
            int exponent = 0;
            const double part = std::frexp(static_cast<float>(most) * (1.0f / 127), &exponent);
            const double raised = std::ldexp(std::ceil(part * 2 * kScaleSteps) / (2 * kScaleSteps), exponent);
            check.same(scale[g], most > 0 ? raised : 1, "scale", g);
            for (int i = 32 * g; i < 32 * g + 32; ++i) {
                const double want = i < n && most > 0 ? x[i] / raised : 0;
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

}  // namespace

void check_rows(const Kernels &k) {
    check_norm(k);
    check_elementwise(k);
    check_rope(k);
    check_rounding(k);
    check_int8(k);
}

}  // namespace selftest
}  // namespace engineroom
