// Attention over the paged cache, one split of 256 keys at a time, and writes to that cache.
//
// Law 2. Within a split a row's scores, maximum, sum and weighted values run over dims and keys in
// ascending order, one vector lane each, whatever other rows share the loads. A key that a row does
// not see has the weight 0: adding 0 times a finite value changes nothing, so it does not matter
// whether its tile was walked for a neighbour's sake. A value that is not finite (a slot past the
// sequence's end may hold anything, a later token's value may be NaN) would change something: a row
// whose result is not finite is made anew from a copy of its tiles with zeros where it sees none.
namespace engineroom {
namespace ER_ISA {

constexpr int kTileKeys = 16;
constexpr int kSplitTiles = kSplit / kTileKeys;
// Rows and vectors of a register tile.
constexpr int kAttendRows = kF32Rows >= 8 ? 6 : 2;
constexpr int kAttendVectors = kF32Rows >= 8 ? 4 : 2;

// How a dtype of the cache is multiplied: Element as stored, Operand of q and of the weights,
// kStep dims (of keys) or keys (of values) per product.
struct CacheBF16 {
    using Element = std::uint16_t;
    using Operand = std::uint16_t;
    using Vector = P;
    static constexpr int kStep = 2;
    ER_INLINE P load(const std::uint16_t *p) { return p_load(p); }
    ER_INLINE P load_n(const std::uint16_t *p, int n) { return p_load_n(p, n); }
    ER_INLINE P spread(const std::uint16_t *p) { return p_bcast(p); }
    ER_INLINE F dot(F acc, P a, P b) { return p_dot(acc, a, b); }
    ER_INLINE void store(std::uint16_t *to, F x) { f_store_bf16(to, x); }
    ER_INLINE void operand(std::uint16_t *to, F x) { f_store_bf16(to, x); }
    ER_INLINE void operand_n(std::uint16_t *to, F x, int n) {
        f_store_bf16_n(to, x, n);
    }
};

struct CacheF32 {
    using Element = float;
    using Operand = float;
    using Vector = F;
    static constexpr int kStep = 1;
    ER_INLINE void store(float *to, F x) { f_store(to, x); }
    ER_INLINE F load(const float *p) { return f_load(p); }
    ER_INLINE F load_n(const float *p, int n) { return f_load_n(p, n); }
    ER_INLINE F spread(const float *p) { return f_set(*p); }
    ER_INLINE F dot(F acc, F a, F b) { return f_fma(a, b, acc); }
    ER_INLINE void operand(float *to, F x) { f_store(to, x); }
    ER_INLINE void operand_n(float *to, F x, int n) { f_store_n(to, x, n); }
};

struct CacheF16 {
    using Element = std::uint16_t;
    using Operand = float;
    using Vector = F;
    static constexpr int kStep = 1;
    ER_INLINE void store(std::uint16_t *to, F x) { f_store_f16(to, x); }
    ER_INLINE F load(const std::uint16_t *p) { return f_load_f16(p); }
    ER_INLINE F load_n(const std::uint16_t *p, int n) { return f_load_f16_n(p, n); }
    ER_INLINE F spread(const float *p) { return f_set(*p); }
    ER_INLINE F dot(F acc, F a, F b) { return f_fma(a, b, acc); }
    ER_INLINE void operand(float *to, F x) { f_store(to, x); }
    ER_INLINE void operand_n(float *to, F x, int n) { f_store_n(to, x, n); }
};

// ------------------------------------------------------------------------------ the products

// So few rows wait for memory: they ask for keys ahead of their use.
constexpr int kPrefetchRows = 4;

// Scores of kRows rows and kTiles tiles of keys: out[i][16 j] = sum over dims of q[i] * keys[j].
// Asks for the tiles `next`.
template <class Cache, int kRows, int kTiles>
static void score(const typename Cache::Element *const *keys,
                  const typename Cache::Element *const *next, int head_dim,
                  const typename Cache::Operand *q, float *out) {
    using Element = typename Cache::Element;
    constexpr int kLine = kTileKeys * Cache::kStep;
    F acc[kRows][kTiles];
    const Element *key[kTiles];
#pragma GCC unroll 6
    for (int j = 0; j < kTiles; ++j) {
        key[j] = keys[j];
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) acc[i][j] = f_zero();
    }
    for (int d = 0; d < head_dim; d += Cache::kStep) {
        typename Cache::Vector k[kTiles];
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) {
            k[j] = Cache::load(key[j]);
            key[j] += kLine;
            if (kRows <= kPrefetchRows) prefetch(next[j] + d / Cache::kStep * kLine);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            const typename Cache::Vector x = Cache::spread(q + i * head_dim + d);
#pragma GCC unroll 6
            for (int j = 0; j < kTiles; ++j) acc[i][j] = Cache::dot(acc[i][j], k[j], x);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) f_store(out + i * kSplit + j * kTileKeys, acc[i][j]);
}

// Weighted values of kRows rows: out[i][16 j] = sum over keys of weight[i] * values, in kVectors
// vectors of dims from `dim` on; where kPartial, the one vector has `lanes` dims.
template <class Cache, int kRows, int kVectors, bool kPartial>
static void weigh(const typename Cache::Element *const *values, int tiles, int head_dim, int dim,
                  int lanes, const typename Cache::Operand *weight, float *out) {
    constexpr int kStep = Cache::kStep;
    F acc[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kVectors; ++j) acc[i][j] = f_zero();
    for (int t = 0; t < tiles; ++t, weight += kTileKeys) {
        const typename Cache::Element *value = values[t] + dim * kStep;
        for (int key = 0; key < kTileKeys; key += kStep, value += head_dim * kStep) {
            typename Cache::Vector v[kVectors];
#pragma GCC unroll 6
            for (int j = 0; j < kVectors; ++j)
                v[j] = kPartial ? Cache::load_n(value, lanes) : Cache::load(value + 16 * j * kStep);
#pragma GCC unroll 6
            for (int i = 0; i < kRows; ++i) {
                const typename Cache::Vector x = Cache::spread(weight + i * kSplit + key);
#pragma GCC unroll 6
                for (int j = 0; j < kVectors; ++j) acc[i][j] = Cache::dot(acc[i][j], v[j], x);
            }
        }
    }
    // Adding 0 turns -0 into 0: whether later zeros were added to a -0 shall not show.
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kVectors; ++j) {
            float *to = out + static_cast<std::ptrdiff_t>(i) * head_dim + dim + 16 * j;
            const F sum = f_add(acc[i][j], f_zero());
            if (kPartial) {
                f_store_n(to, sum, lanes);
            } else {
                f_store(to, sum);
            }
        }
}

