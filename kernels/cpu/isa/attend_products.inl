// The products of attention: rows of q with tiles of 16 keys, rows of weights with tiles of values.
//
// An output element is a lane and its sum runs in ascending order of dims or keys, whatever rows and
// tiles share the loads. What is not finite in a tile that some rows do not see is attend.inl's.
namespace engineroom {
namespace ER_ISA {

constexpr int kTileKeys = 16;
constexpr int kSplitTiles = kSplit / kTileKeys;
// Rows and vectors of a register tile.
constexpr int kAttendRows = kF32Rows >= 8 ? 6 : 2;
constexpr int kAttendVectors = kF32Rows >= 8 ? 4 : 2;

// How a dtype of the cache is multiplied: Element as stored, Operand of q and of the weights, kStep
// elements (of keys) or keys (of values) that lie together in a tile. What codes have beside them, a
// Scale a slot (kScaled) or two a slot and group of dims (kGroups), is multiplied afterwards where
// they are keys; where they are values, into the weights.
struct CacheBF16 {
    using Element = std::uint16_t;
    using Operand = std::uint16_t;
    using Vector = P;
    static constexpr int kStep = 2;
    static constexpr bool kScaled = false, kDigits = false, kGroups = false;
    static constexpr int kAhead = 4;
    using Scale = float;  // of which there are none
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
    static constexpr bool kScaled = false, kDigits = false, kGroups = false;
    static constexpr int kAhead = 4;
    using Scale = float;  // of which there are none
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
    static constexpr bool kScaled = false, kDigits = false, kGroups = false;
    static constexpr int kAhead = 4;
    using Scale = float;  // of which there are none
    ER_INLINE void store(std::uint16_t *to, F x) { f_store_f16(to, x); }
    ER_INLINE F load(const std::uint16_t *p) { return f_load_f16(p); }
    ER_INLINE F load_n(const std::uint16_t *p, int n) { return f_load_f16_n(p, n); }
    ER_INLINE F spread(const float *p) { return f_set(*p); }
    ER_INLINE F dot(F acc, F a, F b) { return f_fma(a, b, acc); }
    ER_INLINE void operand(float *to, F x) { f_store(to, x); }
    ER_INLINE void operand_n(float *to, F x, int n) { f_store_n(to, x, n); }
    ER_INLINE void weight(float *to, F x) { f_store(to, x); }
};

// Numbers of E4M3 with a scale a slot, multiplied as the bf16 numbers times 2^-8 that they are.
struct CacheFp8 : CacheBF16 {
    using Element = std::uint8_t;
    static constexpr bool kScaled = true;
    static constexpr int kAhead = 8;
    ER_INLINE P load(const std::uint8_t *p) { return p_load_e4m3(p); }
    ER_INLINE P load_n(const std::uint8_t *p, int n) { return p_load_e4m3_n(p, n); }
    // The scales of a tile, times what its elements lack.
    ER_INLINE F scales(const float *p) { return f_mul(f_load(p), f_set(kE4M3Unit)); }
};

// Bytes with a scale a slot; q and the weights are two signed digits of base 254 each, 15 bits
// together: their products are sums of bytes, which are exact in any order.
struct CacheInt8 {
    using Element = std::uint8_t;
    using Operand = std::int8_t;
    static constexpr int kStep = 4;
    static constexpr bool kScaled = true, kDigits = true, kGroups = false;
    static constexpr int kAhead = 8;
    using Scale = float;
};

// Codes of 4 bits with a scale and an offset a slot and group of 32 dims; q and the weights are bf16.
// An element has the codes of dims i and i + 16 of its group. A product takes one nibble of the low
// and one of the high word of every lane, so q and a tile's values lie in the order of these words.
struct CacheInt4 {
    using Element = std::uint8_t;
    using Operand = std::uint16_t;
    static constexpr int kStep = 4;
    static constexpr bool kScaled = true, kDigits = false, kGroups = true;
    static constexpr int kAhead = 8;
    using Scale = std::uint16_t;
    // The dim of a group that stands at place i of q.
    static int dim_at(int i) { return i / 8 * 4 + i % 8 / 4 + i % 2 * 2 + i / 2 % 2 * 16; }
};

// action(keys, values) with what multiplies this cache's: the pairs of KVSpec.parts in backend.py.
template <class Action>
static void with_types(const KVCacheView &cache, Action action) {
    switch (cache.key_dtype) {
        case Dtype::kF32: return action(CacheF32{}, CacheF32{});
        case Dtype::kBF16: return action(CacheBF16{}, CacheBF16{});
        case Dtype::kF16: return action(CacheF16{}, CacheF16{});
        case Dtype::kFp8: return action(CacheFp8{}, CacheFp8{});
        case Dtype::kInt4: return action(CacheInt4{}, CacheInt4{});
        case Dtype::kInt8: break;
    }
    if (cache.value_dtype == Dtype::kInt8) return action(CacheInt8{}, CacheInt8{});
    return action(CacheInt8{}, CacheInt4{});
}

// Where key i of a step stands in it: words of 4-bit codes have every second one.
template <class Cache>
constexpr int place_in_step(int i) {
    return Cache::kGroups ? (i == 1 ? 2 : i == 2 ? 1 : i) : i;
}

// Rows in two digits: of row r, digit i (0: high) at digits + (2 r + i) * stride. A number is
// scale * (254 high + low). What i_dot8 does not subtract of a byte's bias, `start` does.
struct Digits {
    std::int8_t *digits;
    int stride;
    std::int32_t *start;  // [rows][2]
    float *scale;         // [rows]
    Digits from(int row) const {
        return {digits + 2 * row * stride, stride, start + 2 * row, scale + row};
    }
};

// Rows in bf16 for codes of 4 bits: of row r and group g (of weights: of the groups at once) at
// numbers + r * stride + g * size; and what their offsets are multiplied by, or come to.
struct Grouped {
    std::uint16_t *numbers;
    int stride, size;
    float *sums;  // [rows][groups]
    int groups;
    Grouped from(int row) const {
        return {numbers + row * stride, stride, size, sums + row * groups, groups};
    }
};
constexpr int kGroupsAtOnce = kAttendVectors / 2;  // of weights

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

ER_INLINE void store_start(std::int32_t *to, F high, F low) {
    constexpr int kBias = 128 - kBias8;
    to[0] = -kBias * static_cast<std::int32_t>(f_sum(high));
    to[1] = -kBias * static_cast<std::int32_t>(f_sum(low));
}

// ------------------------------------------------------------------------------ the products

// So few rows wait for memory: while they read a tile they ask for the one that comes kAhead later.
constexpr int kPrefetchRows = 4;

// Scores of kRows rows and kTiles tiles of keys: out[i][16 j] = sum over dims of q[i] * keys[j].
// Asks for the tiles `ahead`.
template <class Cache, int kRows, int kTiles>
static void score(const typename Cache::Element *const *keys,
                  const std::uint8_t *const *ahead, int head_dim,
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
            if (kRows <= kPrefetchRows)
                prefetch(ahead[j] + d / Cache::kStep * kLine * sizeof(Element));
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
                  const std::uint8_t *const *ahead, int tiles, int head_dim, int dim,
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
                if (kRows <= kPrefetchRows)
                    prefetch(ahead[t] + (at - values[t]) * sizeof(*at));
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

// The same in digits; 16 scales a tile.
template <int kRows, int kTiles>
static void score_digits(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                         const float *const *scales, const Digits &q, int key_dim, float *out) {
    I acc[kRows][2][kTiles];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int digit = 0; digit < 2; ++digit)
#pragma GCC unroll 6
            for (int j = 0; j < kTiles; ++j) acc[i][digit][j] = i_bcast(q.start + 2 * i + digit);
    for (int d = 0; d < key_dim; d += 4) {
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
                    acc[i][digit][j] = i_dot8(acc[i][digit][j], k[j], x);
            }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) {
            float *to = out + i * kSplit + j * kTileKeys;
            const F sum = f_fma(f_of_i(acc[i][0][j]), f_set(kDigitBase), f_of_i(acc[i][1][j]));
            f_store(to, f_mul(f_mul(sum, f_set(q.scale[i])), f_load(scales[j])));
        }
}

template <int kRows, int kVectors, bool kPartial>
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
                        acc[i][digit][j] = i_dot8(acc[i][digit][j], v[j], x);
                }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kVectors; ++j) {
            float *to = out + static_cast<std::ptrdiff_t>(i) * head_dim + dim + 16 * j;
            const F sum = f_fma(f_of_i(acc[i][0][j]), f_set(kDigitBase), f_of_i(acc[i][1][j]));
            const F scaled = f_mul(sum, f_set(weight.scale[i]));
            if (kPartial) {
                f_store_n(to, scaled, lanes);
            } else {
                f_store(to, scaled);
            }
        }
}

