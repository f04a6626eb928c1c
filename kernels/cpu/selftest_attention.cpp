// Self-test of the KV cache and attention over it: every dtype, window, soft-cap and thread count.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "pool.hpp"
#include "selftest_numbers.hpp"

namespace engineroom {
namespace selftest {
namespace {

class Cache {
  public:
    KVCacheView view;
    Memory memory;

    Cache(Dtype keys, Dtype values, int num_blocks, int block_size, int num_kv_heads, int head_dim)
        : view(kv_cache_view(keys, values, num_kv_heads, head_dim, block_size)),
          memory(static_cast<std::size_t>(num_blocks) * view.block_stride) {
        view.layer = memory.data();  // filled with 0xff: NaN, whatever the dtype
    }

    // Dim i of all heads' dims.
    double key(int slot, int i) const {
        return element(false, slot, i / view.head_dim, i % view.head_dim);
    }
    double value(int slot, int i) const {
        return element(true, slot, i / view.head_dim, i % view.head_dim);
    }

  private:
    // By the layout that kernels.hpp states.
    double element(bool is_value, int slot, int head, int d) const {
        const Dtype dtype = is_value ? view.value_dtype : view.key_dtype;
        const bool int4 = dtype == Dtype::kInt4;
        const int size = view.block_size, s = slot % size, group = d / 32, groups = (view.head_dim + 31) / 32;
        const int dim = int4 ? 16 * groups : view.head_dim;
        const bool high = int4 && d % 32 >= 16;
        if (int4) d = 16 * group + d % 16;
        std::size_t at = static_cast<std::size_t>(s) * dim + d;
        const bool pairs = dtype == Dtype::kBF16 || dtype == Dtype::kFp8;
        const int step = pairs ? 2 : dtype == Dtype::kInt8 || int4 ? 4 : 1;
        const int exchanged[] = {0, 2, 1, 3};
        if (view.is_tiled(dtype) && is_value)
            at = (static_cast<std::size_t>(s / step) * dim + d) * step +
                 (int4 ? exchanged[s % 4] : s % step);
        if (view.is_tiled(dtype) && !is_value)
            at = (static_cast<std::size_t>(s / 16) * (dim / step) + d / step) * 16 * step +
                 s % 16 * step + d % step;
        std::uint8_t *from =
            is_value ? view.values(slot / size, head) : view.keys(slot / size, head);
        if (int4) {
            std::uint16_t scale, offset;
            const std::uint8_t *scales = from + static_cast<std::size_t>(size) * dim;
            std::memcpy(&scale, scales + 2 * (group * size + s), 2);
            std::memcpy(&offset, scales + 2 * ((groups + group) * size + s), 2);
            const int code = high ? from[at] >> 4 : from[at] & 15;
            return bf16_value(scale) * static_cast<float>(code) + bf16_value(offset);
        }
        if (dtype == Dtype::kInt8) {
            float scale;
            std::memcpy(&scale, view.scales(from, dtype) + 4 * s, 4);
            return scale * static_cast<float>(from[at] - 128);
        }
        if (dtype == Dtype::kFp8) {
            float scale;
            std::memcpy(&scale, view.scales(from, dtype) + 4 * s, 4);
            return scale * e4m3_value(from[at]);
        }
        if (dtype == Dtype::kF32) {
            float x;
            std::memcpy(&x, from + 4 * at, 4);
            return x;
        }
        std::uint16_t bits;
        std::memcpy(&bits, from + 2 * at, 2);
        return dtype == Dtype::kF16 ? f16_value(bits) : bf16_value(bits);
    }
};

// Makes of one head's numbers what a cache of that dtype holds.
void round_head(float *x, int dim, Dtype dtype) {
    if (dtype == Dtype::kInt4) {
        // The 8 bits of a number from its first on, rounded down or up.
        const auto eight = [](float value, bool up) {
            int exponent;
            const double fraction = std::ldexp(std::frexp(value, &exponent), 8);
            const double whole = up ? std::ceil(fraction) : std::floor(fraction);
            return static_cast<float>(std::ldexp(whole, exponent - 8));
        };
        for (int g = 0; g < dim; g += 32) {
            float *end = x + std::min(dim, g + 32);
            const float offset = eight(*std::min_element(x + g, end), false);
            const float scale = eight((*std::max_element(x + g, end) - offset) / 15.0f, true);
            const float by = 1.0f / scale;
            for (float *at = x + g; at < end; ++at)
                *at = scale * std::min(15.0f, std::nearbyint((*at - offset) * by)) + offset;
        }
        return;
    }
    float most = 0;
    for (int d = 0; d < dim; ++d) most = std::max(most, std::fabs(x[d]));
    if (dtype == Dtype::kFp8) {
        for (int d = 0; d < dim; ++d) {  // 4 bits of significand, steps of 2^-9 at least
            const float scaled = x[d] * (448 / most);
            int exponent;
            std::frexp(scaled, &exponent);
            const int last = std::max(exponent - 4, -9);
            x[d] = most / 448 *
                   static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(scaled, -last)), last));
        }
        return;
    }
    for (int d = 0; d < dim; ++d)
        x[d] = dtype == Dtype::kInt8 ? most / 127 * std::nearbyint(x[d] * (127 / most))
                                     : static_cast<float>(rounded(x[d], dtype));
}

}  // namespace

