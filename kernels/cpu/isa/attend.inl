// Attention over the paged cache, one split of 256 keys at a time.
//
// Law 2. Within a split a row's scores, maximum, sum and weighted values run over dims and keys in
// ascending order, one vector lane each, whatever other rows share the loads. A key that a row does
// not see has the weight 0: adding 0 times a finite value changes nothing, so it does not matter
// whether its tile was walked for a neighbour's sake. A value that is not finite (a slot past the
// sequence's end may hold anything, a later token's value may be NaN) would change something: a row
// whose result is not finite is made anew from a copy of its tiles with zeros where it sees none.
//
// Scores are kept in units of log 2: weights are powers of two.
namespace engineroom {
namespace ER_ISA {

// A call's scratch, by row: scores [rows][256], weights [rows][256] (where Operand is float these
// take the scores' place; digits [rows][2][256], of groups [rows][kGroupsAtOnce][256]), q [rows]
// [head_dim] (digits [rows][2][16 n], of groups [rows][32 n]); the rows' spans; the starts, scales and
// sums of these; then the gathered keys and values of a split, and their scales.
template <class Keys, class Values>
struct Attend {
    using Operand = typename Values::Operand;
    static constexpr bool kInPlace = sizeof(Operand) == sizeof(float);
    static constexpr int kAhead = Keys::kAhead;  // tiles

    const KVCacheView &cache;
    const AttentionRows &rows;
    const int count, dim, groups;
    Tiles<Keys, false> keys;
    Tiles<Values, true> values;
    typename Keys::Operand *q;
    float *scores;
    Operand *weights;
    Span *spans, *block_spans;  // of the split in use, by row and by block
    Digits q_digits, weight_digits;
    Grouped q_grouped, weight_grouped;
    // To ask for while the keys and then the values of the split's tiles in use are read.
    const std::uint8_t *ahead[2 * kSplitTiles];

    Attend(const KVCacheView &c, const AttentionRows &r, std::uint8_t *scratch)
        : cache(c),
          rows(r),
          count(r.num_tokens * r.group),
          dim(c.head_dim),
          groups(kv_groups(c.head_dim)),
          keys(c, r, groups),
          values(c, r, groups) {
        const auto take = [&](std::size_t bytes) {
            std::uint8_t *at = scratch;
            scratch += static_cast<std::size_t>(count) * bytes;
            return at;
        };
        scores = reinterpret_cast<float *>(take(kSplit * sizeof(float)));
        weights = kInPlace ? reinterpret_cast<Operand *>(scores)
                           : reinterpret_cast<Operand *>(
                                 take(kSplit * 2 * (Values::kGroups ? kGroupsAtOnce : 1)));
        const int vectors = (dim + 15) / 16;
        q = reinterpret_cast<typename Keys::Operand *>(
            take(Keys::kGroups ? static_cast<std::size_t>(groups) * kKVGroup * 2
                               : static_cast<std::size_t>(vectors) * 64));
        spans = reinterpret_cast<Span *>(take(sizeof(Span)));
        block_spans = reinterpret_cast<Span *>(take(sizeof(Span)));
        const auto digits = [&](std::int8_t *at, int stride) {
            std::int32_t *start = reinterpret_cast<std::int32_t *>(take(8));
            return Digits{at, stride, start, reinterpret_cast<float *>(take(4))};
        };
        const auto grouped = [&](std::uint16_t *at, int stride, int size, int n) {
            return Grouped{at, stride, size,
                           reinterpret_cast<float *>(take(static_cast<std::size_t>(n) * 4)), n};
        };
        if constexpr (Keys::kDigits) q_digits = digits(q, 16 * vectors);
        if constexpr (Keys::kGroups) q_grouped = grouped(q, kKVGroup * groups, kKVGroup, groups);
        if constexpr (Values::kDigits) weight_digits = digits(weights, kSplit);
        if constexpr (Values::kGroups)
            weight_grouped = grouped(weights, kSplit * kGroupsAtOnce, kSplit, kGroupsAtOnce);
        values.take(keys.take(scratch));
        for (const std::uint8_t *&tile : ahead)
            tile = reinterpret_cast<const std::uint8_t *>(keys.gathered);
    }