// Scores of `tiles` tiles, for kRows rows.
template <class Cache, int kRows>
static void score_tiles(const typename Cache::Element *const *keys,
                        const typename Cache::Element *const *next, int tiles, int head_dim,
                        const typename Cache::Operand *q, float *out) {
    int t = 0;
    for (; t + kAttendVectors <= tiles; t += kAttendVectors)
        score<Cache, kRows, kAttendVectors>(keys + t, next + t, head_dim, q, out + t * kTileKeys);
    for (; t + 2 <= tiles; t += 2)
        score<Cache, kRows, 2>(keys + t, next + t, head_dim, q, out + t * kTileKeys);
    if (t < tiles) score<Cache, kRows, 1>(keys + t, next + t, head_dim, q, out + t * kTileKeys);
}

// All dims of the weighted values, for kRows rows.
template <class Cache, int kRows>
static void weigh_tiles(const typename Cache::Element *const *values, int tiles, int dim,
                        const typename Cache::Operand *weight, float *out) {
    int d = 0;
    for (; d + 16 * kAttendVectors <= dim; d += 16 * kAttendVectors)
        weigh<Cache, kRows, kAttendVectors, false>(values, tiles, dim, d, 16, weight, out);
    for (; d + 32 <= dim; d += 32)
        weigh<Cache, kRows, 2, false>(values, tiles, dim, d, 16, weight, out);
    for (; d + 16 <= dim; d += 16)
        weigh<Cache, kRows, 1, false>(values, tiles, dim, d, 16, weight, out);
    if (d < dim) weigh<Cache, kRows, 1, true>(values, tiles, dim, d, dim - d, weight, out);
}

