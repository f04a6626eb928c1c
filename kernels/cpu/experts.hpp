// The operations of a mixture of experts (kernels/ops.py): who is chosen, their products, their sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "operations.hpp"

namespace engineroom {

// out[i] = exp(x[i] - most), each in double and rounded once; returns their sum in order.
inline float exponentials(const float *x, int n, float most, float *out) {
    float sum = 0;
    for (int i = 0; i < n; ++i) {
        out[i] = static_cast<float>(std::exp(static_cast<double>(x[i] - most)));
        sum += out[i];
    }
    return sum;
}

// Ids as whole numbers in floats, best first: the arena holds nothing else.
class TopExperts final : public Operation {
  public:
    TopExperts(Value logits, Value out) : logits_(logits), out_(out) {}

    void run(const Run &run, int thread) const override {
        const float *logits = run.data(logits_);
        float *out = run.data(out_);
        each_row(run, out_, thread, [&](int i) {
            const float *row = logits + static_cast<std::size_t>(i) * logits_.width;
            float *ids = out + static_cast<std::size_t>(i) * out_.width;
            for (int j = 0; j < out_.width; ++j) {
                int best = -1;
                for (int e = 0; e < logits_.width; ++e)
                    if ((best < 0 || row[e] > row[best] ||
                         (std::isnan(row[best]) && !std::isnan(row[e]))) &&
                        std::find(ids, ids + j, static_cast<float>(e)) == ids + j)
                        best = e;
                ids[j] = static_cast<float>(best);
            }
        });
    }

  private:
    Value logits_, out_;
};

class ExpertWeights final : public Operation {
  public:
    ExpertWeights(Value logits, Value experts, Value out, bool renormalise, Dtype dtype)
        : logits_(logits), experts_(experts), out_(out), renormalise_(renormalise), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const float *logits = run.data(logits_), *experts = run.data(experts_);
        float *out = run.data(out_);
        float *all = reinterpret_cast<float *>(run.scratch[static_cast<std::size_t>(thread)]);
        const int n = out_.width;
        each_row(run, out_, thread, [&](int i) {
            const float *row = logits + static_cast<std::size_t>(i) * logits_.width;
            const float *ids = experts + static_cast<std::size_t>(i) * n;
            float *weights = out + static_cast<std::size_t>(i) * n;
            const auto logit = [&](int j) { return row[static_cast<int>(ids[j])]; };
            const float most = logit(0);
            for (int j = 0; j < n; ++j) weights[j] = logit(j);
            float sum = exponentials(weights, n, most, weights);
            if (!renormalise_) sum = exponentials(row, logits_.width, most, all);
            for (int j = 0; j < n; ++j) weights[j] /= sum;
            if (dtype_ != Dtype::kF32) run.kernels->round(weights, n, dtype_);
        });
    }
    std::size_t scratch_bytes() const override {
        return sizeof(float) * static_cast<std::size_t>(logits_.width);
    }

  private:
    Value logits_, experts_, out_;
    bool renormalise_;
    Dtype dtype_;
};

class ExpertSum final : public Operation {
  public:
    ExpertSum(Value x, Value weights, Value out, Dtype dtype)
        : x_(x), weights_(weights), out_(out), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const Kernels &k = *run.kernels;
        const float *x = run.data(x_), *weights = run.data(weights_);
        float *out = run.data(out_);
        float *product = reinterpret_cast<float *>(run.scratch[static_cast<std::size_t>(thread)]);
        const int n = out_.width;
        each_row(run, out_, thread, [&](int i) {
            const float *from = x + static_cast<std::size_t>(i) * x_.width;
            const float *by = weights + static_cast<std::size_t>(i) * weights_.width;
            float *sum = out + static_cast<std::size_t>(i) * n;
            k.scale(from, by[0], sum, n);
            for (int j = 1; j < weights_.width; ++j) {
                k.scale(from + static_cast<std::size_t>(j) * n, by[j], product, n);
                k.add(sum, product, sum, n);
            }
            if (dtype_ != Dtype::kF32) k.round(sum, n, dtype_);
        });
    }
    std::size_t scratch_bytes() const override {
        return sizeof(float) * static_cast<std::size_t>(out_.width);
    }

  private:
    Value x_, weights_, out_;
    Dtype dtype_;
};

