// The operations of a lowered Program, the run of a step, and their Python face.
#include "step.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

// Up to so many rows every thread prepares a linear layer's input for itself: cheaper than a barrier.
constexpr int kPreparedAlone = 2;

struct Share {
    int begin, end;
};

Share share(int count, int thread, int threads) {
    const auto at = [&](int i) {
        return static_cast<int>(static_cast<long long>(count) * i / threads);
    };
    return {at(thread), at(thread + 1)};
}

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

int dtype_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// ------------------------------------------------------------------------------- operations

// Calls row(index) for the rows of `value` that are this thread's.
template <class Row>
void each_row(const Run &run, const Value &value, int thread, Row row) {
    const Share mine = share(run.num_rows(value), thread, run.pool->size());
    for (int i = mine.begin; i < mine.end; ++i) row(i);
}

// Rows [begin, end) of an embedding table, as the checkpoint holds them.
struct TablePart {
    const DequantFormat *format;
    const std::uint8_t *data;
    int begin, end;
    std::size_t row_bytes;
};

class Embedding final : public Operation {
  public:
    Embedding(Value out, std::vector<TablePart> parts, Dtype dtype)
        : out_(out), parts_(std::move(parts)), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        float *out = run.data(out_);
        each_row(run, out_, thread, [&](int i) {
            float *row = out + static_cast<std::size_t>(i) * out_.width;
            const int id = run.step.token_ids[i];
            for (const TablePart &part : parts_) {
                if (id < part.begin || id >= part.end) continue;
                part.format->run(part.data + part.row_bytes * static_cast<std::size_t>(id - part.begin),
                                 row, static_cast<std::size_t>(out_.width) / part.format->block_elements);
            }
            if (dtype_ != Dtype::kF32) run.kernels->round(row, out_.width, dtype_);
        });
    }

  private:
    Value out_;
    std::vector<TablePart> parts_;
    Dtype dtype_;
};

class Normalise final : public Operation {
  public:
    Normalise(Value x, Value out, const float *weight, int group, float eps, float offset, Dtype dtype)
        : x_(x), out_(out), weight_(weight), group_(group), eps_(eps), offset_(offset), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const float *x = run.data(x_);
        float *out = run.data(out_);
        each_row(run, out_, thread, [&](int i) {
            const std::size_t at = static_cast<std::size_t>(i) * out_.width;
            for (int g = 0; g < out_.width; g += group_)
                run.kernels->rms_norm(x + at + g, weight_, out + at + g, group_, eps_, offset_);
            if (dtype_ != Dtype::kF32) run.kernels->round(out + at, out_.width, dtype_);
        });
    }

  private:
    Value x_, out_;
    const float *weight_;
    int group_;
    float eps_, offset_;
    Dtype dtype_;
};

enum class Elementwise { kAdd, kScale, kSoftcap, kSiluMul, kGeluMul };

class Map final : public Operation {
  public:
    Map(Elementwise kind, Value a, Value b, Value out, float parameter, Dtype dtype)
        : kind_(kind), a_(a), b_(b), out_(out), parameter_(parameter), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const Kernels &k = *run.kernels;
        const float *a = run.data(a_), *b = run.data(b_);
        float *out = run.data(out_);
        const int n = out_.width;
        each_row(run, out_, thread, [&](int i) {
            const std::size_t at = static_cast<std::size_t>(i) * static_cast<std::size_t>(n);
            switch (kind_) {
                case Elementwise::kAdd: k.add(a + at, b + at, out + at, n); break;
                case Elementwise::kScale: k.scale(a + at, parameter_, out + at, n); break;
                case Elementwise::kSoftcap: k.softcap(a + at, parameter_, out + at, n); break;
                case Elementwise::kSiluMul: k.silu_mul(a + at, b + at, out + at, n); break;
                case Elementwise::kGeluMul: k.gelu_tanh_mul(a + at, b + at, out + at, n); break;
            }
            if (dtype_ != Dtype::kF32) k.round(out + at, n, dtype_);
        });
    }

  private:
    Elementwise kind_;
    Value a_, b_, out_;
    float parameter_;
    Dtype dtype_;
};

class SelectRows final : public Operation {
  public:
    SelectRows(Value x, Value out) : x_(x), out_(out) {}