// Calls step(Constant<n>, pair n) for the four pairs of codes of a vector.
template <class Step>
ER_INLINE void for_pairs(I codes, Step step) {
    step(0, c_pair<0>(codes));
    step(1, c_pair<1>(codes));
    step(2, c_pair<2>(codes));
    step(3, c_pair<3>(codes));
}

// The same for codes of 4 bits: of each tile `scales` has the first group's, and the offsets behind
// the last group's scales, `apart` from group to group.
template <int kRows, int kTiles>
static void score_groups(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                         const std::uint16_t *const *scales, std::ptrdiff_t apart, const Grouped &q,
                         float *out) {
    F total[kRows][kTiles];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) total[i][j] = f_zero();
    for (int g = 0; g < q.groups; ++g) {
        F acc[kRows][kTiles];
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < kTiles; ++j) acc[i][j] = f_zero();
        for (int line = 4 * g; line < 4 * g + 4; ++line) {
            const std::uint16_t *x = q.numbers + 8 * line;
#pragma GCC unroll 6
            for (int j = 0; j < kTiles; ++j) {
                if (kRows <= kPrefetchRows) prefetch(ahead[j] + 64 * line);
                for_pairs(i_load(keys[j] + 64 * line), [&](int n, C codes) __attribute__((always_inline)) {
#pragma GCC unroll 6
                    for (int i = 0; i < kRows; ++i)
                        acc[i][j] = c_dot(acc[i][j], codes, p_bcast(x + i * q.stride + 2 * n));
                });
            }
        }
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) {
            const F scale = f_load_bf16(scales[j] + g * apart);
            const F offset = f_load_bf16(scales[j] + (q.groups + g) * apart);
#pragma GCC unroll 6
            for (int i = 0; i < kRows; ++i)
                total[i][j] = f_fma(acc[i][j], scale, f_fma(offset, f_set(q.sums[i * q.groups + g]),
                                                            total[i][j]));
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < kTiles; ++j) f_store(out + i * kSplit + j * kTileKeys, total[i][j]);
}

