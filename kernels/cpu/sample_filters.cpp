// The filters: which of the tokens kept so far a row's top-k, top-p and the others leave.
#include <algorithm>
#include <cmath>

#include "sample_math.hpp"
#include "sample_parts.hpp"

namespace engineroom {
namespace sampling {
namespace {

constexpr int kSigmaBits = 20;

ER_WIDE_VERSIONS float largest_distance(const float *d, int n) {
    std::int32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const std::int32_t bits = bits_of_float(d[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return float_of_bits(largest);
}

struct Moments {
    std::int64_t first, second;
};

ER_WIDE_VERSIONS Moments moments_of(const float *d, int n, float scale) {
    Moments sum{0, 0};
    for (int i = 0; i < n; ++i) {
        const std::int64_t q = static_cast<std::int32_t>(rint_f32(d[i] * scale));
        sum.first += q;
        sum.second += q * q;
    }
    return sum;
}

double sigma(const float *d, int n) {
    int exponent = 0;
    std::frexp(largest_distance(d, n), &exponent);
    exponent = std::max(exponent, -100);
    const Moments sum =
        moments_of(d, n, static_cast<float>(std::ldexp(1.0, kSigmaBits - exponent)));
    const double count = n;
    const double mean = static_cast<double>(sum.first) / count;
    const double variance = static_cast<double>(sum.second) / count - mean * mean;
    return std::sqrt(std::max(variance, 0.0)) * std::ldexp(1.0, exponent - kSigmaBits);
}

// Fills `weight`; `first` is the weights' sum, `second` that of e^z * -z in the same unit.
ER_WIDE_VERSIONS Moments entropy_sums(const float *ER_RESTRICT z, int n,
                                      std::int64_t *ER_RESTRICT weight) {
    Moments sum{0, 0};
    for (int i = 0; i < n; ++i) {
        const float e = exp_f32(z[i]);
        const std::int64_t w = rint_i64(e * kWeightOne);
        weight[i] = w;
        sum.first += w;
        sum.second += rint_i64((e * -z[i]) * kWeightOne);
    }
    return sum;
}

ER_WIDE_VERSIONS void subtract(float *z, int n, float amount) {
    for (int i = 0; i < n; ++i) z[i] = z[i] - amount;
}

ER_WIDE_VERSIONS void exps(const float *ER_RESTRICT z, int n, float *ER_RESTRICT out) {
    for (int i = 0; i < n; ++i) out[i] = exp_f32(z[i]);
}

}  // namespace

void keep_finite(Kept &kept) {
    if (count_above(kept.z, kept.n, -kInfinity) == kept.n) return;
    keep_where(kept, [&](int i) { return kept.z[i] > -kInfinity; });
}

void keep_top_n_sigma(Kept &kept, float n) {
    const float least = -static_cast<float>(static_cast<double>(n) * sigma(kept.z, kept.n));
    keep_where(kept, [&](int i) { return kept.z[i] >= least; });
}

void keep_first(Kept &kept, int n, SampleWork &work) {
    if (n >= kept.n) return;
    keys_of_negative(kept.z, kept.n, work.key.data());
    keep_least(kept, n, work);
}

void keep_typical(Kept &kept, float p, SampleWork &work) {
    const Moments sum = entropy_sums(kept.z, kept.n, work.weight.data());
    const float h = static_cast<float>(sum.second) / static_cast<float>(sum.first);
    keep_mass(kept, h, sum.first, p, work);
    const int best = first_largest(kept.z, kept.n);
    if (best >= 0) subtract(kept.z, kept.n, kept.z[best]);
}

void keep_top_p(Kept &kept, float p, SampleWork &work) {
    const std::int64_t total = weights(kept.z, kept.n, work.weight.data());
    keep_mass(kept, 0.0f, total, p, work);
}

void keep_min_p(Kept &kept, float p, SampleWork &work) {
    const float *e = work.dense.data();
    exps(kept.z, kept.n, work.dense.data());
    keep_where(kept, [&](int i) { return e[i] >= p; });
}

void keep_xtc(Kept &kept, float threshold, SampleWork &work) {
    const std::int64_t *w = work.weight.data();
    const std::int64_t least = share(weights(kept.z, kept.n, work.weight.data()), threshold);
    int count = 0, last = -1;
    for (int i = 0; i < kept.n; ++i) {
        if (w[i] < least) continue;
        ++count;
        if (last < 0 || kept.z[i] <= kept.z[last]) last = i;
    }
    if (count >= 2) keep_where(kept, [&](int i) { return w[i] < least || i == last; });
}

}  // namespace sampling
}  // namespace engineroom
