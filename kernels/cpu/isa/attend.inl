// Attention over the paged cache, one split of 256 keys at a time, and writes to that cache.
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
    static constexpr bool kDigits = false, kInt4 = false;
    ER_INLINE P load(const std::uint16_t *p) { return p_load(p); }
    ER_INLINE P load_n(const std::uint16_t *p, int n) { return p_load_n(p, n); }
    ER_INLINE P spread(const std::uint16_t *p) { return p_bcast(p); }
    ER_INLINE F dot(F acc, P a, P b) { return p_dot(acc, a, b); }
    ER_INLINE void store(std::uint16_t *to, F x) { f_store_bf16(to, x); }
    ER_INLINE void operand(std::uint16_t *to, F x) { f_store_bf16(to, x); }
    ER_INLINE void operand_n(std::uint16_t *to, F x, int n) {
        f_store_bf16_n(to, x, n);
    }
    ER_INLINE void weight(std::uint16_t *to, F x) { f_store_bf16_normal(to, x); }
};

struct CacheF32 {
    using Element = float;
    using Operand = float;
    using Vector = F;
    static constexpr int kStep = 1;
    static constexpr bool kDigits = false, kInt4 = false;
    ER_INLINE void store(float *to, F x) { f_store(to, x); }
    ER_INLINE F load(const float *p) { return f_load(p); }
    ER_INLINE F load_n(const float *p, int n) { return f_load_n(p, n); }
    ER_INLINE F spread(const float *p) { return f_set(*p); }
    ER_INLINE F dot(F acc, F a, F b) { return f_fma(a, b, acc); }
    ER_INLINE void operand(float *to, F x) { f_store(to, x); }
    ER_INLINE void operand_n(float *to, F x, int n) { f_store_n(to, x, n); }
    ER_INLINE void weight(float *to, F x) { f_store(to, x); }
};

struct CacheF16 {
    using Element = std::uint16_t;
    using Operand = float;
    using Vector = F;
    static constexpr int kStep = 1;
    static constexpr bool kDigits = false, kInt4 = false;
    ER_INLINE void store(std::uint16_t *to, F x) { f_store_f16(to, x); }
    ER_INLINE F load(const std::uint16_t *p) { return f_load_f16(p); }
    ER_INLINE F load_n(const std::uint16_t *p, int n) { return f_load_f16_n(p, n); }
    ER_INLINE F spread(const float *p) { return f_set(*p); }
    ER_INLINE F dot(F acc, F a, F b) { return f_fma(a, b, acc); }
    ER_INLINE void operand(float *to, F x) { f_store(to, x); }
    ER_INLINE void operand_n(float *to, F x, int n) { f_store_n(to, x, n); }
    ER_INLINE void weight(float *to, F x) { f_store(to, x); }
};

// Keys and values are bytes with a scale a token; q and the weights are two signed digits of base
// 254 each, 15 bits together: their products are sums of bytes, which are exact in any order.
struct CacheInt8 {
    using Element = std::uint8_t;
    using Operand = std::int8_t;
    static constexpr int kStep = 4;
    static constexpr bool kDigits = true, kInt4 = false;
    ER_INLINE I dot(I acc, I bytes, I digits) { return i_dot8(acc, bytes, digits); }
};

// The same for codes of 4 bits, which are unpacked to bytes 0 .. 15 before they are multiplied, with
// a scale and an offset a token and group of dims.
struct CacheInt4 : CacheInt8 {
    static constexpr bool kInt4 = true;
    ER_INLINE I dot(I acc, I bytes, I digits) { return i_dot_small(acc, bytes, digits); }
};

// Rows in two digits: of row r, digit i (0: high) at digits + (2 r + i) * stride. A number is
// scale * (254 high + low). What i_dot8 does not subtract of a byte's bias, `start` does; it is 0
// where bytes have none. What offsets are multiplied by in the end: `sums`.
struct Digits {
    std::int8_t *digits;
    int stride;
    std::int32_t *start;  // [rows][2]
    float *scale;         // [rows]
    float *sums;          // [rows][groups]: of q's digits; or of weights times offsets, of one group
    int groups;
    Digits from(int row) const {
        return {digits + 2 * row * stride, stride, start + 2 * row, scale + row,
                sums + groups * row, groups};
    }
};

constexpr float kDigitBase = 254.0f, kDigitMax = 127.0f * kDigitBase;

// The two digits of x * by, |x * by| <= kDigitMax, at `to` and to + stride; adds them to the sums.
// Zeros where `by` is 0: x may be no number then.
ER_INLINE void store_digits(F x, float by, std::int8_t *to, int stride, F *high, F *low) {
    const F all = by > 0 ? f_round(f_mul(x, f_set(by))) : f_zero();
    const F h = f_round(f_mul(all, f_set(1.0f / kDigitBase)));
    const F l = f_fnma(h, f_set(kDigitBase), all);
    i_store_int8(to, h);
    i_store_int8(to + stride, l);
    *high = f_add(*high, h);
    *low = f_add(*low, l);
}

// By what a row is multiplied to have digits, `most` being its largest magnitude, where infinity
// stands for NaN too; and its scale. A row that is no number, or too small to have digits, has zeros.
ER_INLINE float digits_factor(float most, float *scale) {
    const float by = kDigitMax / most;
    *scale = most < __builtin_inff() ? most / kDigitMax : __builtin_nanf("");
    return most < __builtin_inff() && by < __builtin_inff() ? by : 0.0f;
}

template <class Cache>
ER_INLINE void store_start(std::int32_t *to, F high, F low) {
    constexpr int kBias = Cache::kInt4 ? 0 : 128 - kBias8;
    to[0] = -kBias * static_cast<std::int32_t>(f_sum(high));
    to[1] = -kBias * static_cast<std::int32_t>(f_sum(low));
}

