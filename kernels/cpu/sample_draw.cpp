// Draws a token: argmax of z + Gumbel noise, which is made only where it could make a token win.
#include <algorithm>
#include <cmath>

#include "sample_math.hpp"
#include "sample_parts.hpp"

namespace engineroom {
namespace sampling {
namespace {

// Noise lies strictly below; adding either bound rounds as monotonically as adding the noise.
constexpr float kNoiseBelow = 23.0f;

// Where more words than these (one in sixteen) may decide, a chunk's noise is made as a whole.
constexpr std::uint32_t kManyWords = 1u << 28;

float noise_of(const Draw &draw, std::int32_t id) {
    const PhiloxBlock block = philox4x32(draw, static_cast<std::uint32_t>(id) / 4);
    return gumbel_f32(uniform_of_word(block.word[id % 4]));
}

ER_WIDE_VERSIONS float largest_of(const float *z, int n) {
    std::int32_t largest = ordered(-kInfinity);  // of floats GCC makes no vector maximum
    for (int i = 0; i < n; ++i) {
        const std::int32_t key = ordered(z[i]);
        largest = key > largest ? key : largest;
    }
    return float_of_bits(largest ^ ((largest >> 31) & 0x7fffffff));
}

// words[j][i] = word of token id 4 * (block + i) + j.
ER_WIDE_VERSIONS void draw_words(const Draw &draw, std::uint32_t block,
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
ER_WIDE_VERSIONS void add_noise(const float *ER_RESTRICT z, int n,
                                const std::uint32_t (*ER_RESTRICT words)[kChunk / 4],
                                float *ER_RESTRICT score) {
    for (int i = 0; i < kChunk / 4; ++i) {
        for (int j = 0; j < 4; ++j) score[4 * i + j] = uniform_of_word(words[j][i]);
    }
    for (int i = 0; i < n; ++i) score[i] = z[i] + gumbel_f32(score[i]);
}

}  // namespace

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

}  // namespace sampling
}  // namespace engineroom
