// A lowered Program: operations over an arena, run for one packed step by one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "dequant.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "packed_matrix.hpp"
#include "pages.hpp"
#include "pool.hpp"

namespace engineroom {

// A value of the Program in the arena: rows of `width` floats, T of them or, where `per_logit_row`,
// R. It begins at `column` * (number of rows): what lives shrinks with the step.
struct Value {
    std::size_t column = 0;
    int width = 0;
    bool per_logit_row = false;
};

// What the operations of one run() share.
struct Run {
    const Kernels *kernels = nullptr;
    Pool *pool = nullptr;
    StepView step;
    float *token_arena = nullptr;  // T values
    float *row_arena = nullptr;    // R values
    std::uint8_t *prepared = nullptr;  // activations of the linear layer at hand, for all threads
    std::uint8_t *shared = nullptr;    // of attention and of experts
    std::vector<std::uint8_t *> scratch;  // one a thread

    int num_rows(const Value &v) const { return v.per_logit_row ? step.num_rows : step.num_tokens; }
    float *data(const Value &v) const {
        return (v.per_logit_row ? row_arena : token_arena) +
               v.column * static_cast<std::size_t>(num_rows(v));
    }
};

class Operation {
  public:
    virtual ~Operation() = default;
    // Every thread's share. May use the pool's barrier inside; must not rely on one at its end.
    virtual void run(const Run &run, int thread) const = 0;
    // Upper bounds, in bytes, of what it takes of Run for a step of those sizes.
    virtual std::size_t prepared_bytes(int, int) const { return 0; }
    virtual std::size_t shared_bytes(const StepView &, int) const { return 0; }
    virtual std::size_t scratch_bytes() const { return 0; }
    bool barrier_before = false;  // it reads what other threads may still be writing
};

// The cache of all layers, zeroed: [block][layer][kv head][keys, values]. A block's layers lie together
// so that memory is taken as blocks are first used: huge pages of a layer's own would be one a layer
// for the first token.
class KVCache {
  public:
    KVCache(Dtype key_dtype, Dtype value_dtype, int num_layers, int num_kv_heads, int head_dim,
            int block_size, int num_blocks);
    KVCacheView layer(int index) const;
    int num_layers() const { return num_layers_; }
    int num_blocks() const { return num_blocks_; }
    int block_size() const { return view_.block_size; }
    std::size_t bytes() const { return view_.block_stride * static_cast<std::size_t>(num_blocks_); }

  private:
    KVCacheView view_;
    int num_layers_;
    int num_blocks_;
    std::size_t layer_bytes_;  // of a block
    Pages pages_;
};

class StepProgram {
  public:
    StepProgram(const Kernels *kernels, std::shared_ptr<Pool> pool, std::shared_ptr<KVCache> cache,
                int vocab_size, std::size_t token_columns, std::size_t row_columns, Value result);

    void append(std::unique_ptr<Operation> operation);

    // Runs one step; returns the result's rows [R][width], valid until the next run().
    // Errors: std::invalid_argument for metadata that points outside of what there is.
    const float *run(const StepView &step);

    // Bytes of arenas, prepared activations and scratch taken so far.
    std::size_t workspace_bytes() const;

    int result_width() const { return result_.width; }

  private:
    void check(const StepView &step) const;

    const Kernels *kernels_;
    std::shared_ptr<Pool> pool_;
    std::shared_ptr<KVCache> cache_;  // may be null: a program without attention
    int vocab_size_;
    std::size_t token_columns_;
    std::size_t row_columns_;
    Value result_;
    std::vector<std::unique_ptr<Operation>> operations_;
    std::unique_ptr<Pages> token_arena_, row_arena_, prepared_, shared_, scratch_;
};

}  // namespace engineroom
