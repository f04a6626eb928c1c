// Paged attention over a packed step, shared out among threads; and its entries for tests.
//
// An item is a block of one sequence's tokens under one kv head. Threads own ranges of items of
// about equal cost, which all of them work out alike. An item is whole unless it costs so much that
// a thread would wait for it: then its splits of keys are divided, their results are stored, and
// after a barrier one thread combines them. The combination goes over splits in ascending order
// either way, so its bits are the same.
#include "attention.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "bindings.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

constexpr int kItemRows = 12;  // query rows of an item: what a register tile takes in two rounds
constexpr int kSplitsAtOnce = 4;  // of an item, before they are combined
constexpr int kTileKeys = 16;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Item {
    int sequence, kv_head;
    int first_token, num_tokens;  // of the step
    int split0, split1;           // splits of keys that some row may see
    std::int64_t cost;
};

int group_of(const Attention &attention) {
    return attention.num_heads / attention.cache.num_kv_heads;
}
int item_tokens(const Attention &attention) { return std::max(1, kItemRows / group_of(attention)); }
int item_rows(const Attention &attention) { return item_tokens(attention) * group_of(attention); }

// Calls action(item) for every item of the step.
template <class Action>
void for_each_item(const Attention &attention, const StepView &step, Action &&action) {
    const int at_once = item_tokens(attention);
    for (int s = 0; s < step.num_sequences; ++s)
        for (int head = 0; head < attention.cache.num_kv_heads; ++head)
            for (int t = step.query_start[s]; t < step.query_start[s + 1]; t += at_once) {
                Item item = {};
                item.sequence = s;
                item.kv_head = head;
                item.first_token = t;
                item.num_tokens = std::min(at_once, step.query_start[s + 1] - t);
                int first = std::numeric_limits<int>::max(), last = -1;
                for (int i = t; i < t + item.num_tokens; ++i) {
                    if (step.slot[i] < 0) continue;
                    const int p = step.positions[i];
                    first = std::min(first, attention.window > 0
                                                ? std::max(0, p - attention.window + 1)
                                                : 0);
                    last = std::max(last, std::min(p, step.seq_len[s] - 1));
                }
                if (first > last) first = last = 0;  // padding: one split, of which it sees nothing
                item.split0 = first / kSplit;
                item.split1 = last / kSplit + 1;
                // Keys and values are read once, and multiplied once a row.
                item.cost = static_cast<std::int64_t>(last / kTileKeys - first / kTileKeys + 1) *
                            (8 + item.num_tokens * group_of(attention));
                action(item);
            }
}

// How the items' cost, end to end, is cut into equal shares.
struct Shares {
    std::int64_t total = 0;
    int threads;

    Shares(const Attention &attention, const StepView &step, int threads_) : threads(threads_) {
        for_each_item(attention, step, [this](const Item &item) { total += item.cost; });
    }

    std::int64_t boundary(int thread) const { return total * thread / threads; }
    // Whether a thread would wait long for another one that has this item alone.
    bool divisible(const Item &item) const {
        return item.split1 - item.split0 > 1 && item.cost * threads * 8 > total;
    }
    // The split of the item, whose cost begins at `start`, nearest to a boundary.
    int cut(const Item &item, std::int64_t start, std::int64_t boundary) const {
        const std::int64_t at = boundary - start;
        if (at <= 0) return item.split0;
        if (at >= item.cost) return item.split1;
        if (!divisible(item)) return 2 * at < item.cost ? item.split0 : item.split1;
        const std::int64_t splits = item.split1 - item.split0;
        return item.split0 + static_cast<int>((2 * at * splits + item.cost) / (2 * item.cost));
    }
    bool is_divided(const Item &item, std::int64_t start) const {
        if (!divisible(item)) return false;
        for (int thread = 1; thread < threads; ++thread) {
            const int at = cut(item, start, boundary(thread));
            if (at > item.split0 && at < item.split1) return true;
        }
        return false;
    }
};

// Results of splits, one after another: maximum, sum [splits][rows], acc [splits][rows][dim]. Those
// of the first become the rows' state of the online softmax.
struct Partials {
    int rows, dim;
    float *maximum, *sum, *acc;