    void run(const Run &run, int thread) const override {
        const float *x = run.data(x_);
        float *out = run.data(out_);
        const std::size_t width = static_cast<std::size_t>(out_.width);
        each_row(run, out_, thread, [&](int i) {
            const float *row = x + static_cast<std::size_t>(run.step.logit_rows[i]) * width;
            std::copy(row, row + width, out + static_cast<std::size_t>(i) * width);
        });
    }

  private:
    Value x_, out_;
};

// cos and sin of every token's angles, for all the rope operations that share their frequencies.
class Rotations final : public Operation {
  public:
    Rotations(Value out, std::vector<float> inv_freq, float factor)
        : out_(out), inv_freq_(std::move(inv_freq)), factor_(factor) {}

    void run(const Run &run, int thread) const override {
        float *out = run.data(out_);
        const std::size_t pairs = inv_freq_.size();
        each_row(run, out_, thread, [&](int i) {
            float *cos = out + static_cast<std::size_t>(i) * 2 * pairs, *sin = cos + pairs;
            const float position = static_cast<float>(run.step.positions[i]);
            for (std::size_t j = 0; j < pairs; ++j) {
                const float angle = position * inv_freq_[j];  // an fp32 product: ops.rope says so
                cos[j] = static_cast<float>(std::cos(static_cast<double>(angle))) * factor_;
                sin[j] = static_cast<float>(std::sin(static_cast<double>(angle))) * factor_;
            }
        });
    }

  private:
    Value out_;
    std::vector<float> inv_freq_;
    float factor_;
};

class Rope final : public Operation {
  public:
    Rope(Value x, Value rotations, Value out, int head_dim, bool interleaved, Dtype dtype)
        : x_(x),
          rotations_(rotations),
          out_(out),
          head_dim_(head_dim),
          interleaved_(interleaved),
          dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const float *x = run.data(x_), *rotations = run.data(rotations_);
        float *out = run.data(out_);
        const int pairs = rotations_.width / 2;
        each_row(run, out_, thread, [&](int i) {
            const std::size_t at = static_cast<std::size_t>(i) * out_.width;
            const float *cos = rotations + static_cast<std::size_t>(i) * rotations_.width;
            run.kernels->rope(x + at, cos, cos + pairs, out + at, out_.width / head_dim_, head_dim_,
                              pairs, interleaved_);
            if (dtype_ != Dtype::kF32) run.kernels->round(out + at, out_.width, dtype_);
        });
    }

  private:
    Value x_, rotations_, out_;
    int head_dim_;
    bool interleaved_;
    Dtype dtype_;
};

class WriteKV final : public Operation {
  public:
    WriteKV(Value k, Value v, KVCacheView cache) : k_(k), v_(v), cache_(cache) {}

    void run(const Run &run, int thread) const override {
        write_kv(*run.kernels, cache_, run.step, run.data(k_), k_.width, run.data(v_), v_.width, thread,
                 run.pool->size());
    }

  private:
    Value k_, v_;
    KVCacheView cache_;
};

class Attend final : public Operation {
  public:
    Attend(Value q, Value out, Attention attention) : q_(q), out_(out), attention_(attention) {}

    void run(const Run &run, int thread) const override {
        run_attention(*run.kernels, attention_, run.step, run.data(q_), q_.width, run.data(out_),
                      out_.width, *run.pool, thread, run.shared,
                      run.scratch[static_cast<std::size_t>(thread)]);
    }
    std::size_t shared_bytes(const StepView &step, int threads) const override {
        return attention_shared_bytes(attention_, step, threads);
    }
    std::size_t scratch_bytes() const override { return attention_scratch_bytes(attention_); }

  private:
    Value q_, out_;
    Attention attention_;
};

// What one weight of a linear layer contributes: its tiles (one PackedMatrix a row range).
struct LinearWeight {
    std::shared_ptr<PackedMatrix> matrix;
    const float *bias;
    Value out;
    int column;  // of `out` where this row range begins
};