// ------------------------------------------------------------------------------ the products

// So few rows wait for memory: while they read a tile they ask for the one that comes kAhead later.
constexpr int kPrefetchRows = 4;
constexpr int kUnpackAhead = 2;  // tiles of 4 bits, asked for while one is unpacked

// Scores of kRows rows and kTiles tiles of keys: out[i][16 j] = sum over dims of q[i] * keys[j].
// Asks for the tiles `ahead`.
template <class Cache, int kRows, int kTiles>
static void score(const typename Cache::Element *const *keys,
                  const typename Cache::Element *const *ahead, int head_dim,
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
            if (kRows <= kPrefetchRows) prefetch(ahead[j] + d / Cache::kStep * kLine);
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
static void weigh(const typename Cache::Element *const *values,
                  const typename Cache::Element *const *ahead, int tiles, int head_dim, int dim,
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
            for (int j = 0; j < kVectors; ++j) {
                const typename Cache::Element *at = value + 16 * j * kStep;
                v[j] = kPartial ? Cache::load_n(at, lanes) : Cache::load(at);
                if (kRows <= kPrefetchRows) prefetch(ahead[t] + (at - values[t]));
            }
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

// The same in digits, of dims begin .. end-1, which share the scales, 16 of each tile: of the whole
// head, or of one group of a kInt4 cache, the sum of which goes on in `out`.
template <class Cache, int kRows, int kTiles>
static void score_digits(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                         const float *const *scales, const Digits &q, int begin, int end,
                         float *out) {
    I acc[kRows][2][kTiles];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int digit = 0; digit < 2; ++digit)
#pragma GCC unroll 6
            for (int j = 0; j < kTiles; ++j) acc[i][digit][j] = i_bcast(q.start + 2 * i + digit);
    for (int d = begin; d < end; d += 4) {
        I k[kTiles];
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) {
            k[j] = i_load(keys[j] + kTileKeys * d);
            if (kRows <= kPrefetchRows) prefetch(ahead[j] + kTileKeys * d);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int digit = 0; digit < 2; ++digit) {
                const I x = i_bcast4(q.digits + (2 * i + digit) * q.stride + d);
#pragma GCC unroll 6
                for (int j = 0; j < kTiles; ++j)
                    acc[i][digit][j] = Cache::dot(acc[i][digit][j], k[j], x);
            }
    }
    const int group = begin / kKVGroup;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) {
            float *to = out + i * kSplit + j * kTileKeys;
            const F sum = f_fma(f_of_i(acc[i][0][j]), f_set(kDigitBase), f_of_i(acc[i][1][j]));
            if constexpr (Cache::kInt4) {
                const float *scale = scales[j] + group * kTileKeys;
                const F offset = f_load(scale + q.groups * kTileKeys);
                const F all = f_fma(offset, f_set(q.sums[i * q.groups + group]),
                                    f_mul(sum, f_load(scale)));
                const F part = f_mul(all, f_set(q.scale[i]));
                f_store(to, group == 0 ? part : f_add(f_load(to), part));
            } else {
                f_store(to, f_mul(f_mul(sum, f_set(q.scale[i])), f_load(scales[j])));
            }
        }
}