    Partials(float *at, int splits, int rows_, int dim_)
        : rows(rows_),
          dim(dim_),
          maximum(at),
          sum(at + splits * rows),
          acc(at + 2 * splits * rows) {}
    Partials from(int split) const {
        Partials later = *this;
        later.maximum += split * rows;
        later.sum += split * rows;
        later.acc += static_cast<std::ptrdiff_t>(split) * rows * dim;
        return later;
    }
    static std::size_t floats(int splits, int rows, int dim) {
        return static_cast<std::size_t>(splits) * static_cast<std::size_t>(rows) *
               static_cast<std::size_t>(dim + 2);
    }
};

float exp_of(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }

// Takes one split more, the next in order, into the state.
void combine(const Kernels &kernels, const Partials &state, const Partials &split) {
    const int dim = state.dim;
    for (int row = 0; row < state.rows; ++row) {
        const float next = split.maximum[row];
        if (next == kNothing) continue;
        float *acc = state.acc + static_cast<std::ptrdiff_t>(row) * dim;
        float *more = split.acc + static_cast<std::ptrdiff_t>(row) * dim;
        float &maximum = state.maximum[row], &sum = state.sum[row];
        if (maximum == kNothing) {
            maximum = next;
            sum = split.sum[row];
            std::copy(more, more + dim, acc);
        } else if (next <= maximum) {
            const float by = exp_of(next - maximum);
            sum = sum + split.sum[row] * by;
            kernels.scale(more, by, more, dim);
            kernels.add(acc, more, acc, dim);
        } else {  // NaN too, and it spreads
            const float by = exp_of(maximum - next);
            maximum = next;
            sum = sum * by + split.sum[row];
            kernels.scale(acc, by, acc, dim);
            kernels.add(acc, more, acc, dim);
        }
    }
}

// The step's arrays and this thread's scratch, for run_attention.
struct Runner {
    const Kernels &kernels;
    const Attention &attention;
    const StepView &step;
    const float *q;
    const std::ptrdiff_t q_stride;
    float *out;
    const std::ptrdiff_t out_stride;
    std::uint8_t *scratch;
    const int dim = attention.cache.head_dim, group = group_of(attention);

    int rows_of(const Item &item) const { return item.num_tokens * group; }

    // Scratch: state and results of kSplitsAtOnce, the tokens' positions, then the kernel's own.
    void attend(const Item &item, int split0, int split1, const Partials &to) const {
        std::uint8_t *after =
            scratch + Partials::floats(1 + kSplitsAtOnce, rows_of(item), dim) * sizeof(float);
        std::int32_t *positions = reinterpret_cast<std::int32_t *>(after);
        after += static_cast<std::size_t>(item.num_tokens) * sizeof(std::int32_t);
        for (int i = 0; i < item.num_tokens; ++i) {
            const int token = item.first_token + i;
            positions[i] = step.slot[token] < 0 ? -1 : step.positions[token];
        }
        AttentionRows view;
        view.q = q + item.first_token * q_stride +
                 static_cast<std::ptrdiff_t>(item.kv_head) * group * dim;
        view.q_stride = q_stride;
        view.positions = positions;
        view.num_tokens = item.num_tokens;
        view.group = group;
        view.kv_head = item.kv_head;
        view.blocks =
            step.block_table + static_cast<std::ptrdiff_t>(item.sequence) * step.max_blocks;
        view.seq_len = step.seq_len[item.sequence];
        view.scale = attention.scale;
        view.window = attention.window;
        view.softcap = attention.softcap;
        kernels.attend(attention.cache, view, split0, split1, to.maximum, to.sum, to.acc, after);
    }

    void finish(const Item &item, const Partials &result) const {
        for (int row = 0; row < result.rows; ++row) {
            float *to = out + (item.first_token + row / group) * out_stride +
                        static_cast<std::ptrdiff_t>(item.kv_head * group + row % group) * dim;
            const float sum = result.sum[row];
            if (sum == 0) {
                std::fill(to, to + dim, 0.0f);
            } else {
                const float *acc = result.acc + static_cast<std::ptrdiff_t>(row) * dim;
                kernels.scale(acc, 1.0f / sum, to, dim);
                kernels.round(to, dim, attention.dtype);
            }
        }
    }