class LinearLayer final : public Operation {
  public:
    LinearLayer(Value x, Form form, InputNorm norm, std::vector<LinearWeight> weights,
                Epilogue epilogue, std::optional<Value> residual, Dtype dtype)
        : x_(x),
          form_(form),
          norm_(norm),
          weights_(std::move(weights)),
          epilogue_(epilogue),
          residual_(residual),
          dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const int rows = run.num_rows(x_), threads = run.pool->size();
        std::uint8_t *scratch = run.scratch[static_cast<std::size_t>(thread)];
        float *normed = reinterpret_cast<float *>(scratch);
        std::uint8_t *rest = scratch + padded(sizeof(float) * static_cast<std::size_t>(x_.width));
        Activations in;
        if (rows <= kPreparedAlone) {
            in = place_activations(form_, x_.width, rows, rest);
            rest += padded(engineroom::prepared_bytes(form_, x_.width, kPreparedAlone));
            prepare_rows(*run.kernels, in, run.data(x_), x_.width, x_.width, 0, rows, norm_, normed);
        } else {
            in = place_activations(form_, x_.width, rows, run.prepared);
            const Share mine = share(rows, thread, threads);
            prepare_rows(*run.kernels, in, run.data(x_), x_.width, x_.width, mine.begin, mine.end, norm_,
                         normed);
            run.pool->barrier();
        }
        LinearPart parts[kMaxParts];
        for (std::size_t i = 0; i < weights_.size(); ++i) {
            const LinearWeight &w = weights_[i];
            parts[i] = {&w.matrix->weight(), w.bias, run.data(w.out) + w.column, w.out.width};
        }
        Linear linear;
        linear.parts = parts;
        linear.num_parts = static_cast<int>(weights_.size());
        linear.epilogue = epilogue_;
        linear.dtype = dtype_;
        if (residual_) {
            linear.residual = run.data(*residual_);
            linear.residual_stride = residual_->width;
        }
        linear_tiles(*run.kernels, linear, in, rows, thread, threads, rest);
    }
    std::size_t prepared_bytes(int tokens, int logit_rows) const override {
        const int rows = x_.per_logit_row ? logit_rows : tokens;
        return rows <= kPreparedAlone ? 0 : engineroom::prepared_bytes(form_, x_.width, rows);
    }
    std::size_t scratch_bytes() const override {
        return padded(sizeof(float) * static_cast<std::size_t>(x_.width)) +
               padded(engineroom::prepared_bytes(form_, x_.width, kPreparedAlone)) +
               linear_scratch_bytes(x_.width);
    }

    static constexpr std::size_t kMaxParts = 64;

  private:
    Value x_;
    Form form_;
    InputNorm norm_;
    std::vector<LinearWeight> weights_;
    Epilogue epilogue_;
    std::optional<Value> residual_;
    Dtype dtype_;
};

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