// call(N) with N the constant `rows`, 1 <= rows <= kAttendRows.
#define ER_FOR_ROWS(rows, call)                                   \
    switch (rows) {                                               \
        case 1: call(1); break;                                   \
        case 2: call(2); break;                                   \
        case 3: call((3 <= kAttendRows ? 3 : 1)); break;          \
        case 4: call((4 <= kAttendRows ? 4 : 1)); break;          \
        case 5: call((5 <= kAttendRows ? 5 : 1)); break;          \
        default: call((6 <= kAttendRows ? 6 : 1)); break;         \
    }

// ------------------------------------------------------------------------------ one split

// Keys from .. to-1 of a split, counted from its first; none where to <= from.
struct Span {
    int from, to;
    bool empty() const { return to <= from; }
    int first_tile() const { return from / kTileKeys; }
    int end_tile() const { return (to + kTileKeys - 1) / kTileKeys; }
};

static Span visible(const AttentionRows &rows, int token, int split) {
    const int position = rows.positions[token];
    int last = position < rows.seq_len ? position : rows.seq_len - 1;
    int from = rows.window > 0 && position >= rows.window ? position - rows.window + 1 : 0;
    from -= split * kSplit;
    last -= split * kSplit;
    Span span = {from > 0 ? from : 0, last + 1 < kSplit ? last + 1 : kSplit};
    if (span.empty()) span = Span{0, 0};
    return span;
}

// What all of the rows' tokens first .. last see together.
static Span visible_to_any(const AttentionRows &rows, int first, int last, int split) {
    Span all = {0, 0};
    for (int token = first; token <= last; ++token) {
        const Span span = visible(rows, token, split);
        if (span.empty()) continue;
        if (all.empty()) all = span;
        all.from = span.from < all.from ? span.from : all.from;
        all.to = span.to > all.to ? span.to : all.to;
    }
    return all;
}

// Blocks of at most kAttendRows rows, as even as can be.
struct RowBlocks {
    int rows, count;
    explicit RowBlocks(int n) : rows(n), count((n + kAttendRows - 1) / kAttendRows) {}
    int start(int block) const { return rows * block / count; }
};

// A call's scratch, by row: q [rows][head_dim], scores [rows][256] and weights [rows][256] (where
// Operand is float these take the scores' place); then the gathered keys and values of a split.
template <class Cache>
struct Attend {
    using Element = typename Cache::Element;
    using Operand = typename Cache::Operand;
    static constexpr bool kInPlace = sizeof(Operand) == sizeof(float);

    const KVCacheView &cache;
    const AttentionRows &rows;
    const int count, dim;
    Operand *q;
    float *scores;
    Operand *weights;
    Element *gathered;  // keys, then values
    const Element *keys[kSplitTiles], *values[kSplitTiles];
    const Element *next[kSplitTiles];  // keys to ask for while a tile's are in use

    Attend(const KVCacheView &c, const AttentionRows &r, std::uint8_t *scratch)
        : cache(c), rows(r), count(r.num_tokens * r.group), dim(c.head_dim) {
        scores = reinterpret_cast<float *>(scratch);
        std::uint8_t *after = scratch + static_cast<std::size_t>(count) * kSplit * sizeof(float);
        weights = reinterpret_cast<Operand *>(kInPlace ? scratch : after);
        if (!kInPlace) after += static_cast<std::size_t>(count) * kSplit * sizeof(Operand);
        q = reinterpret_cast<Operand *>(after);
        after += static_cast<std::size_t>(count) * dim * sizeof(float);
        gathered = reinterpret_cast<Element *>(after);
    }

