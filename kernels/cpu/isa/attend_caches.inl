// The dtypes of the cache: what an element is, and how it is multiplied.
namespace engineroom {
namespace ER_ISA {

constexpr int kTileKeys = 16;
constexpr int kSplitTiles = kSplit / kTileKeys;

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

}  // namespace ER_ISA
}  // namespace engineroom