// Groups group .. group + kGroups - 1 of codes of 4 bits, whose scales the weights have in them.
template <int kRows, int kGroups>
static void weigh_groups(const std::uint8_t *const *values, const std::uint8_t *const *ahead,
                         int tiles, int groups, int group, int head_dim, const Grouped &weight,
                         float *out) {
    F acc[kRows][2 * kGroups];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < 2 * kGroups; ++j) acc[i][j] = f_zero();
    const std::uint16_t *x = weight.numbers;
    for (int t = 0; t < tiles; ++t)
        for (int step = 0; step < kTileKeys / 4; ++step, x += 4)
#pragma GCC unroll 6
            for (int g = 0; g < kGroups; ++g) {
                const int at = 64 * (step * groups + group + g);
                if (kRows <= kPrefetchRows) prefetch(ahead[t] + at);
                for_pairs(i_load(values[t] + at), [&](int n, C codes) __attribute__((always_inline)) {
                    const int j = 2 * g + n % 2, key = n / 2 * 2;
#pragma GCC unroll 6
                    for (int i = 0; i < kRows; ++i)
                        acc[i][j] = c_dot(
                            acc[i][j], codes,
                            p_bcast(x + i * weight.stride + g * weight.size + key));
                });
            }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < 2 * kGroups; ++j) {
            const int dim = kKVGroup * group + 16 * j, lanes = head_dim - dim;
            float *to = out + static_cast<std::ptrdiff_t>(i) * head_dim + dim;
            const F sum = f_add(acc[i][j], f_set(weight.sums[i * weight.groups + j / 2]));
            if (lanes >= 16) {
                f_store(to, sum);
            } else if (lanes > 0) {
                f_store_n(to, sum, lanes);
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
                        const std::uint8_t *const *ahead, int tiles, int head_dim,
                        const typename Cache::Operand *q, float *out) {
    in_pieces<kAttendVectors>(tiles, 1, [&](int t, auto n) {
        score<Cache, kRows, n.value>(keys + t, ahead + t, head_dim, q, out + t * kTileKeys);
    });
}

template <int kRows>
static void score_tiles_digits(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                               const float *const *scales, int tiles, int key_dim, const Digits &q,
                               float *out) {
    in_pieces<kDigitVectors<kRows>>(tiles, 1, [&](int t, auto n) {
        score_digits<kRows, n.value>(keys + t, ahead + t, scales + t, q, key_dim,
                                     out + t * kTileKeys);
    });
}

template <int kRows>
static void score_tiles_groups(const std::uint8_t *const *keys, const std::uint8_t *const *ahead,
                               const std::uint16_t *const *scales, std::ptrdiff_t apart, int tiles,
                               const Grouped &q, float *out) {
    in_pieces<kAttendVectors / 2>(tiles, 1, [&](int t, auto n) {
        score_groups<kRows, n.value>(keys + t, ahead + t, scales + t, apart, q, out + t * kTileKeys);
    });
}

// All dims of the weighted values, for kRows rows.
template <class Cache, int kRows>
static void weigh_tiles(const typename Cache::Element *const *values,
                        const std::uint8_t *const *ahead, int tiles, int dim,
                        const typename Cache::Operand *weight, float *out) {
    const int d = in_pieces<kAttendVectors>(dim, 16, [&](int at, auto n) {
        weigh<Cache, kRows, n.value, false>(values, ahead, tiles, dim, at, 16, weight, out);
    });
    if (d < dim) weigh<Cache, kRows, 1, true>(values, ahead, tiles, dim, d, dim - d, weight, out);
}

template <int kRows>
static void weigh_tiles_digits(const std::uint8_t *const *values, const std::uint8_t *const *ahead,
                               int tiles, int dim, const Digits &weight, float *out) {
    const int d = in_pieces<kDigitVectors<kRows>>(dim, 16, [&](int at, auto n) {
        weigh_digits<kRows, n.value, false>(values, ahead, tiles, dim, at, 16, weight, out);
    });
    if (d < dim) weigh_digits<kRows, 1, true>(values, ahead, tiles, dim, d, dim - d, weight, out);
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

}  // namespace ER_ISA
}  // namespace engineroom
