// What the parts of the sampler share: a thread's memory, the tokens kept, and what each part does.
#pragma once

#include <cstdint>
#include <vector>

#include "counter.hpp"
#include "sample.hpp"
#include "versions.hpp"

namespace engineroom {
namespace sampling {

constexpr std::int32_t kFailed = -1;
constexpr int kChunk = 256;  // tokens whose noise is drawn together

// The tokens that stages have kept: ids ascending, z by place.
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

// ---- exact sums and order (sample_order.cpp)

std::int64_t share(std::int64_t total, float p);
// weight[i] = weights(z)[i]; returns their sum.
std::int64_t weights(const float *z, int n, std::int64_t *weight);
std::int64_t sum_of_weights(const float *x, int n, float highest);
float log_sum(std::int64_t total);
// Index of the first of the largest, or -1: a NaN or +inf is there, or nothing finite.
int first_largest(const float *x, int n);
int count_above(const float *x, int n, float value);

// Keys are integers in the order of scores, least first.
void keys_of_negative(const float *x, int n, std::uint32_t *key);
std::uint32_t least_key(const std::uint32_t *key, int n);
// The first n of more tokens, by work.key.
void keep_least(Kept &kept, int n, SampleWork &work);
// By work.weight, in the order (|z + h|, id): what has the share p of `total`.
void keep_mass(Kept &kept, float h, std::int64_t total, float p, SampleWork &work);

// ---- biases, bans, mask, penalties (sample_adjust.cpp)

// Stages 1 to 3: x itself where nothing applies, else a changed copy in work.x.
const float *adjust(const float *x, const SampleRows &rows, int r, int n, SampleWork &work);

// ---- filters (sample_filters.cpp)

void keep_finite(Kept &kept);
void keep_top_n_sigma(Kept &kept, float n);
void keep_first(Kept &kept, int n, SampleWork &work);
// Measures z from the largest kept afterwards: this filter alone can lose the most likely token.
void keep_typical(Kept &kept, float p, SampleWork &work);
void keep_top_p(Kept &kept, float p, SampleWork &work);
void keep_min_p(Kept &kept, float p, SampleWork &work);
void keep_xtc(Kept &kept, float threshold, SampleWork &work);

// ---- noise (sample_draw.cpp)

// argmax of z + noise over z by token id, -inf where a token is out; -1 where all are.
int draw_from_all(const float *z, int n, const Draw &draw, SampleWork &work);
// The same over the tokens kept.
int draw_from_kept(const Kept &kept, int vocab_size, const Draw &draw, SampleWork &work);

}  // namespace sampling

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
    alignas(64) std::uint32_t words[4][sampling::kChunk / 4];
    alignas(64) float score[sampling::kChunk];
};

}  // namespace engineroom
