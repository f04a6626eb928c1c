// Writes to the paged cache: one token's keys and values, rounded as ops.kv_write says.
namespace engineroom {
namespace ER_ISA {

// Scatters n elements to their place in the cache: element d to to[d / kStep * stride + d % kStep *
// next].
template <int kStep, class Element>
ER_INLINE void scatter(const Element *from, int n, Element *to, std::ptrdiff_t stride,
                       std::ptrdiff_t next) {
    for (int d = 0; d < n; d += kStep, to += stride)
        for (int i = 0; i < kStep && d + i < n; ++i) to[i * next] = from[d + i];
}

// One head's `dim` numbers x, rounded, scattered; what else a cache of codes keeps of the slot:
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

// The largest magnitude of `dim` numbers, infinity where one is NaN.
ER_INLINE float most_of(const float *x, int dim) {
    const F infinity = f_set(__builtin_inff());
    F largest = f_zero();
    for (int d = 0; d < dim; d += 16) {
        const F v = f_load_n(x + d, dim - d < 16 ? dim - d : 16);
        largest = f_max(f_min(f_abs(v), infinity), largest);  // f_min turns NaN into infinity
    }
    return f_max_all(largest);
}

// Whether 127 / most is a number: not so for 0, magnitudes below 4e-37, NaN and infinity.
ER_INLINE bool has_digit(float most) {
    return most < __builtin_inff() && 127.0f / most < __builtin_inff();
}

// ops.kv_write says what an int8 cache holds: q + 128 in a byte, and the scale.
template <>
void write_head<CacheInt8>(const float *x, int dim, std::uint8_t *to, std::ptrdiff_t stride,
                           std::ptrdiff_t next, std::uint8_t *scale_at, std::ptrdiff_t) {
    const float most = most_of(x, dim);
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

// And what an fp8 cache holds.
template <>
void write_head<CacheFp8>(const float *x, int dim, std::uint8_t *to, std::ptrdiff_t stride,
                          std::ptrdiff_t next, std::uint8_t *scale_at, std::ptrdiff_t) {
    const float most = most_of(x, dim), by = kE4M3Most / most;
    const float scale = most < __builtin_inff() ? most / kE4M3Most : __builtin_nanf("");
    const bool has_codes = most < __builtin_inff() && by < __builtin_inff();
    for (int d = 0; d < dim; d += 16, to += 16 / CacheFp8::kStep * stride) {
        const int n = dim - d < 16 ? dim - d : 16;
        float scaled[16];
        std::uint8_t codes[16];
        f_store(scaled, has_codes ? f_mul(f_load_n(x + d, n), f_set(by)) : f_zero());
        for (int i = 0; i < 16; ++i) codes[i] = e4m3_of(scaled[i]);
        scatter<CacheFp8::kStep>(codes, n, to, stride, next);
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
    const int groups = kv_groups(dim);
    for (int g = 0; g < groups; ++g, to += kKVGroup / 2 / CacheInt4::kStep * stride) {
        const int begin = g * kKVGroup, n = dim - begin < kKVGroup ? dim - begin : kKVGroup;
        std::uint8_t codes[kKVGroup] = {};
        std::uint16_t scale, offset;
        write_group(x + begin, n, codes, &scale, &offset);
        __builtin_memcpy(scale_at + 2 * slots * g, &scale, 2);
        __builtin_memcpy(scale_at + 2 * slots * (groups + g), &offset, 2);
        for (int i = 0; i < kKVGroup / 2; ++i)
            codes[i] = static_cast<std::uint8_t>(codes[i] | codes[i + kKVGroup / 2] << 4);
        scatter<CacheInt4::kStep>(codes, kKVGroup / 2, to, stride, next);
    }
}

// One half of a block: `from` is of its first slot, `at` the slot, x a head's numbers.
template <class Cache, bool kValues>
static void write_slot(const KVCacheView &cache, Dtype dtype, std::uint8_t *from, std::ptrdiff_t at,
                       const float *x) {
    constexpr int kStep = Cache::kStep;
    const std::ptrdiff_t row = kv_row(dtype, cache.head_dim), slots = cache.block_size;
    std::uint8_t *scale = cache.scales(from, dtype) +
                          static_cast<std::ptrdiff_t>(sizeof(typename Cache::Scale)) * at;
    typename Cache::Element *to = reinterpret_cast<typename Cache::Element *>(from);
    if (!cache.is_tiled(dtype)) {
        write_head<Cache>(x, cache.head_dim, to + at * row, kStep, 1, scale, slots);
    } else if (kValues) {
        to += at / kStep * kStep * row + place_in_step<Cache>(static_cast<int>(at % kStep));
        write_head<Cache>(x, cache.head_dim, to, kStep * kStep, kStep, scale, slots);
    } else {
        to += at / kTileKeys * kTileKeys * row + at % kTileKeys * kStep;
        write_head<Cache>(x, cache.head_dim, to, kTileKeys * kStep, 1, scale, slots);
    }
}

static void kv_write(const KVCacheView &cache, std::int32_t slot, const float *k, const float *v) {
    const std::int32_t block = slot / cache.block_size;
    const std::ptrdiff_t at = slot % cache.block_size;
    with_types(cache, [&](auto keys, auto values) {
        for (int head = 0; head < cache.num_kv_heads; ++head) {
            const std::ptrdiff_t from = static_cast<std::ptrdiff_t>(head) * cache.head_dim;
            write_slot<decltype(keys), false>(cache, cache.key_dtype, cache.keys(block, head), at,
                                              k + from);
            write_slot<decltype(values), true>(cache, cache.value_dtype, cache.values(block, head), at,
                                               v + from);
        }
    });
}

}  // namespace ER_ISA
}  // namespace engineroom
