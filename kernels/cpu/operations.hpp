// The operations that a StepProgram is made of: one class for each of kernels/ops.py, fused or not.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "packed_matrix.hpp"
#include "step.hpp"

namespace engineroom {

// Up to so many rows every thread prepares a linear layer's input for itself: cheaper than a barrier.
constexpr int kPreparedAlone = 2;

struct Share {
    int begin, end;
};

inline Share share(int count, int thread, int threads) {
    const auto at = [&](int i) {
        return static_cast<int>(static_cast<long long>(count) * i / threads);
    };
    return {at(thread), at(thread + 1)};
}

inline std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// ------------------------------------------------------------------------------- operations

// Calls row(index) for the rows of `value` that are this thread's.
template <class Row>
void each_row(const Run &run, const Value &value, int thread, Row row) {
    const Share mine = share(run.num_rows(value), thread, run.pool->size());
    for (int i = mine.begin; i < mine.end; ++i) row(i);
}

// Rows [begin, end) of an embedding table: as the checkpoint holds them, or in tiles.
struct TablePart {
    int begin, end;
    const DequantFormat *format = nullptr;
    const std::uint8_t *data = nullptr;
    std::size_t row_bytes = 0;
    const PackedWeight *tiles = nullptr;  // in place of the three above

    void read(int row, int width, float *out) const {
        if (tiles != nullptr)
            unpack_row(*tiles, row, out);
        else
            format->run(data + row_bytes * static_cast<std::size_t>(row), out,
                        static_cast<std::size_t>(width) / format->block_elements);
    }
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
                if (id >= part.begin && id < part.end) part.read(id - part.begin, out_.width, row);
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
                run.kernels->rms_norm(x + at + g, weight_, out + at + g, group_, eps_, offset_, dtype_);
        });
    }

  private:
    Value x_, out_;
    const float *weight_;
    int group_;
    float eps_, offset_;
    Dtype dtype_;
};

enum class Elementwise { kAdd, kScale, kSoftcap, kSiluMul, kGeluMul, kClampedSiluMul };

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
                case Elementwise::kClampedSiluMul:
                    k.clamped_silu_mul(a + at, b + at, out + at, n);
                    break;
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
        std::uint8_t *rest = scratch + row_bytes();
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
        return row_bytes() +
               padded(engineroom::prepared_bytes(form_, x_.width, kPreparedAlone)) +
               linear_scratch_bytes(x_.width);
    }

    static constexpr std::size_t kMaxParts = 64;

  private:
    // What prepare_rows needs for a row that is normed and put in order.
    std::size_t row_bytes() const {
        const std::size_t columns = static_cast<std::size_t>(x_.width);
        return padded(sizeof(float) * (norm_.order != nullptr ? 2 * columns : columns));
    }

    Value x_;
    Form form_;
    InputNorm norm_;
    std::vector<LinearWeight> weights_;
    Epilogue epilogue_;
    std::optional<Value> residual_;
    Dtype dtype_;
};

}  // namespace engineroom