class SigmoidScale final : public Operation {
  public:
    SigmoidScale(Value x, Value gate, Value out, Dtype dtype)
        : x_(x), gate_(gate), out_(out), dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const float *x = run.data(x_), *gate = run.data(gate_);
        float *out = run.data(out_);
        const int n = out_.width;
        each_row(run, out_, thread, [&](int i) {
            const std::size_t at = static_cast<std::size_t>(i) * static_cast<std::size_t>(n);
            const double sigmoid = 1 / (1 + std::exp(-static_cast<double>(gate[i])));
            run.kernels->scale(x + at, static_cast<float>(sigmoid), out + at, n);
            if (dtype_ != Dtype::kF32) run.kernels->round(out + at, n, dtype_);
        });
    }

  private:
    Value x_, gate_, out_;
    Dtype dtype_;
};

// ---------------------------------------------------------------------------- expert_linear

// Rows of one expert that are made ready and multiplied at once: about what a core's L2 holds.
constexpr int kExpertRows = 64;

// What a tile costs its thread before the first row, in rows: it comes from memory.
constexpr int kTileReading = 4;

// One thread's scratch for weights of that many columns.
inline std::size_t expert_scratch_bytes(Form form, int columns) {
    return padded(prepared_bytes(form, columns, kExpertRows)) +
           sizeof(float) * kExpertRows * kTileRows + linear_scratch_bytes(columns);
}

// One thread's list of a step's pairs of token and place, by expert.
inline std::size_t expert_list_bytes(std::size_t pairs, int num_experts) {
    return padded((static_cast<std::size_t>(num_experts) + 1 + pairs) * sizeof(int));
}

// expert_linear, or two of them and their gate. A pair (token, place) is a row of the product; pairs
// are counted and listed by expert, by every thread for itself: cheaper than a barrier. Threads share
// out the tiles of those experts that have rows, in order and by cost, so that a step reads a weight
// once, on one thread; beyond kExpertRows rows it comes again, from a cache where that holds it.
class ExpertLayer final : public Operation {
  public:
    // matrices: one an expert or, where `epilogue` is paired, two: gate and up. biases: none, or for
    // each of those one of all experts, each its rows.
    ExpertLayer(Value x, Value experts, Value out, Form form,
                std::vector<std::shared_ptr<PackedMatrix>> matrices,
                std::vector<const float *> biases, Epilogue epilogue, Dtype dtype)
        : x_(x),
          experts_(experts),
          out_(out),
          form_(form),
          matrices_(std::move(matrices)),
          biases_(std::move(biases)),
          epilogue_(epilogue),
          dtype_(dtype) {}

    void run(const Run &run, int thread) const override {
        const int threads = run.pool->size(), pairs = run.num_rows(x_) * experts_.width;
        int *starts = reinterpret_cast<int *>(
            run.shared + static_cast<std::size_t>(thread) *
                             expert_list_bytes(static_cast<std::size_t>(pairs), num_experts()));
        int *list = starts + num_experts() + 1;
        list_by_expert(run.data(experts_), pairs, starts, list);
        const auto rows = [&](int e) { return starts[e + 1] - starts[e]; };
        const auto tile_cost = [&](int e) {
            return tile_bytes(e) * static_cast<std::size_t>(rows(e) + kTileReading);
        };
        std::size_t total = 0, start = 0;
        for (int e = 0; e < num_experts(); ++e)
            if (rows(e) > 0) total += tile_cost(e) * static_cast<std::size_t>(num_tiles(e));
        const auto limit = [&](int of) {
            return total * static_cast<std::size_t>(of) / static_cast<std::size_t>(threads);
        };
        for (int e = 0; e < num_experts(); ++e) {
            if (rows(e) == 0) continue;
            const Tiles mine{tiles_before(limit(thread), start, tile_cost(e), num_tiles(e)),
                             tiles_before(limit(thread + 1), start, tile_cost(e), num_tiles(e))};
            for (int at = 0; at < rows(e) && mine.begin < mine.end; at += kExpertRows)
                multiply(run, e, mine, list + starts[e] + at, std::min(kExpertRows, rows(e) - at),
                         run.scratch[static_cast<std::size_t>(thread)]);
            start += tile_cost(e) * static_cast<std::size_t>(num_tiles(e));
        }
    }
    std::size_t shared_bytes(const StepView &step, int threads) const override {
        const int rows = x_.per_logit_row ? step.num_rows : step.num_tokens;
        return expert_list_bytes(static_cast<std::size_t>(rows * experts_.width), num_experts()) *
               static_cast<std::size_t>(threads);
    }
    std::size_t scratch_bytes() const override { return expert_scratch_bytes(form_, columns()); }

