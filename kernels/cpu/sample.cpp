// The sampling program of kernels/sampling.py, bit for bit; functions bear the names used there.
//
// Each element takes the specification's IEEE operations in its order (the build forbids
// contraction to fused multiply-add) and sums are of integers, so neither vector width nor threads
// show in a result. What differs is how much is computed: a prefix in some order is found by
// buckets instead of a sort, and noise is drawn only where it could make a token win.
#include "sample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "counter.hpp"

// A copy of each loop for wider vectors, chosen by the dynamic loader from what the processor
// reports. Needs glibc's indirect functions.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define ER_VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ER_VERSIONS
#endif

#define ER_RESTRICT __restrict
#define ER_INLINE inline __attribute__((always_inline))

namespace engineroom {

constexpr int kChunk = 256;  // tokens whose noise is drawn together
constexpr int kGroup = 64;   // keys that are passed over together

struct SampleWork {
    explicit SampleWork(int vocab_size)
        : x(vocab_size), z(vocab_size), dense(vocab_size), ids(vocab_size), key(vocab_size),
          candidate(vocab_size), weight(vocab_size), mass(1 << 11) {}

    std::vector<float> x;                  // adjusted logits
    std::vector<float> z;                  // of the tokens kept, or of all
    std::vector<float> dense;              // z by token id
    std::vector<std::int32_t> ids;         // of the tokens kept, ascending
    std::vector<std::uint32_t> key;        // of a score
    std::vector<std::uint32_t> candidate;  // keys that may be among the first
    std::vector<std::int64_t> weight;
    std::vector<std::int64_t> mass;  // by bucket
    alignas(64) std::uint32_t words[4][kChunk / 4];
    alignas(64) float score[kChunk];
};

namespace {

constexpr std::int32_t kFailed = -1;
constexpr float kWeightOne = 0x1p40f;
constexpr int kShareBits = 24, kSigmaBits = 20;
constexpr std::uint32_t kStreamGumbel = 0, kStreamXtc = 1;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

constexpr float kExpZeroBelow = -87.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.1219444005469057e-4f;
constexpr std::int32_t kSqrtHalfBits = 0x3F3504F3;
constexpr float kExpPoly[] = {0.4999999403953552f, 0.1666652113199234f, 0.04166838899254799f,
                              0.008368710055947304f, 0.0013814610429108143f};
constexpr float kLogPoly[] = {0.3333331346511841f,   -0.25000008940696716f, 0.2000211924314499f,
                              -0.1666799634695053f,  0.14219550788402557f,  -0.12405591458082199f,
                              0.11888174712657928f,  -0.11675640940666199f, 0.06746601313352585f};

// Noise lies strictly below; adding either bound rounds as monotonically as adding the noise.
constexpr float kNoiseBelow = 23.0f;

// Where more words than these (one in sixteen) may decide, a chunk's noise is made as a whole.
constexpr std::uint32_t kManyWords = 1u << 28;

ER_INLINE float float_of_bits(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ER_INLINE std::int32_t bits_of_float(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// By bits: of a conditional GCC makes a branch around the work, and then no vector loop.
ER_INLINE float select(bool condition, float yes, float no) {
    const std::int32_t mask = -static_cast<std::int32_t>(condition);
    return float_of_bits((bits_of_float(yes) & mask) | (bits_of_float(no) & ~mask));
}

// Integers in the order of floats, -0 and 0 equal, every NaN outside [-inf, inf].
ER_INLINE std::int32_t ordered(float value) {
    const std::int32_t bits = bits_of_float(value + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// ---- elementary functions

// To the nearest even integer, for |x| < 2^22: where the float's last bit is worth 1.
ER_INLINE float rint_f32(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// The same for 0 <= x <= 2^40, into an integer: the last bit of a double near 2^52 is worth 1.
ER_INLINE std::int64_t rint_i64(float x) {
    const double shifted = static_cast<double>(x) + 0x1.8p52;
    std::int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4338000000000000;
}

template <std::size_t N>
ER_INLINE float horner(const float (&poly)[N], float x) {
    float y = poly[N - 2] + poly[N - 1] * x;
    for (int i = static_cast<int>(N) - 3; i >= 0; --i) y = y * x + poly[i];
    return y;
}

ER_INLINE float exp_f32(float x) {
    const float clamped = select(x > kExpZeroBelow, x, kExpZeroBelow);
    const float n = rint_f32(clamped * kLog2E);
    const float r = (clamped - n * kLn2Hi) - n * kLn2Lo;
    float y = (r * r) * horner(kExpPoly, r);
    y = (y + r) + 1.0f;
    const float power = float_of_bits((static_cast<std::int32_t>(n) + 127) * (1 << 23));  // 2^n
    return select(x < kExpZeroBelow, 0.0f, y * power);
}

struct Reduced {
    float k, m;
};

ER_INLINE Reduced reduce(float x) {
    const std::int32_t bits = bits_of_float(x);
    const std::int32_t k = (bits - kSqrtHalfBits) >> 23;
    return {static_cast<float>(k), float_of_bits(bits - k * (1 << 23))};
}

ER_INLINE float log_reduced(float k, float f) {
    const float square = f * f;
    float y = (f * square) * horner(kLogPoly, f);
    y = y + k * kLn2Lo;
    y = y - 0.5f * square;
    return (f + y) + k * kLn2Hi;
}

ER_INLINE float log_f32(float x) {
    const Reduced reduced = reduce(x);
    return log_reduced(reduced.k, reduced.m - 1.0f);
}

ER_INLINE float exponential_f32(float u) {
    const Reduced reduced = reduce(1.0f - u);
    return -log_reduced(reduced.k, select(u < 0.25f, -u, reduced.m - 1.0f));
}

ER_INLINE float gumbel_f32(float u) { return -log_f32(exponential_f32(u)); }

// ---- exact sums and order

ER_INLINE std::int64_t weight_of(float z) { return rint_i64(exp_f32(z) * kWeightOne); }

std::int64_t share(std::int64_t total, float p) {
    const std::int64_t one = std::int64_t{1} << kShareBits;
    const auto scaled = static_cast<std::int64_t>(std::rint(p * static_cast<float>(one)));
    const std::int64_t low = (total & (one - 1)) * scaled;
    return (total >> kShareBits) * scaled + ((low + one - 1) >> kShareBits);
}

// weight[i] = weights(z)[i]; returns their sum.
ER_VERSIONS std::int64_t weights(const float *ER_RESTRICT z, int n,
                                 std::int64_t *ER_RESTRICT weight) {
    std::int64_t total = 0;
    for (int i = 0; i < n; ++i) {
        const std::int64_t w = weight_of(z[i]);
        weight[i] = w;
        total += w;
    }
    return total;
}

ER_VERSIONS std::int64_t sum_of_weights(const float *x, int n, float highest) {
    std::int64_t total = 0;
    for (int i = 0; i < n; ++i) total += weight_of(x[i] - highest);
    return total;
}

float log_sum(std::int64_t total) {
    return log_f32(static_cast<float>(total) * static_cast<float>(1.0 / kWeightOne));
}

// Index of the first of the largest, or -1: a NaN or +inf is there, or nothing finite.
ER_VERSIONS int first_largest(const float *x, int n) {
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

ER_VERSIONS int count_above(const float *x, int n, float value) {
    int count = 0;
    for (int i = 0; i < n; ++i) count += x[i] > value;
    return count;
}

// A prefix in the order (score, index): all whose key is below `key`, and of those that equal it
// the first ones, until with `before` their weights reach what is needed (one at least).
struct Border {
    std::uint32_t key;
    std::int64_t before;  // weight of all below
};

constexpr std::uint32_t kSignBit = 0x80000000u;

ER_INLINE std::uint32_t key_of(float score) {
    return static_cast<std::uint32_t>(ordered(score)) ^ kSignBit;
}

// Keys of |z + h|.
ER_VERSIONS void keys_of_distance(const float *ER_RESTRICT z, int n, float h,
                                  std::uint32_t *ER_RESTRICT key) {
    for (int i = 0; i < n; ++i) {
        key[i] = key_of(float_of_bits(bits_of_float(z[i] + h) & 0x7fffffff));
    }
}

// Keys of -x.
ER_VERSIONS void keys_of_negative(const float *ER_RESTRICT x, int n,
                                  std::uint32_t *ER_RESTRICT key) {
    for (int i = 0; i < n; ++i) key[i] = key_of(-x[i]);
}

ER_VERSIONS std::uint32_t least_key(const std::uint32_t *key, int n) {
    std::uint32_t least = 0xffffffffu;
    for (int i = 0; i < n; ++i) least = key[i] < least ? key[i] : least;
    return least;
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

// ---- the tokens that stages have kept: ids ascending, z by place

struct Kept {
    int n;
    std::int32_t *ids;
    float *z;
};

// Moves those of places start .. end - 1 that stay to place n and on, which is not beyond start.
template <class Keep>
ER_INLINE int move_kept(Kept &kept, int start, int end, int n, Keep keep) {
    for (int i = start; i < end; ++i) {
        const bool stays = keep(i);
        kept.ids[n] = kept.ids[i];
        kept.z[n] = kept.z[i];
        n += stays;
    }
    return n;
}

template <class Keep>
ER_INLINE void keep_where(Kept &kept, Keep keep) {
    kept.n = move_kept(kept, 0, kept.n, 0, keep);
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

void keep_finite(Kept &kept) {
    if (count_above(kept.z, kept.n, -kInfinity) == kept.n) return;
    keep_where(kept, [&](int i) { return kept.z[i] > -kInfinity; });
}

void keep_first(Kept &kept, int n, SampleWork &work) {
    if (n >= kept.n) return;
    keys_of_distance(kept.z, kept.n, 0.0f, work.key.data());
    const Border border = border_of_first(work.key.data(), kept.n, n, work);
    keep_to_border(kept, work.key.data(), border, [](int) { return 1; }, n);
}

ER_VERSIONS std::int64_t mass_within(const std::uint32_t *ER_RESTRICT key,
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

// In the order (|z + h|, id), by work.weight.
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

// ---- filters

ER_VERSIONS float largest_distance(const float *d, int n) {
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

ER_VERSIONS Moments moments_of(const float *d, int n, float scale) {
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

void keep_top_n_sigma(Kept &kept, float n) {
    const float least = -static_cast<float>(static_cast<double>(n) * sigma(kept.z, kept.n));
    keep_where(kept, [&](int i) { return kept.z[i] >= least; });
}

// Fills `weight`; `first` is the weights' sum, `second` that of e^z * -z in the same unit.
ER_VERSIONS Moments entropy_sums(const float *ER_RESTRICT z, int n,
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

ER_VERSIONS void subtract(float *z, int n, float amount) {
    for (int i = 0; i < n; ++i) z[i] = z[i] - amount;
}

// Measures z from the largest kept afterwards: this filter alone can lose the most likely token.
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

ER_VERSIONS void exps(const float *ER_RESTRICT z, int n, float *ER_RESTRICT out) {
    for (int i = 0; i < n; ++i) out[i] = exp_f32(z[i]);
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

// ---- noise

float noise_of(const Draw &draw, std::int32_t id) {
    const PhiloxBlock block = philox4x32(draw, static_cast<std::uint32_t>(id) / 4);
    return gumbel_f32(uniform_of_word(block.word[id % 4]));
}

ER_VERSIONS float largest_of(const float *z, int n) {
    std::int32_t largest = ordered(-kInfinity);  // of floats GCC makes no vector maximum
    for (int i = 0; i < n; ++i) {
        const std::int32_t key = ordered(z[i]);
        largest = key > largest ? key : largest;
    }
    return float_of_bits(largest ^ ((largest >> 31) & 0x7fffffff));
}

// words[j][i] = word of token id 4 * (block + i) + j.
ER_VERSIONS void draw_words(const Draw &draw, std::uint32_t block,
                            std::uint32_t (*ER_RESTRICT words)[kChunk / 4]) {
    for (int i = 0; i < kChunk / 4; ++i) {
        const PhiloxBlock drawn = philox4x32(draw, block + static_cast<std::uint32_t>(i));
        for (int j = 0; j < 4; ++j) words[j][i] = drawn.word[j];
    }
}

// No word above this gives noise that lifts z <= 0 to a score: the noise is -log(-log(1 - u)),
// hence at most -log(u); the slack is beyond what rounding adds to it and to the score.
std::uint32_t highest_word(float z, float score) {
    const double slack = 0.01 + std::fabs(static_cast<double>(score)) * 0x1p-23;
    const double u = std::exp(static_cast<double>(z) - score + slack);
    return static_cast<std::uint32_t>(std::min(u * 0x1p32, 0x1p32 - 1));
}

// score[i] = z[i] + noise of the chunk's token i.
ER_VERSIONS void add_noise(const float *ER_RESTRICT z, int n,
                           const std::uint32_t (*ER_RESTRICT words)[kChunk / 4],
                           float *ER_RESTRICT score) {
    for (int i = 0; i < kChunk / 4; ++i) {
        for (int j = 0; j < 4; ++j) score[4 * i + j] = uniform_of_word(words[j][i]);
    }
    for (int i = 0; i < n; ++i) score[i] = z[i] + gumbel_f32(score[i]);
}

// argmax of z + noise over z by token id, -inf where a token is out; -1 where all are.
int draw_from_all(const float *z, int n, const Draw &draw, SampleWork &work) {
    const int top = first_largest(z, n);
    if (top < 0) return kFailed;
    const float floor = z[top] + noise_of(draw, top);  // the winner has this much at least
    float best = -kInfinity;
    int winner = kFailed;
    const auto meet = [&](int id, float score) {  // of equal scores the lowest id's wins
        if (score < best || (score == best && id > winner)) return;
        best = score;
        winner = id;
    };
    for (int start = 0; start < n; start += kChunk) {
        const int size = std::min(kChunk, n - start);
        const float needed = std::max(floor, best), highest = largest_of(z + start, size);
        if (highest + kNoiseBelow < needed) continue;
        draw_words(draw, static_cast<std::uint32_t>(start) / 4, work.words);
        const std::uint32_t limit = highest_word(highest, needed);
        if (limit > kManyWords) {
            add_noise(z + start, size, work.words, work.score);
            const int place = first_largest(work.score, size);
            if (place >= 0) meet(start + place, work.score[place]);
            continue;
        }
        for (int j = 0; j < 4; ++j) {
            const std::uint32_t *words = work.words[j];
            if (least_key(words, kChunk / 4) > limit) continue;
            for (int i = 0; i < kChunk / 4; ++i) {
                const int id = start + 4 * i + j;
                if (words[i] > limit || id >= n) continue;
                meet(id, z[id] + gumbel_f32(uniform_of_word(words[i])));
            }
        }
    }
    return winner;
}

// The same over the tokens kept.
int draw_from_kept(const Kept &kept, int vocab_size, const Draw &draw, SampleWork &work) {
    if (kept.n > vocab_size / 16) {  // dense noise comes sixteen times as fast
        std::fill(work.dense.begin(), work.dense.end(), -kInfinity);
        for (int i = 0; i < kept.n; ++i) work.dense[kept.ids[i]] = kept.z[i];
        return draw_from_all(work.dense.data(), vocab_size, draw, work);
    }
    float best = -kInfinity;
    int winner = kFailed;
    for (int i = 0; i < kept.n; ++i) {
        if (kept.z[i] + kNoiseBelow < best) continue;
        const float score = kept.z[i] + noise_of(draw, kept.ids[i]);
        if (score > best) {
            best = score;
            winner = kept.ids[i];
        }
    }
    return winner;
}

// ---- the program, one row

// Stages 1 to 3: x itself where nothing applies, else a changed copy in work.x.
const float *adjust(const float *x, const SampleRows &rows, int r, int n, SampleWork &work) {
    const int bias = rows.bias_start[r], bias_end = rows.bias_start[r + 1];
    const int ban = rows.ban_start[r], ban_end = rows.ban_start[r + 1];
    const int history = rows.history_start[r], history_end = rows.history_start[r + 1];
    const float factor = rows.repetition_penalty[r], presence = rows.presence_penalty[r];
    const float frequency = rows.frequency_penalty[r];
    const bool penalised =
        history_end > history && (factor != 1.0f || presence != 0.0f || frequency != 0.0f);
    if (bias == bias_end && ban == ban_end && rows.mask_row[r] == 0 && !penalised) return x;
    float *out = work.x.data();
    std::memcpy(out, x, static_cast<std::size_t>(n) * sizeof(float));
    for (int i = bias; i < bias_end; ++i) {
        out[rows.bias_ids[i]] = x[rows.bias_ids[i]] + rows.bias_values[i];
    }
    for (int i = ban; i < ban_end; ++i) out[rows.ban_ids[i]] = -kInfinity;
    if (rows.mask_row[r] != 0) {
        const std::uint32_t *mask = rows.mask_table + rows.mask_row[r] * rows.mask_words;
        for (int start = 0; start < n; start += 32) {
            const std::uint32_t allowed = mask[start / 32];
            if (allowed == 0xffffffffu) continue;
            const int end = std::min(n, start + 32);
            for (int i = start; i < end; ++i) {
                if (!(allowed >> (i - start) & 1u)) out[i] = -kInfinity;
            }
        }
    }
    for (int i = history; penalised && i < history_end; ++i) {
        float &seen = out[rows.history_ids[i]];
        const std::int32_t count = rows.history_count[i];
        seen = seen > 0.0f ? seen / factor : seen * factor;
        seen = seen - frequency * static_cast<float>(count);
        seen = seen - (count > 0 ? presence : 0.0f);
    }
    return out;
}

// d = x - highest.
ER_VERSIONS void distances(const float *ER_RESTRICT x, int n, float highest,
                           float *ER_RESTRICT d) {
    for (int i = 0; i < n; ++i) d[i] = x[i] - highest;
}

// z = d / temperature in place; what was dropped stays so, whatever the temperature.
ER_VERSIONS void temper(float *d, int n, float temperature) {
    for (int i = 0; i < n; ++i) {
        d[i] = select(d[i] > -kInfinity, d[i] / temperature, -kInfinity);
    }
}

// Stages 4 to 13 on adjusted logits x whose first largest is at `best` (-1: there is none).
int choose(const float *x, int best, const SampleRows &rows, int r, int n, SampleWork &work) {
    const float temperature = rows.temperature[r];
    if (best < 0 || temperature == 0.0f) return best;
    const Draw draw{rows.seed[r], rows.sample_index[r], rows.position[r], kStreamGumbel};
    const auto cuts = [&] {  // XTC acts by chance, and draws on another stream than the noise
        if (!(rows.xtc_probability[r] > 0.0f)) return false;
        Draw of_xtc = draw;
        of_xtc.stream = kStreamXtc;
        return uniform_of_word(philox4x32(of_xtc, 0).word[0]) < rows.xtc_probability[r];
    };
    const bool sigma = rows.top_n_sigma[r] > 0.0f, first = rows.top_k[r] > 0;
    const bool typical = rows.typical_p[r] < 1.0f, top = rows.top_p[r] < 1.0f;
    const bool least = rows.min_p[r] > 0.0f, xtc = cuts();

    Kept kept{n, work.ids.data(), work.z.data()};
    distances(x, n, x[best], kept.z);
    if (!(sigma || first || typical || top || least || xtc)) {
        temper(kept.z, n, temperature);
        return draw_from_all(kept.z, n, draw, work);
    }
    for (int i = 0; i < n; ++i) kept.ids[i] = i;
    keep_finite(kept);
    if (sigma) keep_top_n_sigma(kept, rows.top_n_sigma[r]);
    temper(kept.z, kept.n, temperature);
    keep_finite(kept);
    if (first) keep_first(kept, rows.top_k[r], work);
    if (typical) keep_typical(kept, rows.typical_p[r], work);
    if (top) keep_top_p(kept, rows.top_p[r], work);
    if (least) keep_min_p(kept, rows.min_p[r], work);
    if (xtc) keep_xtc(kept, rows.xtc_threshold[r], work);
    return draw_from_kept(kept, n, draw, work);
}

// Row r's logprob, rank and top from its raw logits.
void logprobs(const float *x, float highest, int wanted, int n, int r,
              const SampleAnswers &answers, SampleWork &work) {
    const float lse = log_sum(sum_of_weights(x, n, highest));
    const std::int32_t token = answers.tokens[r];
    if (token != kFailed) {
        answers.logprobs[r] = (x[token] - highest) - lse;
        answers.ranks[r] = 1 + count_above(x, n, x[token]);
    }
    if (wanted == 0) return;
    Kept top{n, work.ids.data(), work.z.data()};
    std::uint32_t *key = work.key.data();
    keys_of_negative(x, n, key);
    for (int i = 0; i < n; ++i) top.ids[i] = i;
    if (wanted < n) {
        const Border border = border_of_first(key, n, wanted, work);
        keep_to_border(top, key, border, [](int) { return 1; }, wanted);
    }
    std::sort(top.ids, top.ids + top.n, [key](std::int32_t a, std::int32_t b) {
        return key[a] != key[b] ? key[a] < key[b] : a < b;
    });
    const std::size_t from = static_cast<std::size_t>(r) * static_cast<std::size_t>(answers.width);
    for (int i = 0; i < top.n; ++i) {
        answers.top_ids[from + i] = top.ids[i];
        answers.top_logprobs[from + i] = (x[top.ids[i]] - highest) - lse;
    }
}

void answer_row(const float *x, const SampleRows &rows, int r, int n,
                const SampleAnswers &answers, SampleWork &work) {
    answers.tokens[r] = kFailed;
    answers.logprobs[r] = kNaN;
    answers.ranks[r] = 0;
    const std::size_t from = static_cast<std::size_t>(r) * static_cast<std::size_t>(answers.width);
    std::fill_n(answers.top_ids + from, answers.width, -1);
    std::fill_n(answers.top_logprobs + from, answers.width, kNaN);
    const int best = first_largest(x, n);
    if (best < 0) return;
    if (rows.target[r] >= 0) {
        answers.tokens[r] = rows.target[r];
    } else {
        const float *adjusted = adjust(x, rows, r, n, work);
        const int first = adjusted == x ? best : first_largest(adjusted, n);
        answers.tokens[r] = choose(adjusted, first, rows, r, n, work);
    }
    if (rows.num_logprobs[r] >= 0) {
        const int wanted = std::min(rows.num_logprobs[r], answers.width);
        logprobs(x, x[best], wanted, n, r, answers, work);
    }
}

ER_VERSIONS void log_softmax_row(const float *ER_RESTRICT x, int n, float highest, float lse,
                                 float *ER_RESTRICT out) {
    for (int i = 0; i < n; ++i) out[i] = (x[i] - highest) - lse;
}

}  // namespace

RowSampler::RowSampler(int vocab_size, std::shared_ptr<Pool> pool)
    : vocab_size_(vocab_size), pool_(std::move(pool)) {
    for (int i = 0; i < pool_->size(); ++i) {
        work_.push_back(std::make_unique<SampleWork>(vocab_size));
    }
}

RowSampler::~RowSampler() = default;

template <class Row>
void RowSampler::share_out(int count, Row row) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (count <= 1) {  // not worth waking anyone
        if (count == 1) row(0, *work_[0]);
        return;
    }
    pool_->reset_tickets();
    pool_->run([&](int thread) {
        for (int r = pool_->take_ticket(); r < count; r = pool_->take_ticket()) {
            row(r, *work_[static_cast<std::size_t>(thread)]);
        }
    });
}

void RowSampler::run(const float *logits, std::ptrdiff_t stride, const SampleRows &rows,
                     const SampleAnswers &answers) {
    share_out(rows.count, [&](int r, SampleWork &work) {
        answer_row(logits + r * stride, rows, r, vocab_size_, answers, work);
    });
}

void RowSampler::log_softmax(const float *logits, std::ptrdiff_t stride, int count, float *out) {
    const int n = vocab_size_;
    share_out(count, [&](int r, SampleWork &) {
        const float *x = logits + r * stride;
        float *to = out + static_cast<std::ptrdiff_t>(r) * n;
        const int best = first_largest(x, n);
        if (best < 0) {
            std::fill_n(to, n, kNaN);
            return;
        }
        log_softmax_row(x, n, x[best], log_sum(sum_of_weights(x, n, x[best])), to);
    });
}

}  // namespace engineroom