    void prepare_q() {
        Operand *to = q;
        for (int row = 0; row < count; ++row, to += dim) {
            const float *from = rows.q + rows.q_stride * (row / rows.group) +
                                static_cast<std::ptrdiff_t>(row % rows.group) * dim;
            int d = 0;
            for (; d + 16 <= dim; d += 16) Cache::operand(to + d, f_load(from + d));
            if (d < dim) Cache::operand_n(to + d, f_load_n(from + d, dim - d), dim - d);
        }
    }

    // Points `keys` and `values` at the tiles first .. end-1 of a split; brings them into the order
    // of tiles first where the cache does not hold tiles. `next` is a register tile further on.
    void find_tiles(int split, int first, int end) {
        for (int t = first; t < end; ++t) {
            const int position = split * kSplit + t * kTileKeys;
            if (cache.block_size % kTileKeys == 0) {
                const std::int32_t block = rows.blocks[position / cache.block_size];
                const std::ptrdiff_t at =
                    static_cast<std::ptrdiff_t>(position % cache.block_size) * dim;
                const int head = rows.kv_head;
                keys[t] = reinterpret_cast<const Element *>(cache.keys(block, head)) + at;
                values[t] = reinterpret_cast<const Element *>(cache.values(block, head)) + at;
            } else {
                Element *k = gathered + t * kTileKeys * dim;
                Element *v = k + kSplit * dim;
                gather(position, k, v);
                keys[t] = k;
                values[t] = v;
            }
        }
        for (int t = first; t < end; ++t)
            next[t] = keys[t + kAttendVectors < end ? t + kAttendVectors : t];
    }

    // Where key i of a tile has its dim d.
    int key_at(int i, int d) const {
        return d / Cache::kStep * kTileKeys * Cache::kStep + i * Cache::kStep + d % Cache::kStep;
    }
    int value_at(int i, int d) const {
        return (i / Cache::kStep * dim + d) * Cache::kStep + i % Cache::kStep;
    }

    void gather(int position, Element *k, Element *v) const {
        for (int i = 0; i < kTileKeys; ++i, ++position) {
            if (position >= rows.seq_len) {
                for (int d = 0; d < dim; ++d) k[key_at(i, d)] = v[value_at(i, d)] = 0;
                continue;
            }
            const std::int32_t block = rows.blocks[position / cache.block_size];
            const std::ptrdiff_t at =
                static_cast<std::ptrdiff_t>(position % cache.block_size) * dim;
            const Element *from_k =
                reinterpret_cast<const Element *>(cache.keys(block, rows.kv_head)) + at;
            const Element *from_v =
                reinterpret_cast<const Element *>(cache.values(block, rows.kv_head)) + at;
            for (int d = 0; d < dim; ++d) {
                k[key_at(i, d)] = from_k[d];
                v[value_at(i, d)] = from_v[d];
            }
        }
    }

    // Turns a row's scores of the tiles first .. end-1 into weights, zeros where it sees no key.
    void softmax(int row, Span span, int first, int end, float *maximum, float *total) const {
        float *score = scores + row * kSplit;
        Operand *weight = weights + row * kSplit;
        const F hidden = f_set(-__builtin_inff());
        const F scale_by = f_set(rows.scale), cap = f_set(rows.softcap);
        const int from = span.empty() ? end : span.first_tile();
        const int to = span.empty() ? end : span.end_tile();
        F most = hidden, sum = f_zero();
        for (int t = from; t < to; ++t) {
            F s = f_mul(f_load(score + t * kTileKeys), scale_by);
            if (rows.softcap > 0) s = softcap_of(s, cap);
            const int low = span.from - t * kTileKeys, high = span.to - t * kTileKeys;
            if (low > 0 || high < kTileKeys) s = f_keep(s, low, high, hidden);
            f_store(score + t * kTileKeys, s);
            most = f_max(s, most);
        }
        *maximum = f_max_all(most);
        // NaN scores alone leave the maximum at -inf, which is to mean that no key is seen.
        if (from < to && !(*maximum > -__builtin_inff())) *maximum = __builtin_nanf("");
        const F base = f_set(*maximum);
        for (int t = first; t < from; ++t) Cache::operand(weight + t * kTileKeys, f_zero());
        for (int t = from; t < to; ++t) {
            const F p = exp_to_88(f_sub(f_load(score + t * kTileKeys), base));
            sum = f_add(sum, p);
            Cache::operand(weight + t * kTileKeys, p);
        }
        for (int t = to; t < end; ++t) Cache::operand(weight + t * kTileKeys, f_zero());
        *total = f_sum(sum);
    }