    void run_whole(const Item &item) const {
        const Partials parts(reinterpret_cast<float *>(scratch), 1 + kSplitsAtOnce, rows_of(item),
                             dim);
        for (int s = item.split0; s < item.split1;) {
            const int first = s == item.split0 ? 0 : 1;  // place 0 is the state
            const int count = std::min(kSplitsAtOnce, item.split1 - s);
            attend(item, s, s + count, parts.from(first));
            for (int i = 1; i < first + count; ++i) combine(kernels, parts, parts.from(i));
            s += count;
        }
        finish(item, parts);
    }

    void combine_stored(const Item &item, const Partials &stored) const {
        for (int i = 1; i < item.split1 - item.split0; ++i)
            combine(kernels, stored, stored.from(i));
        finish(item, stored);
    }
};

std::size_t shared_bytes(const Attention &attention, int context, int threads) {
    const int keys = attention.window > 0
                         ? std::min(context, attention.window + item_tokens(attention) + 2 * kSplit)
                         : context;
    // A share's boundary cuts at most one item.
    return static_cast<std::size_t>(threads - 1) * sizeof(float) *
           Partials::floats(keys / kSplit + 1, item_rows(attention), attention.cache.head_dim);
}

}  // namespace

void write_kv(const Kernels &kernels, const KVCacheView &cache, const StepView &step,
              const float *k, std::ptrdiff_t k_stride, const float *v, std::ptrdiff_t v_stride,
              int thread, int threads) {
    const std::int64_t tokens = step.num_tokens, end = tokens * (thread + 1) / threads;
    for (std::int64_t t = tokens * thread / threads; t < end; ++t)
        if (step.slot[t] >= 0)
            kernels.kv_write(cache, step.slot[t], k + t * k_stride, v + t * v_stride);
}

std::size_t attention_shared_bytes(const Attention &attention, const StepView &step, int threads) {
    int longest = 0;
    for (int s = 0; s < step.num_sequences; ++s) longest = std::max(longest, step.seq_len[s]);
    return shared_bytes(attention, longest, threads);
}

std::size_t attention_scratch_bytes(const Attention &attention) {
    const int rows = item_rows(attention), dim = attention.cache.head_dim;
    return Partials::floats(1 + kSplitsAtOnce, rows, dim) * sizeof(float) +
           static_cast<std::size_t>(item_tokens(attention)) * sizeof(std::int32_t) +
           attend_scratch_bytes(rows, dim);
}

std::size_t attention_shared_bound(const Attention &attention, int /*max_tokens*/,
                                   int /*max_sequences*/, int max_context, int threads) {
    return shared_bytes(attention, max_context, threads);
}

void run_attention(const Kernels &kernels, const Attention &attention, const StepView &step,
                   const float *q, std::ptrdiff_t q_stride, float *out, std::ptrdiff_t out_stride,
                   Pool &pool, int thread, std::uint8_t *shared, std::uint8_t *scratch) {
    const int threads = pool.size();
    const Runner runner{kernels, attention, step, q, q_stride, out, out_stride, scratch};
    const Shares shares(attention, step, threads);

    // Calls whole(item) for items of this thread, divided(item, index, stored, begin, end) for all
    // items that are shared, with this thread's splits. Returns the number of the latter.
    const auto walk = [&](auto &&whole, auto &&divided) {
        const std::int64_t share_begin = shares.boundary(thread);
        const std::int64_t share_end = shares.boundary(thread + 1);
        std::int64_t start = 0;
        float *stored = reinterpret_cast<float *>(shared);
        int index = 0;
        for_each_item(attention, step, [&](const Item &item) {
            const int begin = shares.cut(item, start, share_begin);
            const int end = shares.cut(item, start, share_end);
            if (shares.is_divided(item, start)) {
                const int splits = item.split1 - item.split0, rows = runner.rows_of(item);
                divided(item, index++, Partials(stored, splits, rows, runner.dim), begin, end);
                stored += Partials::floats(splits, rows, runner.dim);
            } else if (begin < end) {
                whole(item);
            }
            start += item.cost;
        });
        return index;
    };

    const int num_divided = walk(
        [&](const Item &item) { runner.run_whole(item); },
        [&](const Item &item, int, const Partials &stored, int begin, int end) {
            if (begin < end) runner.attend(item, begin, end, stored.from(begin - item.split0));
        });
    if (thread == 0) {  // rows behind the last sequence are padding
        const int width = attention.num_heads * runner.dim;
        for (int t = step.query_start[step.num_sequences]; t < step.num_tokens; ++t)
            std::fill_n(out + t * out_stride, width, 0.0f);
    }
    if (num_divided == 0) return;
    pool.barrier();
    walk([](const Item &) {},
         [&](const Item &item, int index, const Partials &stored, int, int) {
             if (index % threads == thread) runner.combine_stored(item, stored);
         });
}