template <class Cache, int kRows, int kVectors, bool kPartial>
static void weigh_digits(const std::uint8_t *const *values, const std::uint8_t *const *ahead,
                         int tiles, int head_dim, int dim, int lanes, const Digits &weight,
                         float *out) {
    I acc[kRows][2][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int digit = 0; digit < 2; ++digit)
#pragma GCC unroll 6
            for (int j = 0; j < kVectors; ++j)
                acc[i][digit][j] = i_bcast(weight.start + 2 * i + digit);
    const std::int8_t *digits = weight.digits;
    for (int t = 0; t < tiles; ++t) {
        const std::uint8_t *value = values[t] + 4 * dim;
        for (int key = 0; key < kTileKeys; key += 4, value += 4 * head_dim, digits += 4) {
            I v[kVectors];
#pragma GCC unroll 6
            for (int j = 0; j < kVectors; ++j) {
                const std::uint8_t *at = value + 64 * j;
                v[j] = kPartial ? i_load_n(at, lanes) : i_load(at);
                if (kRows <= kPrefetchRows) prefetch(ahead[t] + (at - values[t]));
            }
#pragma GCC unroll 6
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
                for (int digit = 0; digit < 2; ++digit) {
                    const I x = i_bcast4(digits + (2 * i + digit) * kSplit);
#pragma GCC unroll 6
                    for (int j = 0; j < kVectors; ++j)
                        acc[i][digit][j] = Cache::dot(acc[i][digit][j], v[j], x);
                }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kVectors; ++j) {
            float *to = out + static_cast<std::ptrdiff_t>(i) * head_dim + dim + 16 * j;
            const F sum = f_fma(f_of_i(acc[i][0][j]), f_set(kDigitBase), f_of_i(acc[i][1][j]));
            const F by = f_set(weight.scale[i]);
            F scaled;
            if constexpr (Cache::kInt4) {
                scaled = f_fma(sum, by, f_set(weight.sums[i]));
            } else {
                scaled = f_mul(sum, by);
            }
            if (kPartial) {
                f_store_n(to, scaled, lanes);
            } else {
                f_store(to, scaled);
            }
        }
}

// Calls step(begin, N) for pieces of 0 .. count-1, N the constants 4, 2 and 1 but at most kMost.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int kMost, class Step>
ER_INLINE int in_pieces(int count, int unit, Step step) {
    int i = 0;
    for (; kMost >= 4 && i + 4 * unit <= count; i += 4 * unit) step(i, Constant<kMost >= 4 ? 4 : 1>{});
    for (; kMost >= 2 && i + 2 * unit <= count; i += 2 * unit) step(i, Constant<kMost >= 2 ? 2 : 1>{});
    for (; i + unit <= count; i += unit) step(i, Constant<1>{});
    return i;
}

// Vectors of a register tile of two digits for each of kRows rows.
template <int kRows>
constexpr int kDigitVectors = 2 * kRows <= kAttendRows ? kAttendVectors : kAttendVectors / 2;

// Scores of `tiles` tiles, for kRows rows.
template <class Cache, int kRows>
static void score_tiles(const typename Cache::Element *const *keys,
                        const typename Cache::Element *const *ahead, int tiles, int head_dim,
                        const typename Cache::Operand *q, float *out) {
    in_pieces<kAttendVectors>(tiles, 1, [&](int t, auto n) {
        score<Cache, kRows, n.value>(keys + t, ahead + t, head_dim, q, out + t * kTileKeys);
    });
}

template <class Cache, int kRows>
static void score_tiles_digits(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                               const float *const *scales, int tiles, int key_dim, const Digits &q,
                               float *out) {
    const int group = Cache::kInt4 ? kKVGroup : key_dim;
    for (int begin = 0; begin < key_dim; begin += group) {
        const int end = begin + group < key_dim ? begin + group : key_dim;
        in_pieces<kDigitVectors<kRows>>(tiles, 1, [&](int t, auto n) {
            score_digits<Cache, kRows, n.value>(keys + t, ahead + t, scales + t, q, begin, end,
                                                out + t * kTileKeys);
        });
    }
}

// All dims of the weighted values, for kRows rows.
template <class Cache, int kRows>
static void weigh_tiles(const typename Cache::Element *const *values,
                        const typename Cache::Element *const *ahead, int tiles, int dim,
                        const typename Cache::Operand *weight, float *out) {
    const int d = in_pieces<kAttendVectors>(dim, 16, [&](int at, auto n) {
        weigh<Cache, kRows, n.value, false>(values, ahead, tiles, dim, at, 16, weight, out);
    });
    if (d < dim) weigh<Cache, kRows, 1, true>(values, ahead, tiles, dim, d, dim - d, weight, out);
}

// Dims begin .. end-1 of the weighted values, for kRows rows.
template <class Cache, int kRows>
static void weigh_tiles_digits(const std::uint8_t *const *values, const std::uint8_t *const *ahead,
                               int tiles, int dim, int begin, int end, const Digits &weight,
                               float *out) {
    const int d = begin + in_pieces<kDigitVectors<kRows>>(end - begin, 16, [&](int at, auto n) {
        weigh_digits<Cache, kRows, n.value, false>(values, ahead, tiles, dim, begin + at, 16,
                                                   weight, out);
    });
    if (d < end)
        weigh_digits<Cache, kRows, 1, true>(values, ahead, tiles, dim, d, end - d, weight, out);
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

// A call's scratch, by row: scores [rows][256], weights [rows][256] (where Operand is float these
// take the scores' place; [rows][2][256] digits), q [rows][head_dim] ([rows][2][16 n] digits); the
// starts, scales and sums of digits; then the gathered keys and values of a split, and their scales.
template <class Cache>
struct Attend {
    using Element = typename Cache::Element;
    using Operand = typename Cache::Operand;
    static constexpr bool kInPlace = sizeof(Operand) == sizeof(float);
    static constexpr int kAhead = Cache::kDigits ? 2 * kAttendVectors : kAttendVectors;  // tiles

    const KVCacheView &cache;
    const AttentionRows &rows;
    const int count, dim;
    const int key_dim;  // dim, a multiple of kStep
    int groups = 1;     // of dims that share a scale
    Operand *q;
    float *scores;
    Operand *weights;
    Digits q_digits, weight_digits;  // of a cache of integers
    Element *gathered;               // keys, then values
    float *gathered_scales;          // of keys, then of values: [tiles][16], or of kInt4, [tiles]
                                     // [2 * groups][16] with the offsets behind the scales
    const Element *keys[kSplitTiles], *values[kSplitTiles];
    const float *key_scales[kSplitTiles], *value_scales[kSplitTiles];
    // To ask for while the keys and then the values of the split's tiles in use are read.
    const Element *ahead[2 * kSplitTiles];

    Attend(const KVCacheView &c, const AttentionRows &r, std::uint8_t *scratch)
        : cache(c),
          rows(r),
          count(r.num_tokens * r.group),
          dim(c.head_dim),
          key_dim((c.head_dim + Cache::kStep - 1) / Cache::kStep * Cache::kStep) {
        const auto take = [&](std::size_t bytes) {
            std::uint8_t *at = scratch;
            scratch += static_cast<std::size_t>(count) * bytes;
            return at;
        };
        scores = reinterpret_cast<float *>(take(kSplit * sizeof(float)));
        weights = kInPlace ? reinterpret_cast<Operand *>(scores)
                           : reinterpret_cast<Operand *>(take(kSplit * 2));
        const int vectors = (dim + 15) / 16;
        q = reinterpret_cast<Operand *>(take(static_cast<std::size_t>(vectors) * 64));
        if constexpr (Cache::kDigits) {
            if (Cache::kInt4) groups = kv_groups(dim);
            const auto digits = [&](Operand *at, int stride, int sums) {
                std::int32_t *start = reinterpret_cast<std::int32_t *>(take(8));
                float *scale = reinterpret_cast<float *>(take(4));
                return Digits{at, stride, start, scale,
                              reinterpret_cast<float *>(take(static_cast<std::size_t>(sums) * 4)),
                              sums};
            };
            q_digits = digits(q, 16 * vectors, groups);
            weight_digits = digits(weights, kSplit, 1);
        }
        gathered = reinterpret_cast<Element *>(scratch);
        gathered_scales = reinterpret_cast<float *>(gathered + kSplit * (key_dim + dim));
        for (const Element *&tile : ahead) tile = gathered;
    }

    // Whether the rows are so few that they wait for memory. Keys of many tokens are in a cache.
    bool waits() const {
        if constexpr (Cache::kInt4) return false;  // unpacked: in a cache as well
        return rows.num_tokens == 1 || count <= kPrefetchRows;
    }

    void prepare_q() {
        for (int row = 0; row < count; ++row) {
            const float *from = rows.q + rows.q_stride * (row / rows.group) +
                                static_cast<std::ptrdiff_t>(row % rows.group) * dim;
            if constexpr (Cache::kDigits) {
                const Digits to = q_digits.from(row);
                const F infinity = f_set(__builtin_inff());
                F most = f_zero(), high = f_zero(), low = f_zero();
                for (int d = 0; d < dim; d += 16)
                    most = f_max(f_min(f_abs(load_dims(from, d)), infinity), most);
                const float by = digits_factor(f_max_all(most), to.scale);
                for (int d = 0; d < dim; d += 16) {
                    if (Cache::kInt4 && d % kKVGroup == 0) high = low = f_zero();
                    store_digits(load_dims(from, d), by, to.digits + d, to.stride, &high, &low);
                    if (Cache::kInt4)
                        to.sums[d / kKVGroup] = kDigitBase * f_sum(high) + f_sum(low);
                }
                store_start<Cache>(to.start, high, low);
            } else {
                Operand *to = q + static_cast<std::ptrdiff_t>(row) * dim;
                int d = 0;
                for (; d + 16 <= dim; d += 16) Cache::operand(to + d, f_load(from + d));
                if (d < dim) Cache::operand_n(to + d, f_load_n(from + d, dim - d), dim - d);
            }
        }
    }
    F load_dims(const float *from, int d) const {
        return f_load_n(from + d, dim - d < 16 ? dim - d : 16);
    }

    const Element *key_tile(const std::int32_t *blocks, int head, int position) const {
        return reinterpret_cast<const Element *>(
                   cache.keys(blocks[position / cache.block_size], head)) +
               static_cast<std::ptrdiff_t>(position % cache.block_size) * dim;
    }

    // Points `keys` and `values` at the tiles first .. end-1 of a split; brings them into the order
    // of tiles first where the cache does not hold tiles.
    void find_tiles(int split, int first, int end) {
        for (int t = first; t < end; ++t) {
            const int position = split * kSplit + t * kTileKeys, head = rows.kv_head;
            if (cache.is_tiled() && !Cache::kInt4) {
                const std::int32_t block = rows.blocks[position / cache.block_size];
                const std::ptrdiff_t at = position % cache.block_size;
                keys[t] = reinterpret_cast<const Element *>(cache.keys(block, head)) + at * dim;
                values[t] = reinterpret_cast<const Element *>(cache.values(block, head)) + at * dim;
                if constexpr (Cache::kDigits) {
                    key_scales[t] = reinterpret_cast<const float *>(
                                        cache.scales(cache.keys(block, head))) + at;
                    value_scales[t] = reinterpret_cast<const float *>(
                                          cache.scales(cache.values(block, head))) + at;
                    if (waits()) {
                        prefetch(key_scales[t]);
                        prefetch(value_scales[t]);
                    }
                }
            } else {
                const int per_key = Cache::kInt4 ? 2 * groups : 1;
                Element *k = gathered + t * kTileKeys * key_dim;
                Element *v = gathered + kSplit * key_dim + t * kTileKeys * dim;
                float *key_scale = gathered_scales + t * kTileKeys * per_key;
                float *value_scale = key_scale + kSplit * per_key;
                if constexpr (Cache::kInt4) {
                    if (cache.is_tiled()) {
                        ask_for(position + kUnpackAhead * kTileKeys);
                        unpack(position, k, v, key_scale, value_scale);
                    } else {
                        gather_codes(position, k, v, key_scale, value_scale);
                    }
                } else {
                    gather(position, k, v, key_scale);
                }
                keys[t] = k;
                values[t] = v;
                key_scales[t] = key_scale;
                value_scales[t] = value_scale;
            }
        }
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
            if (j < n) {
                ahead[i] = keys[first + j];
            } else if (j < 2 * n) {
                ahead[i] = values[first + j - n];
            } else if (cache.is_tiled() && at < length) {
                ahead[i] = key_tile(blocks, head, at);
            } else {
                ahead[i] = keys[first];
            }
        }
    }

    // Where key i of a tile has its dim d.
    int key_at(int i, int d) const {
        return d / Cache::kStep * kTileKeys * Cache::kStep + i * Cache::kStep + d % Cache::kStep;
    }
    int value_at(int i, int d) const {
        return (i / Cache::kStep * dim + d) * Cache::kStep + i % Cache::kStep;
    }

    void gather(int position, Element *k, Element *v, float *scales) const {
        for (int i = 0; i < kTileKeys; ++i, ++position) {
            if (position >= rows.seq_len) {
                for (int d = 0; d < dim; ++d) k[key_at(i, d)] = v[value_at(i, d)] = 0;
                if constexpr (Cache::kDigits) scales[i] = scales[kSplit + i] = 0;
                continue;
            }
            const std::int32_t block = rows.blocks[position / cache.block_size];
            const std::ptrdiff_t at = position % cache.block_size;
            std::uint8_t *key_block = cache.keys(block, rows.kv_head);
            std::uint8_t *value_block = cache.values(block, rows.kv_head);
            const Element *from_k = reinterpret_cast<const Element *>(key_block) + at * dim;
            const Element *from_v = reinterpret_cast<const Element *>(value_block) + at * dim;
            for (int d = 0; d < dim; ++d) {
                k[key_at(i, d)] = from_k[d];
                v[value_at(i, d)] = from_v[d];
            }
            if constexpr (Cache::kDigits) {
                __builtin_memcpy(scales + i, cache.scales(key_block) + 4 * at, 4);
                __builtin_memcpy(scales + kSplit + i, cache.scales(value_block) + 4 * at, 4);
            }
        }
    }

    // Asks for a tile of codes of 4 bits, and its scales.
    void ask_for(int position) const {
        if (position >= rows.seq_len) return;
        const std::int32_t block = rows.blocks[position / cache.block_size];
        const int at = position % cache.block_size, bytes = kTileKeys * cache.row();
        std::uint8_t *const both[] = {cache.keys(block, rows.kv_head),
                                      cache.values(block, rows.kv_head)};
        for (std::uint8_t *codes : both) {
            for (int i = 0; i < bytes; i += 64) prefetch(codes + at * cache.row() + i);
            for (int i = 0; i < 2 * groups; ++i)
                prefetch(cache.scales(codes) + 2 * (i * cache.block_size + at));
        }
    }

    // A tile of codes of 4 bits as bytes, in the order of tiles, and their scales as fp32.
    void unpack(int position, std::uint8_t *k, std::uint8_t *v, float *key_scale,
                float *value_scale) const {
        const std::int32_t block = rows.blocks[position / cache.block_size];
        const int at = position % cache.block_size, half = kTileKeys * cache.row();
        std::uint8_t *key_block = cache.keys(block, rows.kv_head);
        std::uint8_t *value_block = cache.values(block, rows.kv_head);
        unpack_codes(key_block + at * cache.row(), half, k);
        for (int i = 0; i < kTileKeys; i += 4)
            unpack_codes(value_block + (at + i) * cache.row(), half / 4, v + i * dim);
        for (int i = 0; i < 2 * groups; ++i) {
            const std::size_t from = 2 * (static_cast<std::size_t>(i) * cache.block_size + at);
            f_store(key_scale + i * kTileKeys, load_scales(cache.scales(key_block) + from));
            f_store(value_scale + i * kTileKeys, load_scales(cache.scales(value_block) + from));
        }
    }
    static F load_scales(const std::uint8_t *from) {
        return f_load_bf16(reinterpret_cast<const std::uint16_t *>(from));
    }

    // n bytes: their low halves to `to`, their high halves behind them.
    static void unpack_codes(const std::uint8_t *from, int n, std::uint8_t *to) {
        const I low = i_set_bytes(15);
        int i = 0;
        for (; i + 64 <= n; i += 64) {
            const I x = i_load(from + i);
            i_store(to + i, i_and(x, low));
            i_store(to + n + i, i_high_nibbles(x));
        }
        for (; i < n; ++i) {
            to[i] = from[i] & 15;
            to[n + i] = from[i] >> 4;
        }
    }

    // The same from a cache without tiles.
    void gather_codes(int position, std::uint8_t *k, std::uint8_t *v, float *key_scale,
                      float *value_scale) const {
        for (int i = 0; i < kTileKeys; ++i, ++position) {
            const bool is_there = position < rows.seq_len;
            const std::int32_t block = is_there ? rows.blocks[position / cache.block_size] : 0;
            const int at = position % cache.block_size, half = cache.row();
            std::uint8_t *key_block = cache.keys(block, rows.kv_head);
            std::uint8_t *value_block = cache.values(block, rows.kv_head);
            for (int d = 0; d < half; ++d) {
                const std::uint8_t a = is_there ? key_block[at * half + d] : std::uint8_t(0);
                const std::uint8_t b = is_there ? value_block[at * half + d] : std::uint8_t(0);
                k[key_at(i, d)] = a & 15;
                k[key_at(i, d + half)] = a >> 4;
                v[value_at(i, d)] = b & 15;
                v[value_at(i, d + half)] = b >> 4;
            }
            for (int d = dim; d < key_dim; ++d) k[key_at(i, d)] = 0;
            for (int j = 0; j < 2 * groups; ++j) {
                const int from = 2 * (j * cache.block_size + at);
                key_scale[j * kTileKeys + i] =
                    is_there ? scale_at(cache.scales(key_block) + from) : 0.0f;
                value_scale[j * kTileKeys + i] =
                    is_there ? scale_at(cache.scales(value_block) + from) : 0.0f;
            }
        }
    }
    static float scale_at(const std::uint8_t *from) {
        const std::uint32_t bits = static_cast<std::uint32_t>(from[0] | from[1] << 8) << 16;
        float scale;
        __builtin_memcpy(&scale, &bits, 4);
        return scale;
    }

    // Turns the scores of rows row .. row+n-1, tiles first .. end-1, into weights, with zeros where
    // a row sees no key.
    void softmax(int split, int row, int n, int first, int end, float *maximum, float *total) {
        const F hidden = f_set(-__builtin_inff());
        const bool as_they_are = rows.softcap <= 0 && rows.scale > 0;
        const float unit = 0x1.715476p+0f;  // 1 / log 2
        const float factor = as_they_are ? rows.scale * unit : unit;
        Span spans[kAttendRows];
        // The maxima first: a sum over lanes takes long, but several run side by side.
        for (int i = 0; i < n; ++i) {
            float *score = scores + (row + i) * kSplit;
            const Span span = visible(rows, (row + i) / rows.group, split);
            spans[i] = span;
            if (!as_they_are && !span.empty()) cap(score, span);
            F most = hidden;
            if (!span.empty()) {
                keep(score, span, span.first_tile(), hidden);
                keep(score, span, span.end_tile() - 1, hidden);
                for (int t = span.first_tile(); t < span.end_tile(); ++t)
                    most = f_max(f_load(score + t * kTileKeys), most);
            }
            maximum[row + i] = f_max_all(most) * factor;
            // NaN scores alone leave the maximum at -inf, which is to mean that no key is seen.
            if (!span.empty() && !(maximum[row + i] > -__builtin_inff()))
                maximum[row + i] = __builtin_nanf("");
        }
        const F by = f_set(factor);
        for (int i = 0; i < n; ++i) {
            float *score = scores + (row + i) * kSplit;
            const int from = spans[i].empty() ? end : spans[i].first_tile();
            const int to = spans[i].empty() ? end : spans[i].end_tile();
            const F base = f_set(maximum[row + i]);
            F sum = f_zero();
            if constexpr (Cache::kDigits) {  // digits come of each group's scales
                for (int t = from; t < to; ++t) {
                    const F p = exp2_to_0(f_sub(f_mul(f_load(score + t * kTileKeys), by), base));
                    sum = f_add(sum, p);
                    f_store(score + t * kTileKeys, p);
                }
            } else {
                Operand *weight = weights + (row + i) * kSplit;
                for (int t = first; t < from; ++t) Cache::weight(weight + t * kTileKeys, f_zero());
                for (int t = from; t < to; ++t) {
                    const F s = f_load(score + t * kTileKeys);
                    const F p = exp2_to_0(f_sub(f_mul(s, by), base));
                    sum = f_add(sum, p);
                    Cache::weight(weight + t * kTileKeys, p);
                }
                for (int t = to; t < end; ++t) Cache::weight(weight + t * kTileKeys, f_zero());
            }
            total[row + i] = f_sum(sum);
        }
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
    // times the scales of a group's values; and what the group's offsets come to.
    void take_digits(int row, Span span, int group, int first, int end) const {
        const Digits weight = weight_digits.from(row);
        const float *p = scores + row * kSplit;
        const int from = span.empty() ? end : span.first_tile();
        const int to = span.empty() ? end : span.end_tile();
        const F infinity = f_set(__builtin_inff());
        float weighed[kSplit];
        F most = f_zero(), high = f_zero(), low = f_zero(), sum = f_zero();
        for (int t = from; t < to; ++t) {
            const float *scale = value_scales[t] + group * kTileKeys;
            const F w = f_load(p + t * kTileKeys);
            const F x = inside(f_mul(w, f_load(scale)), span, t, f_zero());
            f_store(weighed + t * kTileKeys, x);
            most = f_max(f_min(x, infinity), most);
            if constexpr (Cache::kInt4) {
                const F offset = f_load(scale + groups * kTileKeys);
                sum = f_add(sum, inside(f_mul(w, offset), span, t, f_zero()));
            }
        }
        const float by = digits_factor(f_max_all(most), weight.scale);
        for (int t = first; t < end; ++t) {
            const F w = t >= from && t < to ? f_load(weighed + t * kTileKeys) : f_zero();
            store_digits(w, by, weight.digits + t * kTileKeys, weight.stride, &high, &low);
        }
        store_start<Cache>(weight.start, high, low);
        if constexpr (Cache::kInt4) *weight.sums = f_sum(sum);
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
        weigh_tiles<Cache, 1>(own + first, own + first, end - first, dim,
                              weights + row * kSplit + first * kTileKeys, acc);
    }

    // `last`: of this call.
    void split(int index, bool last, float *maximum, float *total, float *acc) {
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
        const int begin = all.first_tile(), stop = all.end_tile();
        find_tiles(index, begin, stop);
        if (waits()) look_ahead(index, last, begin, stop);
        const RowBlocks blocks(count);
        // A few tiles of keys at a time, while they are in the nearest cache, for all rows.
        for (int tile = begin; tile < stop; tile += kAttendVectors)
            for (int b = 0; b < blocks.count; ++b) {
                const int row = blocks.start(b), n = blocks.start(b + 1) - row;
                const Span span = visible_to_any(rows, row / rows.group, (row + n - 1) / rows.group,
                                                 index);
                if (span.empty()) continue;
                const int first = tile > span.first_tile() ? tile : span.first_tile();
                const int end = tile + kAttendVectors < span.end_tile() ? tile + kAttendVectors
                                                                        : span.end_tile();
                if (first >= end) continue;
                float *to = scores + row * kSplit + first * kTileKeys;
                const Element *const *next = ahead + first - begin;
#define ER_SCORE(N)                                                                              \
    if constexpr (Cache::kDigits) {                                                              \
        score_tiles_digits<Cache, N>(keys + first, next, key_scales + first, end - first,        \
                                     key_dim, q_digits.from(row), to);                           \
    } else {                                                                                     \
        score_tiles<Cache, N>(keys + first, next, end - first, dim,                              \
                              q + static_cast<std::ptrdiff_t>(row) * dim, to);                   \
    }
                ER_FOR_ROWS(n, ER_SCORE)
#undef ER_SCORE
            }
        for (int b = 0; b < blocks.count; ++b) {
            const int row = blocks.start(b), n = blocks.start(b + 1) - row;
            const Span span =
                visible_to_any(rows, row / rows.group, (row + n - 1) / rows.group, index);
            const int first = span.first_tile(), end = span.end_tile();
            softmax(index, row, n, first, end, maximum, total);
            float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
            const Element *const *next = ahead + (stop - begin) + (first - begin);
#define ER_WEIGH(N)                                                                              \
    if constexpr (Cache::kDigits) {                                                              \
        Digits weight = weight_digits.from(row);                                                 \
        weight.digits += first * kTileKeys;                                                      \
        for (int g = 0; g < groups; ++g) {                                                       \
            for (int i = row; i < row + n; ++i)                                                  \
                take_digits(i, visible(rows, i / rows.group, index), g, first, end);             \
            const int from = g * kKVGroup;                                                       \
            weigh_tiles_digits<Cache, N>(values + first, next, end - first, dim, from,           \
                                         g + 1 < groups ? from + kKVGroup : dim, weight, to);    \
        }                                                                                        \
    } else {                                                                                     \
        weigh_tiles<Cache, N>(values + first, next, end - first, dim,                            \
                              weights + row * kSplit + first * kTileKeys, to);                   \
    }
            ER_FOR_ROWS(n, ER_WEIGH)
#undef ER_WEIGH
        }
        if constexpr (!Cache::kDigits) {  // whose weight of 0 times any byte is 0
            if (all_finite(acc, count * dim)) return;
            for (int row = 0; row < count; ++row) {
                float *to = acc + static_cast<std::ptrdiff_t>(row) * dim;
                if (!all_finite(to, dim)) weigh_alone(row, visible(rows, row / rows.group, index), to);
            }
        }
    }

    static bool all_finite(const float *x, int n) {
        F odd = f_zero();  // x - x is 0 but for infinities and NaN
        for (int i = 0; i < n; i += 16) {
            const F v = n - i >= 16 ? f_load(x + i) : f_load_n(x + i, n - i);
            odd = f_add(odd, f_sub(v, v));
        }
        return f_sum(odd) == 0;
    }
};

template <class Cache>
static void attend_in(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                      float *max_, float *sum, float *acc, std::uint8_t *scratch) {
    Attend<Cache> attend(cache, rows, scratch);
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
    switch (cache.dtype) {
        case Dtype::kF32:
            return attend_in<CacheF32>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kBF16:
            return attend_in<CacheBF16>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kF16:
            return attend_in<CacheF16>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kInt8:
            return attend_in<CacheInt8>(cache, rows, split0, split1, max_, sum, acc, scratch);
        case Dtype::kInt4:
            return attend_in<CacheInt4>(cache, rows, split0, split1, max_, sum, acc, scratch);
    }
}

// ---------------------------------------------------------------------------------- writes

// Scatters n elements to their place in the cache: element d to to[d / kStep * stride + d % kStep *
// next].
template <int kStep, class Element>
ER_INLINE void scatter(const Element *from, int n, Element *to, std::ptrdiff_t stride,
                       std::ptrdiff_t next) {
    for (int d = 0; d < n; d += kStep, to += stride)
        for (int i = 0; i < kStep && d + i < n; ++i) to[i * next] = from[d + i];
}

// One head's `dim` numbers x, rounded, scattered; what else a cache of integers keeps of the slot:
// its first scale is at `scale_at`, with `slots` of them to a group.
template <class Cache>
static void write_head(const float *x, int dim, typename Cache::Element *to, std::ptrdiff_t stride,
                       std::ptrdiff_t next, std::uint8_t *, std::ptrdiff_t) {
    typename Cache::Element rounded[16];
    for (int d = 0; d < dim; d += 16, to += 16 / Cache::kStep * stride) {
        const int n = dim - d < 16 ? dim - d : 16;
        Cache::store(rounded, f_load_n(x + d, n));
        scatter<Cache::kStep>(rounded, n, to, stride, next);
    }
}

// Whether 127 / most is a number: not so for 0, magnitudes below 4e-37, NaN and infinity.
ER_INLINE bool has_digit(float most) {
    return most < __builtin_inff() && 127.0f / most < __builtin_inff();
}

// ops.kv_write says what an int8 cache holds: q + 128 in a byte, and the scale.
template <>
void write_head<CacheInt8>(const float *x, int dim, std::uint8_t *to, std::ptrdiff_t stride,
                           std::ptrdiff_t next, std::uint8_t *scale_at, std::ptrdiff_t) {
    const F infinity = f_set(__builtin_inff());
    F largest = f_zero();
    for (int d = 0; d < dim; d += 16) {
        const F v = f_load_n(x + d, dim - d < 16 ? dim - d : 16);
        largest = f_max(f_min(f_abs(v), infinity), largest);  // f_min turns NaN into infinity
    }
    const float most = f_max_all(largest);
    const float scale = most < __builtin_inff() ? most / 127.0f : __builtin_nanf("");
    const F by = f_set(has_digit(most) ? 127.0f / most : 0.0f);
    for (int d = 0; d < dim; d += 16, to += 16 / CacheInt8::kStep * stride) {
        const int n = dim - d < 16 ? dim - d : 16;
        std::int8_t q[16];
        std::uint8_t bytes[16];
        i_store_int8(q, has_digit(most) ? f_mul(f_load_n(x + d, n), by) : f_zero());
        for (int i = 0; i < 16; ++i) bytes[i] = static_cast<std::uint8_t>(q[i] + 128);
        scatter<CacheInt8::kStep>(bytes, n, to, stride, next);
    }
    __builtin_memcpy(scale_at, &scale, 4);
}

// A finite number as the nearest bf16 that is not above it (not below it: up), and its bits.
ER_INLINE std::uint16_t bf16_towards(float x, bool up, float *rounded) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const bool negative = bits >> 31;
    if ((bits & 0xffff) != 0 && negative != up) bits += 0x10000;
    bits &= 0xffff0000;
    __builtin_memcpy(rounded, &bits, 4);
    return static_cast<std::uint16_t>(bits >> 16);
}

// The codes of up to 32 numbers x; their scale and offset. See ops.kv_write.
static void write_group(const float *x, int n, std::uint8_t *codes, std::uint16_t *scale_to,
                        std::uint16_t *offset_to) {
    const int first = n < 16 ? n : 16;
    const F a = f_load_n(x, first), b = f_load_n(x + first, n - first);
    const F infinity = f_set(__builtin_inff()), none = f_set(-__builtin_inff());
    const auto largest = [&](F u, F v) {  // f_min turns NaN into infinity
        return f_max_all(f_max(f_keep(f_min(u, infinity), 0, first, none),
                               f_keep(f_min(v, infinity), 0, n - first, none)));
    };
    const float high = largest(a, b);
    const float low = -largest(f_sub(f_zero(), a), f_sub(f_zero(), b));
    float offset = 0, scale = 0;
    const bool finite = high < __builtin_inff() && low > -__builtin_inff();
    if (finite) *offset_to = bf16_towards(low, false, &offset);
    const float span = high - offset;
    if (!finite || !(span < __builtin_inff())) {
        *scale_to = *offset_to = 0x7fc0;  // NaN
        for (int i = 0; i < n; ++i) codes[i] = 0;
        return;
    }
    *scale_to = bf16_towards(span / 15.0f, true, &scale);
    const float by = 1.0f / scale < __builtin_inff() ? 1.0f / scale : 0.0f;
    const F most = f_set(15.0f);
    std::int8_t whole[32];
    i_store_int8(whole, f_min(f_mul(f_sub(a, f_set(offset)), f_set(by)), most));
    i_store_int8(whole + first, f_min(f_mul(f_sub(b, f_set(offset)), f_set(by)), most));
    for (int i = 0; i < n; ++i) codes[i] = static_cast<std::uint8_t>(whole[i]);
}

template <>
void write_head<CacheInt4>(const float *x, int dim, std::uint8_t *to, std::ptrdiff_t stride,
                           std::ptrdiff_t next, std::uint8_t *scale_at, std::ptrdiff_t slots) {
    const int groups = kv_groups(dim), half = dim / 2;
    for (int g = 0; g < groups; ++g) {
        const int begin = g * kKVGroup, n = dim - begin < kKVGroup ? dim - begin : kKVGroup;
        std::uint8_t codes[kKVGroup];
        std::uint16_t scale, offset;
        write_group(x + begin, n, codes, &scale, &offset);
        __builtin_memcpy(scale_at + 2 * slots * g, &scale, 2);
        __builtin_memcpy(scale_at + 2 * slots * (groups + g), &offset, 2);
        for (int i = 0; i < n; ++i) {  // all of the low halves come first
            const bool is_high = begin + i >= half;
            const int d = begin + i - (is_high ? half : 0);
            std::uint8_t *at = to + d / CacheInt4::kStep * stride + d % CacheInt4::kStep * next;
            *at = is_high ? static_cast<std::uint8_t>(*at | codes[i] << 4) : codes[i];
        }
    }
}

template <class Cache>
static void kv_write_in(const KVCacheView &cache, std::int32_t slot, const float *k,
                        const float *v) {
    using Element = typename Cache::Element;
    constexpr int kStep = Cache::kStep;
    const std::int32_t block = slot / cache.block_size;
    const std::ptrdiff_t at = slot % cache.block_size, dim = cache.row(), slots = cache.block_size;
    constexpr int kScaleBytes = Cache::kInt4 ? 2 : 4;
    for (int head = 0; head < cache.num_kv_heads;
         ++head, k += cache.head_dim, v += cache.head_dim) {
        Element *keys = reinterpret_cast<Element *>(cache.keys(block, head));
        Element *values = reinterpret_cast<Element *>(cache.values(block, head));
        std::uint8_t *key_scale = cache.scales(cache.keys(block, head)) + kScaleBytes * at;
        std::uint8_t *value_scale = cache.scales(cache.values(block, head)) + kScaleBytes * at;
        if (cache.is_tiled()) {
            keys += at / kTileKeys * kTileKeys * dim + at % kTileKeys * kStep;
            values += at / kStep * kStep * dim + at % kStep;
            write_head<Cache>(k, cache.head_dim, keys, kTileKeys * kStep, 1, key_scale, slots);
            write_head<Cache>(v, cache.head_dim, values, kStep * kStep, kStep, value_scale, slots);
        } else {
            write_head<Cache>(k, cache.head_dim, keys + at * dim, kStep, 1, key_scale, slots);
            write_head<Cache>(v, cache.head_dim, values + at * dim, kStep, 1, value_scale, slots);
        }
    }
}

static void kv_write(const KVCacheView &cache, std::int32_t slot, const float *k, const float *v) {
    switch (cache.dtype) {
        case Dtype::kF32: return kv_write_in<CacheF32>(cache, slot, k, v);
        case Dtype::kBF16: return kv_write_in<CacheBF16>(cache, slot, k, v);
        case Dtype::kF16: return kv_write_in<CacheF16>(cache, slot, k, v);
        case Dtype::kInt8: return kv_write_in<CacheInt8>(cache, slot, k, v);
        case Dtype::kInt4: return kv_write_in<CacheInt4>(cache, slot, k, v);
    }
}

}  // namespace ER_ISA
}  // namespace engineroom