    // Makes a row's result from a copy of its first and last tile of values without those that it
    // does not see. Takes the place of the gathered keys, whose use is over.
    void weigh_alone(int row, Span span, float *acc) {
        const Element *own[kSplitTiles];
        const int first = span.first_tile(), end = span.end_tile();
        for (int t = first; t < end; ++t) {
            own[t] = values[t];
            if (t != first && t != end - 1) continue;
            Element *copy = gathered + (t == first ? 0 : kTileKeys * dim);
            for (int i = 0; i < kTileKeys; ++i) {
                const bool seen = t * kTileKeys + i >= span.from && t * kTileKeys + i < span.to;
                for (int d = 0; d < dim; ++d)
                    copy[value_at(i, d)] = seen ? values[t][value_at(i, d)] : Element(0);
            }
            own[t] = copy;
        }
        weigh_tiles<Cache, 1>(own + first, end - first, dim,
                              weights + row * kSplit + first * kTileKeys, acc);
    }

    void split(int index, float *maximum, float *total, float *acc) {
        const Span all = visible_to_any(rows, 0, rows.num_tokens - 1, index);
        if (all.empty()) {
            for (int row = 0; row < count; ++row) {
                maximum[row] = -__builtin_inff();
                total[row] = 0;
            }
            const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(count) * dim;
            for (std::ptrdiff_t i = 0; i < size; ++i) acc[i] = 0;
            return;
        }
        find_tiles(index, all.first_tile(), all.end_tile());
        const RowBlocks blocks(count);
        // A few tiles of keys at a time, while they are in the nearest cache, for all rows.
        for (int tile = all.first_tile(); tile < all.end_tile(); tile += kAttendVectors)
            for (int b = 0; b < blocks.count; ++b) {
                const int row = blocks.start(b), n = blocks.start(b + 1) - row;
                const Span span = visible_to_any(rows, row / rows.group, (row + n - 1) / rows.group,
                                                 index);
                if (span.empty()) continue;
                const int first = tile > span.first_tile() ? tile : span.first_tile();
                const int end = tile + kAttendVectors < span.end_tile() ? tile + kAttendVectors
                                                                        : span.end_tile();
                if (first >= end) continue;
#define ER_SCORE(N)                                                                       \
    score_tiles<Cache, N>(keys + first, next + first, end - first, dim,       \
                          q + static_cast<std::ptrdiff_t>(row) * dim,                   \
                          scores + row * kSplit + first * kTileKeys)
                ER_FOR_ROWS(n, ER_SCORE)
#undef ER_SCORE
            }
        for (int b = 0; b < blocks.count; ++b) {
            const int row = blocks.start(b), n = blocks.start(b + 1) - row;
            const Span span =
                visible_to_any(rows, row / rows.group, (row + n - 1) / rows.group, index);
            const int first = span.first_tile(), end = span.end_tile();
            for (int i = row; i < row + n; ++i)
                softmax(i, visible(rows, i / rows.group, index), first, end, maximum + i,
                        total + i);
            float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
#define ER_WEIGH(N)                                                           \
    weigh_tiles<Cache, N>(values + first, end - first, dim,               \
                          weights + row * kSplit + first * kTileKeys, to)
            ER_FOR_ROWS(n, ER_WEIGH)
#undef ER_WEIGH
        }
        for (int row = 0; row < count; ++row) {
            float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
            F odd = f_zero();  // x - x is 0 but for infinities and NaN
            for (int d = 0; d < dim; d += 16) {
                const F x = f_load_n(to + d, dim - d < 16 ? dim - d : 16);
                odd = f_add(odd, f_sub(x, x));
            }
            if (f_sum(odd) == 0) continue;
            const Span span = visible(rows, row / rows.group, index);
            weigh_alone(row, span, to);
        }
    }
};

