// Exact sums of weights, and which tokens are first in some order: by buckets instead of a sort.
#include <algorithm>
#include <cmath>

#include "sample_math.hpp"
#include "sample_parts.hpp"

namespace engineroom {
namespace sampling {

constexpr int kGroup = 64;  // keys that are passed over together
constexpr int kShareBits = 24;

std::int64_t share(std::int64_t total, float p) {
    const std::int64_t one = std::int64_t{1} << kShareBits;
    const auto scaled = static_cast<std::int64_t>(std::rint(p * static_cast<float>(one)));
    const std::int64_t low = (total & (one - 1)) * scaled;
    return (total >> kShareBits) * scaled + ((low + one - 1) >> kShareBits);
}

ER_WIDE_VERSIONS std::int64_t weights(const float *ER_RESTRICT z, int n,
                                      std::int64_t *ER_RESTRICT weight) {
    std::int64_t total = 0;
    for (int i = 0; i < n; ++i) {
        const std::int64_t w = weight_of(z[i]);
        weight[i] = w;
        total += w;
    }
    return total;
}

ER_WIDE_VERSIONS std::int64_t sum_of_weights(const float *x, int n, float highest) {
    std::int64_t total = 0;
    for (int i = 0; i < n; ++i) total += weight_of(x[i] - highest);
    return total;
}

float log_sum(std::int64_t total) {
    return log_f32(static_cast<float>(total) * static_cast<float>(1.0 / kWeightOne));
}

ER_WIDE_VERSIONS int first_largest(const float *x, int n) {
    constexpr int kBlock = 1024;
    constexpr std::int32_t kAbove = 0x7f800000, kBelow = ~0x7f800000;  // ordered(inf), (-inf)
    std::int32_t largest = kBelow, least = kBelow;
    int from = 0;
    for (int start = 0; start < n; start += kBlock) {
        const int end = std::min(n, start + kBlock);
        std::int32_t high = kBelow;
        for (int i = start; i < end; ++i) {
            const std::int32_t key = ordered(x[i]);
            high = key > high ? key : high;
            least = key < least ? key : least;
        }
        if (high > largest) {
            largest = high;
            from = start;
        }
    }
    if (largest >= kAbove || largest == kBelow || least < kBelow) return -1;
    while (ordered(x[from]) != largest) ++from;
    return from;
}

ER_WIDE_VERSIONS int count_above(const float *x, int n, float value) {
    int count = 0;
    for (int i = 0; i < n; ++i) count += x[i] > value;
    return count;
}

// Keys of -x.
ER_WIDE_VERSIONS void keys_of_negative(const float *ER_RESTRICT x, int n,
                                       std::uint32_t *ER_RESTRICT key) {
    for (int i = 0; i < n; ++i) key[i] = key_of(-x[i]);
}

ER_WIDE_VERSIONS std::uint32_t least_key(const std::uint32_t *key, int n) {
    std::uint32_t least = 0xffffffffu;
    for (int i = 0; i < n; ++i) least = key[i] < least ? key[i] : least;
    return least;
}

namespace {

// A prefix in the order (score, index): all whose key is below `key`, and of those that equal it
// the first ones, until with `before` their weights reach what is needed (one at least).
struct Border {
    std::uint32_t key;
    std::int64_t before;  // weight of all below
};

// Keys of |z + h|.
ER_WIDE_VERSIONS void keys_of_distance(const float *ER_RESTRICT z, int n, float h,
                                       std::uint32_t *ER_RESTRICT key) {
    for (int i = 0; i < n; ++i) {
        key[i] = key_of(float_of_bits(bits_of_float(z[i] + h) & 0x7fffffff));
    }
}

// By buckets of the keys' upper bits, then within the bucket where the border lies, three times.
template <class Weight>
Border find_border(const std::uint32_t *key, int n, Weight weight, std::int64_t needed,
                   std::int64_t *mass) {
    if (needed <= 0) return {least_key(key, n), 0};
    Border border{0, 0};
    int known = 0;  // upper bits of the border that are settled
    for (const int bits : {11, 11, 10}) {
        const int shift = 32 - known - bits, buckets = 1 << bits;
        std::fill(mass, mass + buckets, 0);
        for (int i = 0; i < n; ++i) {
            if ((static_cast<std::uint64_t>(key[i] ^ border.key) >> (32 - known)) == 0) {
                mass[(key[i] >> shift) & (buckets - 1)] += weight(i);
            }
        }
        int bucket = 0;
        while (bucket + 1 < buckets && border.before + mass[bucket] < needed) {
            border.before += mass[bucket++];
        }
        border.key |= static_cast<std::uint32_t>(bucket) << shift;
        known += bits;
    }
    return border;
}

// Calls visit(start, end) for the stretches of keys that have one at or below `limit`.
template <class Visit>
ER_INLINE void visit_groups(const std::uint32_t *key, int n, std::uint32_t limit, Visit visit) {
    for (int start = 0; start < n; start += kGroup) {
        const int size = std::min(kGroup, n - start);
        if (least_key(key + start, size) <= limit) visit(start, start + size);
    }
}

// The border behind the first `wanted` of n > wanted keys.
Border border_of_first(const std::uint32_t *key, int n, int wanted, SampleWork &work) {
    const auto one = [](int) { return 1; };
    const int groups = n / kGroup;
    if (wanted > groups / 2) return find_border(key, n, one, wanted, work.mass.data());
    // The wanted-th of the groups' least keys has that many keys at or below it.
    std::uint32_t *candidate = work.candidate.data();
    for (int g = 0; g < groups; ++g) candidate[g] = least_key(key + g * kGroup, kGroup);
    std::nth_element(candidate, candidate + wanted - 1, candidate + groups);
    const std::uint32_t limit = candidate[wanted - 1];
    int count = 0;
    visit_groups(key, n, limit, [&](int start, int end) {
        for (int i = start; i < end; ++i) {
            candidate[count] = key[i];
            count += key[i] <= limit;
        }
    });
    return find_border(candidate, count, one, wanted, work.mass.data());
}

template <class Weight>
void keep_to_border(Kept &kept, const std::uint32_t *key, const Border &border, Weight weight,
                    std::int64_t needed) {
    std::int64_t reached = border.before;
    bool open = true;
    int n = 0;
    visit_groups(key, kept.n, border.key, [&](int start, int end) {
        n = move_kept(kept, start, end, n, [&](int i) {
            if (key[i] != border.key) return key[i] < border.key;
            const bool stays = open;
            reached += weight(i);
            open = open && reached < needed;
            return stays;
        });
    });
    kept.n = n;
}

ER_WIDE_VERSIONS std::int64_t mass_within(const std::uint32_t *ER_RESTRICT key,
                                          const std::int64_t *ER_RESTRICT weight, int n,
                                          std::uint32_t limit) {
    std::int64_t mass = 0;
    for (int i = 0; i < n; ++i) mass += weight[i] & -static_cast<std::int64_t>(key[i] <= limit);
    return mass;
}

// Drops all whose key is above `limit`, with their keys and weights.
void keep_within(Kept &kept, std::uint32_t limit, SampleWork &work) {
    std::uint32_t *key = work.key.data();
    std::int64_t *weight = work.weight.data();
    int n = 0;
    visit_groups(key, kept.n, limit, [&](int start, int end) {
        for (int i = start; i < end; ++i) {
            const bool stays = key[i] <= limit;
            kept.ids[n] = kept.ids[i];
            kept.z[n] = kept.z[i];
            weight[n] = weight[i];
            key[n] = key[i];
            n += stays;
        }
    });
    kept.n = n;
}

}  // namespace

void keep_least(Kept &kept, int n, SampleWork &work) {
    const std::uint32_t *key = work.key.data();
    keep_to_border(kept, key, border_of_first(key, kept.n, n, work), [](int) { return 1; }, n);
}

void keep_mass(Kept &kept, float h, std::int64_t total, float p, SampleWork &work) {
    const auto weight = [w = work.weight.data()](int i) { return w[i]; };
    keys_of_distance(kept.z, kept.n, h, work.key.data());
    const std::int64_t needed = share(total, p);
    for (const float reach : {4.0f, 12.0f}) {  // few tokens hold most of the weight, as a rule
        const std::uint32_t limit = key_of(reach);
        const std::int64_t mass = mass_within(work.key.data(), work.weight.data(), kept.n, limit);
        if (mass > 0 && mass >= needed) {
            keep_within(kept, limit, work);
            break;
        }
    }
    const Border border =
        find_border(work.key.data(), kept.n, weight, needed, work.mass.data());
    keep_to_border(kept, work.key.data(), border, weight, needed);
}

}  // namespace sampling
}  // namespace engineroom
