// The sampling program on the CPU: rows of logits to tokens, as kernels/sampling.py specifies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "pool.hpp"

namespace engineroom {

// kernels.backend.SamplingInputs, field by field. The caller has checked starts, ids and mask rows
// (kernels.sampling.check): nothing here does.
struct SampleRows {
    int count;
    const float *temperature;
    const std::int32_t *top_k;
    const float *top_p;
    const float *min_p;
    const float *typical_p;
    const float *top_n_sigma;
    const float *xtc_probability;
    const float *xtc_threshold;
    const float *repetition_penalty;
    const float *presence_penalty;
    const float *frequency_penalty;
    const std::uint64_t *seed;
    const std::uint32_t *sample_index;
    const std::uint32_t *position;
    const std::int32_t *target;
    const std::int32_t *num_logprobs;
    const std::int32_t *history_start;
    const std::int32_t *history_ids;
    const std::int32_t *history_count;
    const std::int32_t *bias_start;
    const std::int32_t *bias_ids;
    const float *bias_values;
    const std::int32_t *ban_start;
    const std::int32_t *ban_ids;
    const std::int32_t *mask_row;
    const std::uint32_t *mask_table;
    std::size_t mask_words;  // of one row of mask_table
};

// kernels.backend.SampleResult; every place is written. `width` is K, the columns of the top.
struct SampleAnswers {
    std::int32_t *tokens;
    float *logprobs;
    std::int32_t *ranks;
    std::int32_t *top_ids;
    float *top_logprobs;
    int width;
};

struct SampleWork;  // one thread's memory

// The sampling program for one vocabulary size (1 to 2^22). Rows are shared out among the pool's
// threads; a row's answer depends on that row alone. Calls exclude each other, but the pool must be
// free: no run() of it may be under way.
class RowSampler {
  public:
    RowSampler(int vocab_size, std::shared_ptr<Pool> pool);
    ~RowSampler();

    int vocab_size() const { return vocab_size_; }

    // Row r of the logits starts at logits + r * stride (in floats).
    void run(const float *logits, std::ptrdiff_t stride, const SampleRows &rows,
             const SampleAnswers &answers);

    // out [count, V]: natural logprobs, bit for bit those of run(); NaN in rows that fail.
    void log_softmax(const float *logits, std::ptrdiff_t stride, int count, float *out);

  private:
    template <class Row>
    void share_out(int count, Row row);

    const int vocab_size_;
    const std::shared_ptr<Pool> pool_;
    std::vector<std::unique_ptr<SampleWork>> work_;  // by thread
    std::mutex mutex_;
};

}  // namespace engineroom