KVCache::KVCache(Dtype dtype, int num_layers, int num_kv_heads, int head_dim, int block_size,
                 int num_blocks)
    : num_layers_(num_layers),
      num_blocks_(num_blocks),
      layer_bytes_(static_cast<std::size_t>(num_blocks) * num_kv_heads * 2 * block_size * head_dim *
                   dtype_bytes(dtype)),
      pages_(layer_bytes_ * static_cast<std::size_t>(num_layers)) {
    view_.dtype = dtype;
    view_.num_kv_heads = num_kv_heads;
    view_.head_dim = head_dim;
    view_.block_size = block_size;
    view_.head_bytes = static_cast<std::size_t>(2) * block_size * head_dim * dtype_bytes(dtype);
    view_.block_stride = view_.head_bytes * static_cast<std::size_t>(num_kv_heads);
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

// ---------------------------------------------------------------------------------- Python face

namespace {

using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Slot = std::tuple<std::size_t, int, bool>;  // a Value: column, width, per logit row

Value value_of(const Slot &slot) { return {std::get<0>(slot), std::get<1>(slot), std::get<2>(slot)}; }

template <class T>
T one_of(const std::string &name, std::initializer_list<std::pair<const char *, T>> known) {
    std::string names;
    for (const auto &[key, value] : known) {
        if (name == key) return value;
        names += std::string(names.empty() ? "" : ", ") + key;
    }
    throw std::invalid_argument("'" + name + "' is none of " + names);
}

Dtype dtype_of(const std::string &name) {
    return one_of<Dtype>(
        name, {{"float32", Dtype::kF32}, {"bfloat16", Dtype::kBF16}, {"float16", Dtype::kF16}});
}

// The StepProgram and the Python objects whose memory its operations point into.
class BoundProgram {
  public:
    BoundProgram(const std::string &isa, std::shared_ptr<Pool> pool, std::shared_ptr<KVCache> cache,
                 int vocab_size, std::size_t token_columns, std::size_t row_columns, Slot result)
        : cache_(std::move(cache)),
          program_(kernels_named(isa), std::move(pool), cache_, vocab_size, token_columns, row_columns,
                   value_of(result)) {}

    void embedding(bool barrier, Slot out, nb::list parts, const std::string &dtype) {
        std::vector<TablePart> table;
        const Value to = value_of(out);
        int begin = 0;
        for (nb::handle item : parts) {
            const auto part = nb::cast<std::tuple<std::string, Bytes, int>>(item);
            const DequantFormat *format = find_dequant_format(std::get<0>(part).c_str());
            const int rows = std::get<2>(part);
            if (format == nullptr || to.width % static_cast<int>(format->block_elements) != 0)
                throw std::invalid_argument("an embedding table of " + std::get<0>(part) + " cannot have rows of " +
                                            std::to_string(to.width));
            const std::size_t row_bytes =
                static_cast<std::size_t>(to.width) / format->block_elements * format->block_bytes;
            if (std::get<1>(part).shape(0) != row_bytes * static_cast<std::size_t>(rows))
                throw std::invalid_argument("an embedding table's bytes do not match its rows");
            table.push_back({format, std::get<1>(part).data(), begin, begin + rows, row_bytes});
            begin += rows;
            kept_.append(item);
        }
        add(barrier, std::make_unique<Embedding>(to, std::move(table), dtype_of(dtype)));
    }

    void rms_norm(bool barrier, Slot x, Slot out, Floats weight, float eps, float offset,
                  const std::string &dtype) {
        add(barrier, std::make_unique<Normalise>(value_of(x), value_of(out), keep(weight),
                                                 static_cast<int>(weight.shape(0)), eps, offset,
                                                 dtype_of(dtype)));
    }

    void map(bool barrier, const std::string &name, Slot a, Slot b, Slot out, float parameter,
             const std::string &dtype) {
        const Elementwise kind = one_of<Elementwise>(name, {{"add", Elementwise::kAdd},
                                                            {"scale", Elementwise::kScale},
                                                            {"softcap", Elementwise::kSoftcap},
                                                            {"silu_mul", Elementwise::kSiluMul},
                                                            {"gelu_tanh_mul", Elementwise::kGeluMul}});
        add(barrier, std::make_unique<Map>(kind, value_of(a), value_of(b), value_of(out), parameter,
                                           dtype_of(dtype)));
    }

    void select_rows(bool barrier, Slot x, Slot out) {
        add(barrier, std::make_unique<SelectRows>(value_of(x), value_of(out)));
    }

    void rotations(bool barrier, Slot out, std::vector<float> inv_freq, float factor) {
        add(barrier, std::make_unique<Rotations>(value_of(out), std::move(inv_freq), factor));
    }

    void rope(bool barrier, Slot x, Slot rotations, Slot out, int head_dim, bool interleaved,
              const std::string &dtype) {
        add(barrier, std::make_unique<Rope>(value_of(x), value_of(rotations), value_of(out), head_dim,
                                            interleaved, dtype_of(dtype)));
    }

    void kv_write(bool barrier, Slot k, Slot v, int layer) {
        add(barrier, std::make_unique<WriteKV>(value_of(k), value_of(v), cache_->layer(layer)));
    }

    void attention(bool barrier, Slot q, Slot out, int layer, int num_heads, float scale, int window,
                   float softcap, const std::string &dtype) {
        Attention attention;
        attention.cache = cache_->layer(layer);
        attention.num_heads = num_heads;
        attention.scale = scale;
        attention.window = window;
        attention.softcap = softcap;
        attention.dtype = dtype_of(dtype);
        add(barrier, std::make_unique<Attend>(value_of(q), value_of(out), attention));
    }

    // weights: (PackedMatrix, bias or None, value of the result, first column there)
    void linear(bool barrier, Slot x, const std::string &form, std::optional<Floats> norm, float eps,
                float offset, nb::list weights, const std::string &epilogue,
                std::optional<Slot> residual, const std::string &norm_dtype,
                const std::string &dtype) {
        InputNorm input;
        if (norm) input = {keep(*norm), eps, offset, dtype_of(norm_dtype)};
        std::vector<LinearWeight> all;
        for (nb::handle item : weights) {
            using Entry = std::tuple<std::shared_ptr<PackedMatrix>, std::optional<Floats>, Slot, int>;
            auto entry = nb::cast<Entry>(item);
            if (std::get<0>(entry)->weight().num_columns != std::get<1>(x))
                throw std::invalid_argument("a weight's columns differ from its input's width");
            const std::optional<Floats> &bias = std::get<1>(entry);
            all.push_back({std::get<0>(entry), bias ? keep(*bias) : nullptr,
                           value_of(std::get<2>(entry)), std::get<3>(entry)});
        }
        if (all.empty() || all.size() > LinearLayer::kMaxParts)
            throw std::invalid_argument("a linear layer of " + std::to_string(all.size()) +
                                        " weights; it takes 1 to " +
                                        std::to_string(LinearLayer::kMaxParts));
        std::optional<Value> added;
        if (residual) added = value_of(*residual);
        add(barrier,
            std::make_unique<LinearLayer>(
                value_of(x),
                one_of<Form>(form, {{"float32", Form::kF32}, {"bfloat16", Form::kBF16}, {"int8", Form::kInt8}}),
                input, std::move(all),
                one_of<Epilogue>(epilogue, {{"store", Epilogue::kStore},
                                            {"add", Epilogue::kAddResidual},
                                            {"silu_mul", Epilogue::kSiluMul},
                                            {"gelu_tanh_mul", Epilogue::kGeluMul}}),
                added, dtype_of(dtype)));
    }

    nb::ndarray<nb::numpy, float, nb::ndim<2>> run(Ints token_ids, Ints positions, Ints query_start,
                                                   Ints seq_len, Table block_table, Ints slot,
                                                   Ints logit_rows) {
        StepView step;
        step.num_tokens = static_cast<int>(token_ids.shape(0));
        step.num_sequences = static_cast<int>(seq_len.shape(0));
        step.num_rows = static_cast<int>(logit_rows.shape(0));
        step.max_blocks = static_cast<int>(block_table.shape(1));
        const std::size_t tokens = token_ids.shape(0), sequences = seq_len.shape(0);
        if (positions.shape(0) != tokens || slot.shape(0) != tokens ||
            query_start.shape(0) != sequences + 1 || block_table.shape(0) != sequences)
            throw std::invalid_argument("the arrays of a step disagree about T or S");
        step.token_ids = token_ids.data();
        step.positions = positions.data();
        step.query_start = query_start.data();
        step.seq_len = seq_len.data();
        step.block_table = block_table.data();
        step.slot = slot.data();
        step.logit_rows = logit_rows.data();
        const float *result;
        {
            nb::gil_scoped_release unlocked;
            result = program_.run(step);
        }
        const std::size_t shape[2] = {logit_rows.shape(0),
                                      static_cast<std::size_t>(program_.result_width())};
        return nb::ndarray<nb::numpy, float, nb::ndim<2>>(const_cast<float *>(result), 2, shape,
                                                          nb::find(*this));
    }

    std::size_t workspace_bytes() const { return program_.workspace_bytes(); }

  private:
    static const Kernels *kernels_named(const std::string &isa) {
        const Kernels *kernels = find_kernels(isa.empty() ? nullptr : isa.c_str());
        if (kernels == nullptr)
            throw std::invalid_argument("this machine cannot run the kernels '" + isa + "'");
        return kernels;
    }
    const float *keep(const Floats &array) {
        kept_.append(nb::cast(array));
        return array.data();
    }
    void add(bool barrier, std::unique_ptr<Operation> operation) {
        operation->barrier_before = barrier;
        program_.append(std::move(operation));
    }

    std::shared_ptr<KVCache> cache_;
    StepProgram program_;
    nb::list kept_;
};

// Bytes that a step of at most max_tokens tokens and max_rows logit rows takes at most.
std::size_t workspace_bound(std::size_t token_columns, std::size_t row_columns, int widest,
                            int num_heads, int num_kv_heads, int head_dim, int max_tokens,
                            int max_rows, int max_context, int threads) {
    const std::size_t arenas = sizeof(float) * (token_columns * static_cast<std::size_t>(max_tokens) +
                                                row_columns * static_cast<std::size_t>(max_rows));
    Attention attention;
    attention.num_heads = num_heads;
    attention.cache.num_kv_heads = num_kv_heads;
    attention.cache.head_dim = head_dim;
    const std::size_t shared =
        num_heads ? attention_shared_bound(attention, max_tokens, max_tokens, max_context, threads) : 0;
    const std::size_t linear = padded(sizeof(float) * static_cast<std::size_t>(widest)) +
                               padded(engineroom::prepared_bytes(Form::kF32, widest, kPreparedAlone)) +
                               linear_scratch_bytes(widest);
    const std::size_t scratch =
        padded(std::max(linear, num_heads ? attention_scratch_bytes(attention) : 0)) + 4096;
    const std::size_t slack = 5 * (std::size_t{2} << 20);  // five mappings end on whole huge pages
    return arenas + engineroom::prepared_bytes(Form::kF32, widest, std::max(max_tokens, max_rows)) +
           shared + scratch * static_cast<std::size_t>(threads) + slack;
}

}  // namespace

void register_step(nb::module_ &m) {
    nb::class_<Pool>(m, "Pool")
        .def(nb::init<int>(), nb::arg("threads"))
        .def_prop_ro("size", &Pool::size);
    m.def("usable_cores", &usable_cores);
    m.def("packed_bytes", [](const std::string &format, int num_rows, int num_columns) {
        return packed_bytes(packed_layout(format.c_str(), num_rows, num_columns));
    });
    m.def("workspace_bound", &workspace_bound);
    nb::class_<KVCache>(m, "KVCache")
        .def("__init__",
             [](KVCache *self, const std::string &dtype, int num_layers, int num_kv_heads, int head_dim,
                int block_size, int num_blocks) {
                 if (num_layers < 1 || num_kv_heads < 1 || head_dim < 2 || head_dim % 2 != 0 ||
                     block_size < 1 || num_blocks < 1)
                     throw std::invalid_argument("a KV cache needs positive sizes and an even head_dim");
                 new (self) KVCache(dtype_of(dtype), num_layers, num_kv_heads, head_dim, block_size,
                                    num_blocks);
             })
        .def_prop_ro("num_layers", &KVCache::num_layers)
        .def_prop_ro("num_kv_heads", [](const KVCache &c) { return c.layer(0).num_kv_heads; })
        .def_prop_ro("head_dim", [](const KVCache &c) { return c.layer(0).head_dim; })
        .def_prop_ro("nbytes", &KVCache::bytes);
    nb::class_<BoundProgram>(m, "StepProgram")
        .def(nb::init<const std::string &, std::shared_ptr<Pool>, std::shared_ptr<KVCache>, int,
                      std::size_t, std::size_t, Slot>(),
             nb::arg("isa"), nb::arg("pool"), nb::arg("cache").none(), nb::arg("vocab_size"),
             nb::arg("token_columns"), nb::arg("row_columns"), nb::arg("result"))
        .def("embedding", &BoundProgram::embedding)
        .def("rms_norm", &BoundProgram::rms_norm)
        .def("map", &BoundProgram::map)
        .def("select_rows", &BoundProgram::select_rows)
        .def("rotations", &BoundProgram::rotations)
        .def("rope", &BoundProgram::rope)
        .def("kv_write", &BoundProgram::kv_write)
        .def("attention", &BoundProgram::attention)
        .def_prop_ro("workspace_bytes", &BoundProgram::workspace_bytes)
        .def("linear", &BoundProgram::linear, nb::arg("barrier"), nb::arg("x"), nb::arg("form"),
             nb::arg("norm").none(), nb::arg("eps"), nb::arg("offset"), nb::arg("weights"),
             nb::arg("epilogue"), nb::arg("residual").none(), nb::arg("norm_dtype"), nb::arg("dtype"))
        .def("run", &BoundProgram::run, nb::arg("token_ids").noconvert(),
             nb::arg("positions").noconvert(), nb::arg("query_start").noconvert(),
             nb::arg("seq_len").noconvert(), nb::arg("block_table").noconvert(),
             nb::arg("slot").noconvert(), nb::arg("logit_rows").noconvert());
}

}  // namespace engineroom
