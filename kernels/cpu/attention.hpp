// Paged attention and KV writes over a packed step, shared out among threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"
#include "pool.hpp"

namespace engineroom {

// One packed step (kernels/backend.py StepInputs).
struct StepView {
    int num_tokens = 0;     // T
    int num_sequences = 0;  // S
    int num_rows = 0;       // R
    int max_blocks = 0;     // width of block_table
    const std::int32_t *token_ids = nullptr;    // [T]
    const std::int32_t *positions = nullptr;    // [T]
    const std::int32_t *query_start = nullptr;  // [S + 1]
    const std::int32_t *seq_len = nullptr;      // [S]
    const std::int32_t *block_table = nullptr;  // [S][max_blocks]
    const std::int32_t *slot = nullptr;         // [T]  -1: a padding row
    const std::int32_t *logit_rows = nullptr;   // [R]
};

struct Attention {
    KVCacheView cache;
    int num_heads = 0;
    float scale = 0;
    int window = 0;
    float softcap = 0;
    const float *sinks = nullptr;  // [num_heads]: logits that weigh no value; or nullptr
    Dtype dtype = Dtype::kF32;  // rounding of the result
};

// Thread's share of storing k, v [T][stride] of every token; slot -1 stores nothing.
void write_kv(const Kernels &kernels, const KVCacheView &cache, const StepView &step, const float *k,
              std::ptrdiff_t k_stride, const float *v, std::ptrdiff_t v_stride, int thread,
              int threads);

// Bytes that all threads share in run_attention, for this step; the same for every layer of equal
// head counts.
std::size_t attention_shared_bytes(const Attention &attention, const StepView &step, int threads);
// Bytes of one thread's own scratch, for any step.
std::size_t attention_scratch_bytes(const Attention &attention);
// Upper bounds for planning memory: any step of at most that many tokens and sequences, contexts up
// to max_context.
std::size_t attention_shared_bound(const Attention &attention, int max_tokens, int max_sequences,
                                   int max_context, int threads);

// q [T][q_stride] -> out [T][out_stride], num_heads * head_dim of each. Every thread of `pool` calls
// it; barriers inside, none at the end. Rows of slot -1 give zeros.
void run_attention(const Kernels &kernels, const Attention &attention, const StepView &step,
                   const float *q, std::ptrdiff_t q_stride, float *out, std::ptrdiff_t out_stride,
                   Pool &pool, int thread, std::uint8_t *shared, std::uint8_t *scratch);

}  // namespace engineroom