void check_attention(const Kernels &k) {
    Random random{8};
    struct Case {
        Dtype dtype;
        int block_size, head_dim, kv_heads, group, window;
        float softcap;
        Dtype other = Dtype::kF32;  // of the values, where it is integers
        Dtype values() const { return other == Dtype::kF32 ? dtype : other; }
    };
    const Case cases[] = {
        {Dtype::kF32, 16, 64, 2, 1, 0, 0},     {Dtype::kF32, 5, 20, 1, 3, 0, 0},
        {Dtype::kF16, 32, 80, 1, 7, 100, 0},   {Dtype::kF16, 8, 34, 2, 2, 0, 30.0f},
        {Dtype::kBF16, 16, 128, 1, 4, 0, 0},   {Dtype::kBF16, 48, 18, 2, 2, 300, 0},
        {Dtype::kBF16, 7, 64, 1, 1, 0, 20.0f}, {Dtype::kF32, 64, 6, 3, 13, 17, 0},
        {Dtype::kInt8, 16, 64, 2, 3, 0, 0},    {Dtype::kInt8, 32, 20, 1, 5, 100, 0},
        {Dtype::kInt8, 5, 34, 2, 1, 0, 30.0f}, {Dtype::kInt4, 16, 64, 2, 3, 0, 0},
        {Dtype::kInt4, 32, 40, 1, 5, 100, 0},  {Dtype::kInt4, 16, 20, 1, 2, 0, 0},
        {Dtype::kInt4, 5, 34, 2, 1, 0, 30.0f}, {Dtype::kInt4, 16, 96, 1, 6, 0, 0},
        {Dtype::kInt8, 16, 64, 2, 3, 0, 0, Dtype::kInt4},
        {Dtype::kInt8, 32, 34, 1, 7, 100, 0, Dtype::kInt4},
        {Dtype::kInt8, 5, 128, 1, 2, 0, 30.0f, Dtype::kInt4},
        {Dtype::kFp8, 16, 64, 2, 3, 0, 0},     {Dtype::kFp8, 32, 20, 1, 5, 100, 0},
        {Dtype::kFp8, 5, 34, 2, 1, 0, 30.0f},
    };
    // Sequences: their length, and how many of its last tokens are queries.
    const int lengths[] = {1, 40, 530, 257}, queries[] = {1, 23, 3, 1};
    const int num_sequences = 4, padding = 2;  // rows of slot -1 behind the last
    for (const Case &c : cases) {
        char title[64];
        std::snprintf(title, sizeof title, "attention %s %s block %d dim %d", name_of(c.dtype),
                      name_of(c.values()), c.block_size, c.head_dim);
        // The weights of values of bf16, of 4 bits and of fp8 are bf16 too.
        // Those of an int8 cache have 15 bits; tests/kernels/test_cpu_attention.py has the bound.
        const Dtype values_of = c.values();
        const bool has_digits = values_of == Dtype::kInt8;
        const bool is_float = values_of == Dtype::kF32 || values_of == Dtype::kF16;
        const double tolerance = is_float ? 2e-6 : has_digits ? 6e-4 : 4e-3;
        Check written(k.name, std::string("kv_write") + (title + 9));
        Check check(k.name, title, tolerance);
        const int dim = c.head_dim, heads = c.kv_heads * c.group, kv_width = c.kv_heads * dim;
        int max_blocks = 0, num_blocks = 0, num_tokens = padding;
        for (int s = 0; s < num_sequences; ++s) {
            const int blocks = (lengths[s] + c.block_size - 1) / c.block_size;
            max_blocks = std::max(max_blocks, blocks);
            num_blocks += blocks;
            num_tokens += queries[s];
        }
        Cache cache(c.dtype, c.values(), num_blocks, c.block_size, c.kv_heads, dim);
        std::vector<std::int32_t> shuffled(num_blocks), table(num_sequences * max_blocks, 0);
        for (int i = 0; i < num_blocks; ++i) {
            shuffled[i] = i;
            std::swap(shuffled[i], shuffled[random.below(i + 1)]);
        }
        std::vector<std::int32_t> positions(num_tokens, 0), slots(num_tokens, -1);
        std::vector<std::int32_t> starts = {0}, lens;
        std::vector<std::vector<float>> keys, values;  // by sequence [length][kv_width]
        std::vector<char> taken(static_cast<std::size_t>(num_blocks) * c.block_size, 0);
        int next_block = 0, token = 0;
        for (int s = 0; s < num_sequences; ++s) {
            const int blocks = (lengths[s] + c.block_size - 1) / c.block_size;
            for (int i = 0; i < blocks; ++i) table[s * max_blocks + i] = shuffled[next_block++];
            keys.push_back(random.normals(static_cast<std::size_t>(lengths[s]) * kv_width));
            values.push_back(random.normals(static_cast<std::size_t>(lengths[s]) * kv_width));
            for (int p = 0; p < lengths[s]; ++p) {
                const std::int32_t slot =
                    table[s * max_blocks + p / c.block_size] * c.block_size + p % c.block_size;
                k.kv_write(cache.view, slot, keys[s].data() + p * kv_width,
                           values[s].data() + p * kv_width);
                taken[slot] = 1;
                for (int i = 0; i < kv_width; i += dim) {
                    round_head(keys[s].data() + p * kv_width + i, dim, c.dtype);
                    round_head(values[s].data() + p * kv_width + i, dim, c.values());
                }
                for (int i = 0; i < kv_width; ++i) {
                    const std::size_t at = static_cast<std::size_t>(p) * kv_width + i;
                    written.same(cache.key(slot, i), keys[s][at], "key", i);
                    written.same(cache.value(slot, i), values[s][at], "value", i);
                }
                if (p >= lengths[s] - queries[s]) {
                    positions[token] = p;
                    slots[token++] = slot;
                }
            }
            starts.push_back(token);
            lens.push_back(lengths[s]);
        }
        for (std::size_t slot = 0; slot < taken.size(); ++slot)  // nothing else was written
            for (int i = 0; i < kv_width && !taken[slot]; ++i) {
                const int at = static_cast<int>(slot);
                written.truth(std::isnan(cache.key(at, i)), "free key", at);
                written.truth(std::isnan(cache.value(at, i)), "free value", at);
            }
        starts.back() = num_tokens;  // the padding rows count to the last sequence

        std::vector<float> q = random.normals(static_cast<std::size_t>(num_tokens) * heads * dim);
        for (float &x : q) x = static_cast<float>(rounded(x, Dtype::kBF16));
        Attention attention;
        attention.cache = cache.view;
        attention.num_heads = heads;
        attention.scale = 1 / std::sqrt(static_cast<float>(dim));
        attention.window = c.window;
        attention.softcap = c.softcap;
        StepView step;
        step.num_tokens = num_tokens;
        step.num_sequences = num_sequences;
        step.max_blocks = max_blocks;
        step.positions = positions.data();
        step.query_start = starts.data();
        step.seq_len = lens.data();
        step.block_table = table.data();
        step.slot = slots.data();
        std::vector<float> out(q.size()), first_out;
        for (int threads = 1; threads <= 3; ++threads) {
            std::fill(out.begin(), out.end(), kNaN);
            Pool pool(threads);
            const Memory shared(attention_shared_bytes(attention, step, threads));
            const std::size_t bytes = (attention_scratch_bytes(attention) + 63) / 64 * 64;
            std::vector<std::unique_ptr<Memory>> scratch;
            for (int i = 0; i < threads; ++i) scratch.push_back(std::make_unique<Memory>(bytes));
            const std::size_t bound =
                attention_shared_bound(attention, num_tokens, num_sequences, 530, threads);
            check.truth(shared.size() <= bound, "bound of shared bytes", threads);
            pool.run([&](int thread) {
                run_attention(k, attention, step, q.data(), heads * dim, out.data(), heads * dim,
                              pool, thread, shared.data(), scratch[thread]->data());
            });
            if (threads == 1) first_out = out;
            check.same_bits(out.data(), first_out.data(), 4 * out.size(), "threads", threads);
        }
        for (int s = 0; s < num_sequences; ++s)
            for (int t = starts[s]; t < starts[s + 1]; ++t)
                for (int h = 0; h < heads; ++h) {
                    const float *to = out.data() + (static_cast<std::size_t>(t) * heads + h) * dim;
                    if (slots[t] < 0) {
                        for (int d = 0; d < dim; ++d) check.same(to[d], 0, "padding", t);
                        continue;
                    }
                    const float *from = q.data() + (static_cast<std::size_t>(t) * heads + h) * dim;
                    const int begin = c.window > 0 ? std::max(0, positions[t] - c.window + 1) : 0;
                    std::vector<double> weight, sum(dim, 0.0);
                    double most = -HUGE_VAL, total = 0;
                    for (int p = begin; p <= positions[t]; ++p) {
                        const float *key = keys[s].data() + p * kv_width + h / c.group * dim;
                        double score = 0;
                        for (int d = 0; d < dim; ++d)
                            score += static_cast<double>(from[d]) * key[d];
                        score *= attention.scale;
                        if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
                        weight.push_back(score);
                        most = std::max(most, score);
                    }
                    for (int p = begin; p <= positions[t]; ++p) {
                        const double w = std::exp(weight[p - begin] - most);
                        const float *value = values[s].data() + p * kv_width + h / c.group * dim;
                        total += w;
                        for (int d = 0; d < dim; ++d) sum[d] += w * value[d];
                    }
                    for (int d = 0; d < dim; ++d) check.near(to[d], sum[d] / total, 4, "out", t);
                }
    }
}

}  // namespace selftest
}  // namespace engineroom