  private:
    int per_expert() const { return is_paired(epilogue_) ? 2 : 1; }
    int num_experts() const { return static_cast<int>(matrices_.size()) / per_expert(); }
    const PackedWeight &weight(int expert, int part = 0) const {
        return matrices_[static_cast<std::size_t>(expert * per_expert() + part)]->weight();
    }
    const float *bias(int expert, int part, int tile) const {
        if (biases_.empty()) return nullptr;
        return biases_[static_cast<std::size_t>(part)] +
               static_cast<std::ptrdiff_t>(expert) * weight(expert).num_rows + tile * kTileRows;
    }
    int columns() const { return weight(0).num_columns; }
    int num_tiles(int expert) const { return weight(expert).num_tiles(); }
    std::size_t tile_bytes(int expert) const {
        return weight(expert).tile_bytes +
               (is_paired(epilogue_) ? weight(expert, 1).tile_bytes : 0);
    }

    // A counting sort: expert e's pairs are list[starts[e]] .. list[starts[e + 1] - 1], ascending.
    void list_by_expert(const float *experts, int pairs, int *starts, int *list) const {
        const auto end_of = [&](int pair) -> int & {
            return starts[static_cast<int>(experts[pair]) + 1];
        };
        std::fill(starts, starts + num_experts() + 1, 0);
        for (int pair = 0; pair < pairs; ++pair) ++end_of(pair);
        for (int e = 0; e < num_experts(); ++e) starts[e + 1] += starts[e];
        for (int pair = pairs - 1; pair >= 0; --pair) list[--end_of(pair)] = pair;
        // Each end has come down to its expert's first pair: one place too far to the right.
        std::copy(starts + 1, starts + num_experts() + 1, starts);
        starts[num_experts()] = pairs;
    }

    // Tiles `mine` of one expert for `rows` of its pairs.
    void multiply(const Run &run, int expert, Tiles mine, const int *pairs, int rows,
                  std::uint8_t *scratch) const {
        const std::size_t width = static_cast<std::size_t>(columns());
        const std::size_t places = static_cast<std::size_t>(experts_.width);
        const bool own = static_cast<std::size_t>(x_.width) != width;  // a row of x for each place
        const Activations in = place_activations(form_, columns(), rows, scratch);
        for (int i = 0; i < rows; ++i) {
            const std::size_t pair = static_cast<std::size_t>(pairs[i]);
            const float *from = run.data(x_) + (own ? pair : pair / places) * width;
            prepare_rows(*run.kernels, in, from, 0, columns(), i, i + 1, {}, nullptr);
        }
        scratch += padded(engineroom::prepared_bytes(form_, columns(), kExpertRows));
        float *made = reinterpret_cast<float *>(scratch);
        scratch += sizeof(float) * kExpertRows * kTileRows;
        const std::size_t stride = static_cast<std::size_t>(out_.width) / places;
        for (int tile = mine.begin; tile < mine.end; ++tile) {
            PackedWeight weights[2];
            LinearPart parts[2];
            for (int part = 0; part < per_expert(); ++part) {
                weights[part] = one_tile(weight(expert, part), tile);
                parts[part] = {&weights[part], bias(expert, part, tile), made, kTileRows};
            }
            Linear linear;
            linear.parts = parts;
            linear.num_parts = per_expert();
            linear.epilogue = epilogue_;
            linear.dtype = dtype_;
            linear_tiles(*run.kernels, linear, in, rows, 0, 1, scratch);
            float *out = run.data(out_) + static_cast<std::ptrdiff_t>(tile) * kTileRows;
            for (int i = 0; i < rows; ++i)
                std::memcpy(out + static_cast<std::size_t>(pairs[i]) * stride, made + i * kTileRows,
                            sizeof(float) * static_cast<std::size_t>(weights[0].num_rows));
        }
    }

    static PackedWeight one_tile(PackedWeight weight, int tile) {
        weight.data = weight.scales(tile);
        weight.num_rows = std::min(kTileRows, weight.num_rows - tile * kTileRows);
        return weight;
    }

    Value x_, experts_, out_;
    Form form_;
    std::vector<std::shared_ptr<PackedMatrix>> matrices_;
    std::vector<const float *> biases_;
    Epilogue epilogue_;
    Dtype dtype_;
};

}  // namespace engineroom
