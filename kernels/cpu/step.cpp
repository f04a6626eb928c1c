// The cache, and the run of a lowered Program: its memory, its checks, one pass over its operations.
#include "step.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "operations.hpp"

namespace engineroom {
namespace {

// Makes room for at least `bytes`; what was there is lost.
std::uint8_t *room(std::unique_ptr<Pages> &pages, std::size_t bytes) {
    if (bytes == 0) return pages ? pages->data() : nullptr;
    if (!pages || pages->size() < bytes) {
        pages.reset();  // before the new ones are taken
        pages = std::make_unique<Pages>(bytes);
    }
    return pages->data();
}

}  // namespace

// ------------------------------------------------------------------------------------- cache

KVCache::KVCache(Dtype key_dtype, Dtype value_dtype, int num_layers, int num_kv_heads, int head_dim,
                 int block_size, int num_blocks)
    : view_(kv_cache_view(key_dtype, value_dtype, num_kv_heads, head_dim, block_size)),
      num_layers_(num_layers),
      num_blocks_(num_blocks),
      layer_bytes_(view_.block_stride),
      pages_(layer_bytes_ * static_cast<std::size_t>(num_layers) *
             static_cast<std::size_t>(num_blocks)) {
    view_.block_stride = layer_bytes_ * static_cast<std::size_t>(num_layers);
}

KVCacheView KVCache::layer(int index) const {
    KVCacheView view = view_;
    view.layer = pages_.data() + layer_bytes_ * static_cast<std::size_t>(index);
    return view;
}

// -------------------------------------------------------------------------------------- program

StepProgram::StepProgram(const Kernels *kernels, std::shared_ptr<Pool> pool,
                         std::shared_ptr<KVCache> cache, int vocab_size, std::size_t token_columns,
                         std::size_t row_columns, Value result)
    : kernels_(kernels),
      pool_(std::move(pool)),
      cache_(std::move(cache)),
      vocab_size_(vocab_size),
      token_columns_(token_columns),
      row_columns_(row_columns),
      result_(result) {}

void StepProgram::append(std::unique_ptr<Operation> operation) {
    operations_.push_back(std::move(operation));
}

const float *StepProgram::run(const StepView &step) {
    check(step);
    const int threads = pool_->size();
    std::size_t prepared = 0, shared = 0, scratch = 0;
    for (const auto &operation : operations_) {
        prepared = std::max(prepared, operation->prepared_bytes(step.num_tokens, step.num_rows));
        shared = std::max(shared, operation->shared_bytes(step, threads));
        scratch = std::max(scratch, operation->scratch_bytes());
    }
    scratch = padded(scratch) + 4096;  // a page apart: threads must not share cache lines
    Run run;
    run.kernels = kernels_;
    run.pool = pool_.get();
    run.step = step;
    const auto floats = [](std::size_t columns, int rows) {
        return columns * static_cast<std::size_t>(rows) * sizeof(float);
    };
    run.token_arena = reinterpret_cast<float *>(room(token_arena_, floats(token_columns_, step.num_tokens)));
    run.row_arena = reinterpret_cast<float *>(room(row_arena_, floats(row_columns_, step.num_rows)));
    run.prepared = room(prepared_, prepared);
    run.shared = room(shared_, shared);
    std::uint8_t *all = room(scratch_, scratch * static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i) run.scratch.push_back(all + scratch * static_cast<std::size_t>(i));
    pool_->run([&](int thread) {
        for (const auto &operation : operations_) {
            if (operation->barrier_before) pool_->barrier();
            operation->run(run, thread);
        }
    });
    return run.data(result_);
}

std::size_t StepProgram::workspace_bytes() const {
    std::size_t bytes = 0;
    for (const std::unique_ptr<Pages> *pages : {&token_arena_, &row_arena_, &prepared_, &shared_, &scratch_})
        if (*pages) bytes += (*pages)->size();
    return bytes;
}

void StepProgram::check(const StepView &step) const {
    const auto refuse = [](const std::string &what) { throw std::invalid_argument(what); };
    const auto outside = [&](const char *name, long long value, long long end) {
        refuse(std::string(name) + " " + std::to_string(value) + " is outside of 0.." +
               std::to_string(end - 1));
    };
    if (step.num_tokens < 1) refuse("a step needs at least one token");
    for (int t = 0; t < step.num_tokens; ++t)
        if (step.token_ids[t] < 0 || step.token_ids[t] >= vocab_size_)
            outside("token id", step.token_ids[t], vocab_size_);
    for (int r = 0; r < step.num_rows; ++r)
        if (step.logit_rows[r] < 0 || step.logit_rows[r] >= step.num_tokens)
            outside("logit row", step.logit_rows[r], step.num_tokens);
    if (!cache_) return;
    const long long slots = static_cast<long long>(cache_->num_blocks()) * cache_->block_size();
    int from = 0;
    for (int s = 0; s < step.num_sequences; ++s) {
        const int end = step.query_start[s + 1], length = step.seq_len[s];
        if (step.query_start[s] != from || end < from || end > step.num_tokens)
            refuse("query_start must rise from 0 to the number of tokens");
        const int blocks = (length + cache_->block_size() - 1) / cache_->block_size();
        if (length < 0 || blocks > step.max_blocks) outside("seq_len", length, 1LL + step.max_blocks * cache_->block_size());
        for (int b = 0; b < blocks; ++b) {
            const std::int32_t block = step.block_table[static_cast<std::size_t>(s) * step.max_blocks + b];
            if (block < 0 || block >= cache_->num_blocks()) outside("block", block, cache_->num_blocks());
        }
        for (int t = from; t < end; ++t) {
            if (step.slot[t] >= slots || step.slot[t] < -1) outside("slot", step.slot[t], slots);
            if (step.slot[t] >= 0 && (step.positions[t] < 0 || step.positions[t] >= length))
                outside("position", step.positions[t], length);
        }
        from = end;
    }
    for (int t = from; t < step.num_tokens; ++t)
        if (step.slot[t] != -1) refuse("a token behind the last query_start must have slot -1");
}

}  // namespace engineroom