// ------------------------------------------------------------------------- entries for tests

namespace {

using In = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntRows = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string &message) { throw nb::value_error(message.c_str()); }
void check(bool holds, const char *message) {
    if (!holds) refuse(message);
}

const Kernels &unit_of(const std::string &name) {
    const Kernels *kernels = find_kernels(name.c_str());
    if (kernels == nullptr) refuse("this machine cannot run the unit '" + name + "'");
    return *kernels;
}

Dtype dtype_of(const std::string &name) {
    if (name == "float32") return Dtype::kF32;
    if (name == "bfloat16") return Dtype::kBF16;
    if (name == "float16") return Dtype::kF16;
    refuse("unknown dtype '" + name + "'; supported: float32, bfloat16, float16");
}

std::vector<std::string> attention_units() {
    std::vector<std::string> names;
    for (int i = 0; usable_kernels(i) != nullptr; ++i) names.push_back(usable_kernels(i)->name);
    return names;
}

void rows_test(const std::string &unit, const std::string &op, In x, In y, Out out, float a,
               float b) {
    const Kernels &kernels = unit_of(unit);
    const int n = static_cast<int>(x.shape(0));
    check(out.shape(0) == x.shape(0), "out must be as long as x");
    const bool binary =
        op == "rms_norm" || op == "add" || op == "silu_mul" || op == "gelu_tanh_mul";
    check(!binary || y.shape(0) == x.shape(0), "y must be as long as x");
    if (op == "rms_norm") {
        kernels.rms_norm(x.data(), y.data(), out.data(), n, a, b);
    } else if (op == "add") {
        kernels.add(x.data(), y.data(), out.data(), n);
    } else if (op == "scale") {
        kernels.scale(x.data(), a, out.data(), n);
    } else if (op == "softcap") {
        kernels.softcap(x.data(), a, out.data(), n);
    } else if (op == "silu_mul") {
        kernels.silu_mul(x.data(), y.data(), out.data(), n);
    } else if (op == "gelu_tanh_mul") {
        kernels.gelu_tanh_mul(x.data(), y.data(), out.data(), n);
    } else if (op == "float32" || op == "bfloat16" || op == "float16") {
        std::copy(x.data(), x.data() + n, out.data());
        kernels.round(out.data(), n, dtype_of(op));
    } else {
        refuse("unknown operation '" + op + "'");
    }
}

void rope_test(const std::string &unit, In x, In cos, In sin, Out out, int head_dim,
               bool interleaved) {
    const Kernels &kernels = unit_of(unit);
    check(head_dim > 0 && x.shape(0) % static_cast<std::size_t>(head_dim) == 0,
          "x must be whole heads");
    check(out.shape(0) == x.shape(0), "out must be as long as x");
    check(cos.shape(0) == sin.shape(0) && 2 * cos.shape(0) <= static_cast<std::size_t>(head_dim),
          "cos and sin must be equally long and fit a head");
    kernels.rope(x.data(), cos.data(), sin.data(), out.data(),
                 static_cast<int>(x.shape(0)) / head_dim, head_dim, static_cast<int>(cos.shape(0)),
                 interleaved);
}

void to_bf16_test(const std::string &unit, In x, Array<std::uint16_t> out) {
    check(out.shape(0) >= x.shape(0) && out.shape(0) % kGroup == 0,
          "out must be a multiple of 32, no shorter than x");
    unit_of(unit).to_bf16(x.data(), static_cast<int>(x.shape(0)), static_cast<int>(out.shape(0)),
                          out.data());
}