    // Whether the rows are so few that they wait for memory. Keys of many tokens are in a cache.
    bool waits() const { return rows.num_tokens == 1 || count <= kPrefetchRows; }

    void prepare_q() {
        for (int token = 0, row = 0; token < rows.num_tokens; ++token)
            for (int i = 0; i < rows.group; ++i)
                prepare_row(row++, rows.q + rows.q_stride * token + static_cast<std::ptrdiff_t>(i) * dim);
    }
    void prepare_row(int row, const float *from) {
        if constexpr (Keys::kDigits) {
            const Digits to = q_digits.from(row);
            const F infinity = f_set(__builtin_inff());
            F most = f_zero(), high = f_zero(), low = f_zero();
            for (int d = 0; d < dim; d += 16)
                most = f_max(f_min(f_abs(load_dims(from, d)), infinity), most);
            const float by = digits_factor(f_max_all(most), to.scale);
            for (int d = 0; d < dim; d += 16)
                store_digits(load_dims(from, d), by, to.digits + d, to.stride, &high, &low);
            store_start(to.start, high, low);
        } else if constexpr (Keys::kGroups) {
            const Grouped to = q_grouped.from(row);
            for (int g = 0; g < groups; ++g) {
                std::uint16_t x[kKVGroup];
                f_store_bf16(x, load_dims(from, g * kKVGroup));
                f_store_bf16(x + 16, load_dims(from, g * kKVGroup + 16));
                to.sums[g] = f_sum(f_add(f_load_bf16(x), f_load_bf16(x + 16)));
                for (int i = 0; i < kKVGroup; ++i)
                    to.numbers[g * kKVGroup + i] = x[Keys::dim_at(i)];
            }
        } else {
            typename Keys::Operand *to = q + static_cast<std::ptrdiff_t>(row) * dim;
            int d = 0;
            for (; d + 16 <= dim; d += 16) Keys::operand(to + d, f_load(from + d));
            if (d < dim) Keys::operand_n(to + d, f_load_n(from + d, dim - d), dim - d);
        }
    }
    F load_dims(const float *from, int d) const {
        const int n = dim - d;
        return n > 0 ? f_load_n(from + d, n < 16 ? n : 16) : f_zero();
    }

    // Fills the spans; what all rows see together.
    Span find_spans(const RowBlocks &blocks, int split) {
        Span *row = spans, all = {0, 0};
        for (int token = 0; token < rows.num_tokens; ++token) {
            const Span span = visible(rows, token, split);
            for (int i = 0; i < rows.group; ++i) *row++ = span;
        }
        for (int b = 0; b < blocks.count; ++b) {
            Span span = {0, 0};
            for (int i = blocks.start(b); i < blocks.start(b + 1); ++i) span = span.with(spans[i]);
            block_spans[b] = span;
            all = all.with(span);
        }
        return all;
    }

    // Fills `ahead`. After the split comes the next one of this call, or what the caller reads next.
    void look_ahead(int split, bool last, int first, int end) {
        const int n = end - first;
        const std::int32_t *blocks = last ? rows.next_blocks : rows.blocks;
        const int head = last ? rows.next_kv_head : rows.kv_head;
        const int position = last ? rows.next_position : (split + 1) * kSplit;
        const int length = last ? rows.next_seq_len : rows.seq_len;
        for (int i = 0; i < 2 * n; ++i) {
            const int j = i + kAhead;
            const int at = position + (j - 2 * n) * kTileKeys;
            const void *tile = keys.tile[first];
            if (j < n) {
                tile = keys.tile[first + j];
            } else if (j < 2 * n) {
                tile = values.tile[first + j - n];
            } else if (keys.is_tiled() && at < length) {
                tile = keys.held(blocks[at / keys.cache.block_size], head, at % keys.cache.block_size);
            }
            ahead[i] = static_cast<const std::uint8_t *>(tile);
        }
    }