template <class Cache>
static void attend_in(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                      float *max_, float *sum, float *acc, std::uint8_t *scratch) {
    Attend<Cache> attend(cache, rows, scratch);
    attend.prepare_q();
    for (int s = split0; s < split1; ++s) {
        attend.split(s, max_, sum, acc);
        max_ += attend.count;
        sum += attend.count;
        acc += static_cast<std::ptrdiff_t>(attend.count) * attend.dim;
    }
}

static void attend(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                   float *max_, float *sum, float *acc, std::uint8_t *scratch) {
    switch (cache.dtype) {
        case Dtype::kF32:
            return attend_in<CacheF32>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kBF16:
            return attend_in<CacheBF16>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kF16:
            return attend_in<CacheF16>(cache, rows, split0, split1, max_, sum, acc, scratch);
    }
}

// ---------------------------------------------------------------------------------- writes

// One head's `dim` numbers x, at the strides of the cache's layout: element d of a pair of dims is
// at `to` + d / 2 * pair + d % 2 * next.
template <class Cache>
static void write_head(const float *x, int dim, typename Cache::Element *to, std::ptrdiff_t pair,
                       std::ptrdiff_t next) {
    typename Cache::Element rounded[16];
    for (int d = 0; d < dim; d += 16) {
        const int n = dim - d < 16 ? dim - d : 16;
        Cache::store(rounded, f_load_n(x + d, n));
        for (int i = 0; i < n; i += 2, to += pair) {
            to[0] = rounded[i];
            to[next] = rounded[i + 1];
        }
    }
}

template <class Cache>
static void kv_write_in(const KVCacheView &cache, std::int32_t slot, const float *k,
                        const float *v) {
    using Element = typename Cache::Element;
    constexpr int kStep = Cache::kStep;
    const std::int32_t block = slot / cache.block_size;
    const std::ptrdiff_t at = slot % cache.block_size, dim = cache.head_dim;
    for (int head = 0; head < cache.num_kv_heads; ++head, k += dim, v += dim) {
        Element *keys = reinterpret_cast<Element *>(cache.keys(block, head));
        Element *values = reinterpret_cast<Element *>(cache.values(block, head));
        if (cache.block_size % kTileKeys == 0) {
            keys += at / kTileKeys * kTileKeys * dim + at % kTileKeys * kStep;
            values += at / kStep * kStep * dim + at % kStep;
            write_head<Cache>(k, cache.head_dim, keys, 2 * kTileKeys, kStep == 2 ? 1 : kTileKeys);
            write_head<Cache>(v, cache.head_dim, values, 2 * kStep, kStep);
        } else {
            write_head<Cache>(k, cache.head_dim, keys + at * dim, 2, 1);
            write_head<Cache>(v, cache.head_dim, values + at * dim, 2, 1);
        }
    }
}

static void kv_write(const KVCacheView &cache, std::int32_t slot, const float *k, const float *v) {
    switch (cache.dtype) {
        case Dtype::kF32: return kv_write_in<CacheF32>(cache, slot, k, v);
        case Dtype::kBF16: return kv_write_in<CacheBF16>(cache, slot, k, v);
        case Dtype::kF16: return kv_write_in<CacheF16>(cache, slot, k, v);
    }
}

}  // namespace ER_ISA
}  // namespace engineroom
