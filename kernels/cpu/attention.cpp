// Paged attention over a packed step, shared out among threads; and its entries for tests.
//
// An item is a block of one sequence's tokens under one kv head. Threads own ranges of items of
// about equal cost, which all of them work out alike. An item is whole unless it costs so much that
// a thread would wait for it: then its splits of keys are divided, their results are stored, and
// after a barrier one thread combines them. The combination goes over splits in ascending order
// either way, so its bits are the same.
#include "attention.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <vector>


namespace engineroom {
namespace {

constexpr int kItemRows = 24;  // query rows of an item: what a register tile takes in four rounds
constexpr int kSplitsAtOnce = 4;  // of an item, before they are combined
constexpr int kTileKeys = 16;
constexpr float kUnit = 0x1.715476p+0f;  // 1 / log 2: the unit of scores (isa/attend.inl)
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

// The item of that many tokens of sequence s from t on.
Item item_at(const Attention &attention, const StepView &step, int s, int head, int t, int tokens) {
    Item item = {};
    item.sequence = s;
    item.kv_head = head;
    item.first_token = t;
    item.num_tokens = tokens;
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
    return item;
}

// Calls action(item) for every item of the step.
template <class Action>
void for_each_item(const Attention &attention, const StepView &step, Action &&action) {
    const int at_once = item_tokens(attention);
    for (int s = 0; s < step.num_sequences; ++s)
        for (int head = 0; head < attention.cache.num_kv_heads; ++head)
            for (int t = step.query_start[s], end = step.query_start[s + 1]; t < end; t += at_once)
                action(item_at(attention, step, s, head, t, std::min(at_once, end - t)));
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

float exp2_of(float x) { return static_cast<float>(std::exp2(static_cast<double>(x))); }

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
            const float by = exp2_of(next - maximum);
            sum = sum + split.sum[row] * by;
            kernels.scale(more, by, more, dim);
            kernels.add(acc, more, acc, dim);
        } else {  // NaN too, and it spreads
            const float by = exp2_of(maximum - next);
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

    const std::int32_t *blocks_of(const Item &item) const {
        return step.block_table + static_cast<std::ptrdiff_t>(item.sequence) * step.max_blocks;
    }

    // `next`: an item and its split that this thread attends to afterwards, or nullptr. Scratch:
    // state and results of kSplitsAtOnce, the tokens' positions, then the kernel's own.
    void attend(const Item &item, int split0, int split1, const Partials &to, const Item *next,
                int next_split) const {
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
        view.blocks = blocks_of(item);
        view.seq_len = step.seq_len[item.sequence];
        view.scale = attention.scale;
        view.window = attention.window;
        view.softcap = attention.softcap;
        if (next != nullptr) {
            view.next_blocks = blocks_of(*next);
            view.next_kv_head = next->kv_head;
            view.next_position = next_split * kSplit;
            view.next_seq_len = step.seq_len[next->sequence];
        }
        kernels.attend(attention.cache, view, split0, split1, to.maximum, to.sum, to.acc, after);
    }

    void finish(const Item &item, const Partials &result) const {
        for (int token = 0, row = 0; token < item.num_tokens; ++token) {
            const int first = item.kv_head * group;
            float *to = out + (item.first_token + token) * out_stride +
                        static_cast<std::ptrdiff_t>(first) * dim;
            for (int head = first; head < first + group; ++head, ++row, to += dim) {
                float sum = result.sum[row];
                if (attention.sinks != nullptr && sum != 0)
                    sum += exp2_of(attention.sinks[head] * kUnit - result.maximum[row]);
                if (sum == 0) {
                    std::fill(to, to + dim, 0.0f);
                } else {
                    const float *acc = result.acc + static_cast<std::ptrdiff_t>(row) * dim;
                    kernels.scale(acc, 1.0f / sum, to, dim);
                }
            }
            kernels.round(to - group * dim, group * dim, attention.dtype);
        }
    }

    // `next`: the item that this thread runs afterwards, or nullptr.
    void run_whole(const Item &item, const Item *next) const {
        const Partials parts(reinterpret_cast<float *>(scratch), 1 + kSplitsAtOnce, rows_of(item),
                             dim);
        for (int s = item.split0; s < item.split1;) {
            const int first = s == item.split0 ? 0 : 1;  // place 0 is the state
            const int count = std::min(kSplitsAtOnce, item.split1 - s);
            const int after = s + count;
            const bool more = after < item.split1;
            attend(item, s, after, parts.from(first), more ? &item : next,
                   more ? after : next != nullptr ? next->split0 : 0);
            for (int i = 1; i < first + count; ++i) combine(kernels, parts, parts.from(i));
            s = after;
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

    Item held;  // until the one after it is known
    bool holds = false;
    const int num_divided = walk(
        [&](const Item &item) {
            if (holds) runner.run_whole(held, &item);
            held = item;
            holds = true;
        },
        [&](const Item &item, int, const Partials &stored, int begin, int end) {
            if (begin < end)
                runner.attend(item, begin, end, stored.from(begin - item.split0), nullptr, 0);
        });
    if (holds) runner.run_whole(held, nullptr);
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

}  // namespace engineroom