    // Turns the scores of the block's rows, tiles first .. end-1, into weights, with zeros where a row
    // sees no key.
    template <int N>
    void softmax(int row, int first, int end, float *maximum, float *total) {
        const F hidden = f_set(-__builtin_inff());
        const bool as_they_are = rows.softcap <= 0 && rows.scale > 0;
        const float unit = 0x1.715476p+0f;  // 1 / log 2
        const float factor = as_they_are ? rows.scale * unit : unit;
        float *score = scores + row * kSplit;
        bool sees[N];
        for (int i = 0; i < N; ++i) {
            const Span span = spans[row + i];
            sees[i] = !span.empty();
            if (!as_they_are && sees[i]) cap(score + i * kSplit, span);
            hide(score + i * kSplit, span, first, end);
        }
        // Rows side by side, tile by tile: the latency of one is that of all, and one loop's end is
        // all that the processor has to foresee.
        F most[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) most[i] = hidden;
        for (int t = first; t < end; ++t)
#pragma GCC unroll 6
            for (int i = 0; i < N; ++i)
                most[i] = f_max(f_load(score + i * kSplit + t * kTileKeys), most[i]);
        float bases[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) {
            float &max = maximum[row + i];
            max = f_max_all(most[i]) * factor;
            // NaN scores alone leave the maximum at -inf, which is to mean that no key is seen.
            if (sees[i] && !(max > -__builtin_inff())) max = __builtin_nanf("");
            bases[i] = sees[i] ? max : 0.0f;
        }
        constexpr int kAtOnce = N % 3 == 0 ? 3 : N % 2 == 0 ? 2 : 1;
        for (int i = 0; i < N; i += kAtOnce)
            weigh_scores<kAtOnce>(row + i, first, end, f_set(factor), bases + i, total + row + i);
    }

