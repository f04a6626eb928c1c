// The sampling program of kernels/sampling.py, bit for bit; functions bear the names used there.
//
// Each element takes the specification's IEEE operations in its order (the build forbids
// contraction to fused multiply-add) and sums are of integers, so neither vector width nor threads
// show in a result. What differs is how much is computed: a prefix in some order is found by
// buckets instead of a sort, and noise is drawn only where it could make a token win.
#include "sample.hpp"

#include <algorithm>

#include "sample_math.hpp"
#include "sample_parts.hpp"

namespace engineroom {
namespace {

using namespace sampling;

constexpr std::uint32_t kStreamGumbel = 0, kStreamXtc = 1;

// d = x - highest.
ER_WIDE_VERSIONS void distances(const float *ER_RESTRICT x, int n, float highest,
                                float *ER_RESTRICT d) {
    for (int i = 0; i < n; ++i) d[i] = x[i] - highest;
}

// z = d / temperature in place; what was dropped stays so, whatever the temperature.
ER_WIDE_VERSIONS void temper(float *d, int n, float temperature) {
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
    if (wanted < n) keep_least(top, wanted, work);
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

ER_WIDE_VERSIONS void log_softmax_row(const float *ER_RESTRICT x, int n, float highest, float lse,
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