int to_int8_test(const std::string &unit, In x, Array<std::int8_t> q, Out scale,
                 Array<std::int32_t> sum16, Out scaled_sum, Array<std::int32_t> fine_group,
                 Array<std::int8_t> fine_q, Out fine_scale, Array<std::int32_t> fine_sum16) {
    const std::size_t stride = q.shape(0);
    check(stride >= x.shape(0) && stride % kGroup == 0 && fine_q.shape(0) == stride,
          "q must be a multiple of 32, no shorter than x, and fine_q as long");
    check(scale.shape(0) == stride / 32 && scaled_sum.shape(0) == stride / 32 &&
              fine_scale.shape(0) == stride / 32 && fine_group.shape(0) == stride / 32 &&
              sum16.shape(0) == stride / 16 && fine_sum16.shape(0) == stride / 16,
          "scales, scaled_sum and fine_group take one number per 32, sums one per 16");
    std::int32_t fine_count = 0;
    unit_of(unit).to_int8(x.data(), static_cast<int>(x.shape(0)), static_cast<int>(stride),
                          Int8Row{q.data(), scale.data(), sum16.data(), scaled_sum.data(),
                                  &fine_count, fine_group.data(), fine_q.data(), fine_scale.data(),
                                  fine_sum16.data()});
    return fine_count;
}

// Writes k and v of a packed step to `cache` (one layer, blocks end to end), then runs attention.
// Where `repeats` is not 0, attention runs that often and the seconds of the fastest are returned.
double attention_test(const std::string &unit, const std::string &cache_dtype,
                      Array<std::uint8_t> cache, int block_size, int num_kv_heads, int head_dim,
                      InRows q, InRows k, InRows v, Ints positions, Ints query_start, Ints seq_len,
                      IntRows block_table, Ints slot, OutRows out, float scale, int window,
                      float softcap, const std::string &dtype, int threads, int repeats) {
    const Kernels &kernels = unit_of(unit);
    Attention attention;
    KVCacheView &view = attention.cache;
    view.dtype = dtype_of(cache_dtype);
    check(block_size > 0 && num_kv_heads > 0 && head_dim > 0 && head_dim % 2 == 0,
          "block_size, num_kv_heads and head_dim must be above 0, head_dim even");
    check(threads >= 1 && threads <= 64, "threads must be 1 to 64");
    view.num_kv_heads = num_kv_heads;
    view.head_dim = head_dim;
    view.block_size = block_size;
    view.layer = cache.data();
    view.head_bytes = static_cast<std::size_t>(2) * static_cast<std::size_t>(block_size) *
                      static_cast<std::size_t>(head_dim) * (view.dtype == Dtype::kF32 ? 4 : 2);
    view.block_stride = view.head_bytes * static_cast<std::size_t>(num_kv_heads);
    const auto num_blocks = static_cast<std::int64_t>(cache.shape(0) / view.block_stride);

    const std::size_t num_tokens = slot.shape(0), num_sequences = seq_len.shape(0);
    const std::size_t kv_width = static_cast<std::size_t>(num_kv_heads * head_dim);
    check(q.shape(0) == num_tokens && k.shape(0) == num_tokens && v.shape(0) == num_tokens &&
              positions.shape(0) == num_tokens && out.shape(0) == num_tokens,
          "q, k, v, positions, slot and out must have a row per token");
    check(k.shape(1) == kv_width && v.shape(1) == kv_width, "k and v must have all kv heads' dims");
    check(q.shape(1) > 0 && q.shape(1) % kv_width == 0 && out.shape(1) == q.shape(1),
          "q and out must have whole groups of heads");
    check(query_start.shape(0) == num_sequences + 1 && block_table.shape(0) == num_sequences,
          "query_start has S + 1 entries, block_table S rows");
    check(query_start(0) == 0, "query_start must begin with 0");
    for (std::size_t s = 0; s < num_sequences; ++s) {
        check(query_start(s) <= query_start(s + 1) &&
                  query_start(s + 1) <= static_cast<std::int64_t>(num_tokens),
              "query_start must ascend within the tokens");
        const std::int64_t length = seq_len(s), blocks = (length + block_size - 1) / block_size;
        check(length >= 0 && blocks <= static_cast<std::int64_t>(block_table.shape(1)),
              "a sequence is longer than its blocks");
        for (std::size_t i = 0; i < static_cast<std::size_t>(blocks); ++i)
            check(block_table(s, i) >= 0 && block_table(s, i) < num_blocks,
                  "a block is outside the cache");
    }
    for (std::size_t t = 0; t < num_tokens; ++t)
        check(slot(t) >= -1 && slot(t) < num_blocks * block_size, "a slot is outside the cache");

    attention.num_heads = static_cast<int>(q.shape(1)) / head_dim;
    attention.scale = scale;
    attention.window = window;
    attention.softcap = softcap;
    attention.dtype = dtype_of(dtype);
    StepView step;
    step.num_tokens = static_cast<int>(num_tokens);
    step.num_sequences = static_cast<int>(num_sequences);
    step.max_blocks = static_cast<int>(block_table.shape(1));
    step.positions = positions.data();
    step.query_start = query_start.data();
    step.seq_len = seq_len.data();
    step.block_table = block_table.data();
    step.slot = slot.data();

    nb::gil_scoped_release unlocked;
    Pool pool(threads);
    std::vector<std::uint8_t> shared(attention_shared_bytes(attention, step, threads));
    const std::size_t scratch_bytes = (attention_scratch_bytes(attention) + 63) / 64 * 64;
    std::vector<std::uint8_t> scratch(scratch_bytes * static_cast<std::size_t>(threads));
    pool.run([&](int thread) {
        write_kv(kernels, view, step, k.data(), static_cast<std::ptrdiff_t>(k.shape(1)), v.data(),
                 static_cast<std::ptrdiff_t>(v.shape(1)), thread, threads);
    });
    double fastest = std::numeric_limits<double>::infinity();
    for (int i = 0; i < std::max(1, repeats); ++i) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run([&](int thread) {
            const auto width = static_cast<std::ptrdiff_t>(q.shape(1));
            run_attention(kernels, attention, step, q.data(), width, out.data(), width, pool,
                          thread, shared.data(),
                          scratch.data() + scratch_bytes * static_cast<std::size_t>(thread));
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        fastest = std::min(fastest, took.count());
    }
    return fastest;
}

}  // namespace