    // The weights 2^(score * by - base) of N rows, and their sums.
    template <int N>
    void weigh_scores(int row, int first, int end, F by, const float *bases, float *total) {
        float *score = scores + row * kSplit + first * kTileKeys;
        Operand *weight = weights + row * kSplit + first * kTileKeys;
        constexpr int kTiles = N >= 3 ? 1 : 4 / N;  // that many more to hide the latency
        F base[N], sum[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            base[i] = f_set(bases[i]);
            sum[i] = f_zero();
        }
        in_pieces<kTiles>(end - first, 1, [&](int t, auto tiles) {
            F p[N * tiles.value];
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < tiles.value; ++j)
                    p[i * tiles.value + j] = f_sub(
                        f_mul(f_load(score + i * kSplit + (t + j) * kTileKeys), by), base[i]);
            exp2_to_0(p);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < tiles.value; ++j) {
                    const F x = p[i * tiles.value + j];
                    const int at = i * kSplit + (t + j) * kTileKeys;
                    sum[i] = f_add(sum[i], x);
                    if constexpr (Values::kScaled)  // what is multiplied has the values' scales in it
                        f_store(score + at, x);
                    else
                        Values::weight(weight + at, x);
                }
        });
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) total[i] = f_sum(sum[i]);
    }

    // -inf in the place of the scores of tiles first .. end-1 that are outside of the span.
    static void hide(float *score, Span span, int first, int end) {
        const F hidden = f_set(-__builtin_inff());
        const int from = span.empty() ? end : span.first_tile();
        const int to = span.empty() ? end : span.end_tile();
        for (int t = first; t < from; ++t) f_store(score + t * kTileKeys, hidden);
        for (int t = to; t < end; ++t) f_store(score + t * kTileKeys, hidden);
        if (span.empty()) return;
        keep(score, span, from, hidden);
        keep(score, span, to - 1, hidden);
    }

    // A tile's numbers x with `fill` in the place of those outside of the span.
    static F inside(F x, Span span, int t, F fill) {
        const int low = span.from - t * kTileKeys, high = span.to - t * kTileKeys;
        return low > 0 || high < kTileKeys ? f_keep(x, low, high, fill) : x;
    }
    static void keep(float *score, Span span, int t, F fill) {
        float *at = score + t * kTileKeys;
        f_store(at, inside(f_load(at), span, t, fill));
    }

    void cap(float *score, Span span) const {
        const F scale_by = f_set(rows.scale), most = f_set(rows.softcap);
        for (int t = span.first_tile(); t < span.end_tile(); ++t) {
            const F s = f_mul(f_load(score + t * kTileKeys), scale_by);
            f_store(score + t * kTileKeys, rows.softcap > 0 ? softcap_of(s, most) : s);
        }
    }

    // The digits, in tiles first .. end-1, of a row's weights, which lie in the place of its scores,
    // times the scales of the values.
    void take_digits(int row, Span span, int first, int end) const {
        const Digits weight = weight_digits.from(row);
        const float *p = scores + row * kSplit;
        const int from = span.empty() ? end : span.first_tile();
        const int to = span.empty() ? end : span.end_tile();
        const F infinity = f_set(__builtin_inff());
        float weighed[kSplit];
        F most = f_zero(), high = f_zero(), low = f_zero();
        for (int t = from; t < to; ++t) {
            const F x = inside(f_mul(f_load(p + t * kTileKeys), f_load(values.scale[t])), span, t,
                               f_zero());
            f_store(weighed + t * kTileKeys, x);
            most = f_max(f_min(x, infinity), most);
        }
        const float by = digits_factor(f_max_all(most), weight.scale);
        for (int t = first; t < end; ++t) {
            const F w = t >= from && t < to ? f_load(weighed + t * kTileKeys) : f_zero();
            store_digits(w, by, weight.digits + t * kTileKeys, weight.stride, &high, &low);
        }
        store_start(weight.start, high, low);
    }

    // The same for groups group .. group + n - 1 of codes of 4 bits, in bf16; and what the weights
    // and the offsets of each group come to.
    void take_grouped(int row, Span span, int group, int n, int first, int end) const {
        const Grouped weight = weight_grouped.from(row);
        const float *p = scores + row * kSplit;
        const int from = span.empty() ? end : span.first_tile();
        const int to = span.empty() ? end : span.end_tile();
        const std::ptrdiff_t apart = values.apart();
        for (int g = 0; g < n; ++g) {
            std::uint16_t *numbers = weight.numbers + g * weight.size;
            F sum = f_zero();
            for (int t = first; t < from; ++t) f_store_bf16_normal(numbers + t * kTileKeys, f_zero());
            for (int t = from; t < to; ++t) {
                const std::uint16_t *scale = values.scale[t] + (group + g) * apart;
                const F w = f_load(p + t * kTileKeys);
                const F x = inside(f_mul(w, f_load_bf16(scale)), span, t, f_zero());
                const F offset = f_mul(w, f_load_bf16(scale + groups * apart));
                f_store_bf16_normal(numbers + t * kTileKeys, x);
                sum = f_add(sum, inside(offset, span, t, f_zero()));
            }
            for (int t = to; t < end; ++t) f_store_bf16_normal(numbers + t * kTileKeys, f_zero());
            weight.sums[g] = f_sum(sum);
        }
    }

    // The same of fp8: in bf16.
    void take_scaled(int row, Span span, int first, int end) const {
        const float *p = scores + row * kSplit;
        Operand *to = weights + row * kSplit;
        for (int t = first; t < end; ++t) {
            const F x = f_mul(f_load(p + t * kTileKeys), Values::scales(values.scale[t]));
            Values::weight(to + t * kTileKeys, f_keep(x, span.from - t * kTileKeys,
                                                      span.to - t * kTileKeys, f_zero()));
        }
    }

    // Makes a row's result from a copy of its first and last tile of values without those that it
    // does not see. Takes the place of the gathered keys, whose use is over.
    void weigh_alone(int row, Span span, float *acc) {
        using Element = typename Values::Element;
        const Element *own[kSplitTiles];
        const int first = span.first_tile(), end = span.end_tile();
        for (int t = first; t < end; ++t) {
            own[t] = values.tile[t];
            if (t != first && t != end - 1) continue;
            Element *copy = keys.gathered + (t == first ? 0 : kTileKeys * dim);
            for (int i = 0; i < kTileKeys; ++i) {
                const bool seen = t * kTileKeys + i >= span.from && t * kTileKeys + i < span.to;
                for (int d = 0; d < dim; ++d)
                    copy[values.place(i, d)] =
                        seen ? values.tile[t][values.place(i, d)] : Element(0);
            }
            own[t] = copy;
        }
        weigh_tiles<Values, 1>(own + first, ahead, end - first, dim,
                               weights + row * kSplit + first * kTileKeys, acc);
    }

    // Scores of N rows from `row` on with n tiles from `first` on.
    template <int N>
    void score_rows(int row, int first, int n, const std::uint8_t *const *next, float *to) const {
        const typename Keys::Element *const *tiles = keys.tile + first;
        if constexpr (Keys::kDigits) {
            score_tiles_digits<N>(tiles, next, keys.scale + first, n, keys.row, q_digits.from(row), to);
        } else if constexpr (Keys::kGroups) {
            score_tiles_groups<N>(tiles, next, keys.scale + first, keys.apart(), n,
                                  q_grouped.from(row), to);
        } else {
            score_tiles<Keys, N>(tiles, next, n, dim, q + static_cast<std::ptrdiff_t>(row) * dim, to);
            if constexpr (Keys::kScaled)
                for (int t = 0; t < n; ++t)
                    for (int i = 0; i < N; ++i) {
                        float *score = to + i * kSplit + t * kTileKeys;
                        f_store(score, f_mul(f_load(score), Keys::scales(keys.scale[first + t])));
                    }
        }
    }

    // The values of tiles first .. end-1, weighted for N rows from `row` on.
    template <int N>
    void weigh_rows(int row, int first, int end, const std::uint8_t *const *next, float *to) const {
        const typename Values::Element *const *tiles = values.tile + first;
        const int n = end - first;
        if constexpr (Values::kDigits) {
            for (int i = row; i < row + N; ++i)
                take_digits(i, spans[i], first, end);
            Digits weight = weight_digits.from(row);
            weight.digits += first * kTileKeys;
            weigh_tiles_digits<N>(tiles, next, n, dim, weight, to);
        } else if constexpr (Values::kGroups) {
            Grouped weight = weight_grouped.from(row);
            weight.numbers += first * kTileKeys;
            in_pieces<kGroupsAtOnce>(groups, 1, [&](int g, auto at_once) {
                for (int i = row; i < row + N; ++i)
                    take_grouped(i, spans[i], g, at_once.value, first, end);
                weigh_groups<N, at_once.value>(tiles, next, n, groups, g, dim, weight, to);
            });
        } else {
            if constexpr (Values::kScaled)
                for (int i = row; i < row + N; ++i) take_scaled(i, spans[i], first, end);
            weigh_tiles<Values, N>(tiles, next, n, dim, weights + row * kSplit + first * kTileKeys, to);
        }
    }

    // `last`: of this call.
    void split(int index, bool last, float *maximum, float *total, float *acc) {
        const RowBlocks blocks(count);
        const Span all = find_spans(blocks, index);
        if (all.empty()) {
            for (int row = 0; row < count; ++row) {
                maximum[row] = -__builtin_inff();
                total[row] = 0;
            }
            const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(count) * dim;
            for (std::ptrdiff_t i = 0; i < size; ++i) acc[i] = 0;
            return;
        }
        const int begin = all.first_tile(), stop = all.end_tile();
        keys.find(begin, stop, index * kSplit, waits());
        values.find(begin, stop, index * kSplit, waits());
        if (waits()) look_ahead(index, last, begin, stop);
        // A few tiles of keys at a time, while they are in the nearest cache, for all rows.
        for (int tile = begin; tile < stop; tile += kAttendVectors)
            for (int b = 0; b < blocks.count; ++b) {
                const int row = blocks.start(b), n = blocks.start(b + 1) - row;
                const Span span = block_spans[b];
                if (span.empty()) continue;
                const int first = tile > span.first_tile() ? tile : span.first_tile();
                const int end = tile + kAttendVectors < span.end_tile() ? tile + kAttendVectors
                                                                        : span.end_tile();
                if (first >= end) continue;
                float *to = scores + row * kSplit + first * kTileKeys;
                const std::uint8_t *const *next = ahead + first - begin;
#define ER_SCORE(N) score_rows<N>(row, first, end - first, next, to)
                ER_FOR_ROWS(n, ER_SCORE)
#undef ER_SCORE
            }
        for (int b = 0; b < blocks.count; ++b) {
            const int row = blocks.start(b), n = blocks.start(b + 1) - row;
            const Span span = block_spans[b];
            const int first = span.empty() ? begin : span.first_tile();
            const int end = span.empty() ? begin : span.end_tile();
#define ER_SOFTMAX(N) softmax<N>(row, first, end, maximum, total)
            ER_FOR_ROWS(n, ER_SOFTMAX)
#undef ER_SOFTMAX
            float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
            const std::uint8_t *const *next = ahead + (stop - begin) + (first - begin);
#define ER_WEIGH(N) weigh_rows<N>(row, first, end, next, to)
            ER_FOR_ROWS(n, ER_WEIGH)
#undef ER_WEIGH
        }
        if constexpr (!Values::kScaled) {  // a weight of 0 times any code is 0
            if (all_finite(acc, count * dim)) return;
            for (int row = 0; row < count; ++row) {
                float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
                if (!all_finite(to, dim)) weigh_alone(row, spans[row], to);
            }
        }
    }

    static bool all_finite(const float *x, int n) {
        F odd[4] = {f_zero(), f_zero(), f_zero(), f_zero()};  // x - x is 0 but for infinities and NaN
        int i = 0;
        for (; i + 64 <= n; i += 64)
            for (int j = 0; j < 4; ++j) {
                const F v = f_load(x + i + 16 * j);
                odd[j] = f_add(odd[j], f_sub(v, v));
            }
        for (; i < n; i += 16) {
            const F v = n - i >= 16 ? f_load(x + i) : f_load_n(x + i, n - i);
            odd[0] = f_add(odd[0], f_sub(v, v));
        }
        return f_sum(f_add(f_add(odd[0], odd[1]), f_add(odd[2], odd[3]))) == 0;
    }
};

template <class Keys, class Values>
static void attend_in(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                      float *max_, float *sum, float *acc, std::uint8_t *scratch) {
    Attend<Keys, Values> attend(cache, rows, scratch);
    attend.prepare_q();
    for (int s = split0; s < split1; ++s) {
        attend.split(s, s + 1 == split1, max_, sum, acc);
        max_ += attend.count;
        sum += attend.count;
        acc += static_cast<std::ptrdiff_t>(attend.count) * attend.dim;
    }
}

static void attend(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                   float *max_, float *sum, float *acc, std::uint8_t *scratch) {
    with_types(cache, [&](auto keys, auto values) {
        attend_in<decltype(keys), decltype(values)>(cache, rows, split0, split1, max_, sum, acc,
                                                    scratch);
    });
}

}  // namespace ER_ISA
}  // namespace engineroom