void register_attention(nb::module_ &m) {
    m.def("attention_units", &attention_units,
          "Names of the instruction set units that this machine can run, fastest first.");
    m.def("rows_test", &rows_test, nb::arg("unit"), nb::arg("op"), nb::arg("x").noconvert(),
          nb::arg("y").noconvert(), nb::arg("out").noconvert(), nb::arg("a") = 0.0f,
          nb::arg("b") = 0.0f, "One row-wise operation on one row, for tests.");
    m.def("rope_test", &rope_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("cos").noconvert(), nb::arg("sin").noconvert(), nb::arg("out").noconvert(),
          nb::arg("head_dim"), nb::arg("interleaved"), "Rotates one row, for tests.");
    m.def("to_bf16_test", &to_bf16_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("out").noconvert(), "A row as an operand of bf16 products, for tests.");
    m.def("to_int8_test", &to_int8_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("q").noconvert(), nb::arg("scale").noconvert(), nb::arg("sum16").noconvert(),
          nb::arg("scaled_sum").noconvert(), nb::arg("fine_group").noconvert(),
          nb::arg("fine_q").noconvert(), nb::arg("fine_scale").noconvert(),
          nb::arg("fine_sum16").noconvert());
    m.def("attention_test", &attention_test, nb::arg("unit"), nb::arg("cache_dtype"),
          nb::arg("cache").noconvert(), nb::arg("block_size"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("v").noconvert(), nb::arg("positions").noconvert(),
          nb::arg("query_start").noconvert(), nb::arg("seq_len").noconvert(),
          nb::arg("block_table").noconvert(), nb::arg("slot").noconvert(),
          nb::arg("out").noconvert(), nb::arg("scale"), nb::arg("window") = 0,
          nb::arg("softcap") = 0.0f, nb::arg("dtype") = "float32", nb::arg("threads") = 1,
          nb::arg("repeats") = 0,
          "Writes a step's k and v to a cache, runs attention and returns seconds, for tests.");
}

}  // namespace engineroom
