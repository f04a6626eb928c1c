// Sixteen lanes on AVX2, FMA and F16C: two registers of eight. The interface is vec_generic.hpp's.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define ER_INLINE static inline __attribute__((always_inline))

#include "../e4m3.hpp"

namespace engineroom {
namespace avx2 {

struct F {  // 16 fp32
    __m256 lo, hi;
};
struct I {  // 64 bytes: 16 int32, or 16 groups of 4 bytes
    __m256i lo, hi;
};
using P = I;  // 16 pairs of bf16

constexpr int kBias8 = 128;     // dot8 multiplies the unsigned bytes less 128
constexpr int kVectors = 1;     // of a weight tile's three, what a register tile holds
constexpr int kInt8Rows = 2;    // rows of a register tile, by form
constexpr int kBF16Rows = 4;
constexpr int kF32Rows = 5;

// ------------------------------------------------------------------------------------- fp32

ER_INLINE F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ER_INLINE F f_set(float x) {
    const __m256 all = _mm256_set1_ps(x);
    return {all, all};
}
ER_INLINE F f_load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ER_INLINE void f_store(float *p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
// All bits of the lanes below n; any n.
ER_INLINE I first_lanes(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)};
}
ER_INLINE F f_load_n(const float *p, int n) {
    const I mask = first_lanes(n);
    return {_mm256_maskload_ps(p, mask.lo), _mm256_maskload_ps(p + 8, mask.hi)};
}
ER_INLINE void f_store_n(float *p, F x, int n) {
    const I mask = first_lanes(n);
    _mm256_maskstore_ps(p, mask.lo, x.lo);
    _mm256_maskstore_ps(p + 8, mask.hi, x.hi);
}
ER_INLINE F f_add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
ER_INLINE F f_sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
ER_INLINE F f_mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
ER_INLINE F f_div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
ER_INLINE F f_max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
ER_INLINE F f_min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
ER_INLINE F f_abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
ER_INLINE F f_fma(F a, F b, F c) {  // a b + c
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
ER_INLINE F f_fnma(F a, F b, F c) {  // c - a b
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
ER_INLINE F f_round(F a) {  // to nearest even
    return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)};
}
// x 2^n for whole n >= -126; 0 for smaller n.
ER_INLINE __m256 scale2(__m256 x, __m256 n) {
    n = _mm256_max_ps(_mm256_min_ps(n, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f));
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
ER_INLINE F f_scale2(F x, F n) { return {scale2(x.lo, n.lo), scale2(x.hi, n.hi)}; }
// Over all lanes, halving: lane i with i + 8, then i + 4, i + 2, i + 1.
ER_INLINE float f_sum(F a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
ER_INLINE float f_max_all(F a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// Lanes from..to-1 of x, the others `fill`; any int for from and to.
ER_INLINE F f_keep(F x, int from, int to, F fill) {
    const I below = first_lanes(from), until = first_lanes(to);
    const __m256 lo = _mm256_castsi256_ps(_mm256_andnot_si256(below.lo, until.lo));
    const __m256 hi = _mm256_castsi256_ps(_mm256_andnot_si256(below.hi, until.hi));
    return {_mm256_blendv_ps(fill.lo, x.lo, lo), _mm256_blendv_ps(fill.hi, x.hi, hi)};
}

// --------------------------------------------------------------------------- 16-bit floats

ER_INLINE __m128i load8(const std::uint16_t *p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}
ER_INLINE void store8(std::uint16_t *p, __m128i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), x);
}
ER_INLINE F f_load_f16(const std::uint16_t *p) {
    return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))};
}
ER_INLINE F f_load_f16_n(const std::uint16_t *p, int n) {
    std::uint16_t all[16] = {};
    std::memcpy(all, p, static_cast<std::size_t>(n) * 2);
    return f_load_f16(all);
}
ER_INLINE void f_store_f16(std::uint16_t *p, F x) {
    store8(p, _mm256_cvtps_ph(x.lo, 0));
    store8(p + 8, _mm256_cvtps_ph(x.hi, 0));
}
ER_INLINE void f_store_f16_n(std::uint16_t *p, F x, int n) {
    std::uint16_t all[16];
    f_store_f16(all, x);
    std::memcpy(p, all, static_cast<std::size_t>(n) * 2);
}
ER_INLINE __m256 float_of_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
// To nearest even; NaN stays NaN.
ER_INLINE __m128i bf16_of_float(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
ER_INLINE F f_load_bf16(const std::uint16_t *p) {
    return {float_of_bf16(load8(p)), float_of_bf16(load8(p + 8))};
}
ER_INLINE F f_load_bf16_n(const std::uint16_t *p, int n) {
    std::uint16_t all[16] = {};
    std::memcpy(all, p, static_cast<std::size_t>(n) * 2);
    return f_load_bf16(all);
}
ER_INLINE void f_store_bf16(std::uint16_t *p, F x) {
    store8(p, bf16_of_float(x.lo));
    store8(p + 8, bf16_of_float(x.hi));
}
// The same where no lane is subnormal.
ER_INLINE void f_store_bf16_normal(std::uint16_t *p, F x) {
    f_store_bf16(p, x);
}
ER_INLINE void f_store_bf16_n(std::uint16_t *p, F x, int n) {
    std::uint16_t all[16];
    f_store_bf16(all, x);
    std::memcpy(p, all, static_cast<std::size_t>(n) * 2);
}

// Pairs of bf16. p_dot: acc + a[2i] b[2i] + a[2i+1] b[2i+1] per lane, two fused multiply-adds in
// this order. p_bcast: one pair in every lane. p_load_n: pairs behind n are zeros.
ER_INLINE P p_load(const std::uint16_t *p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 16))};
}
ER_INLINE P p_load_n(const std::uint16_t *p, int pairs) {
    const I mask = first_lanes(pairs);
    const int *words = reinterpret_cast<const int *>(p);
    return {_mm256_maskload_epi32(words, mask.lo), _mm256_maskload_epi32(words + 8, mask.hi)};
}
ER_INLINE P p_bcast(const std::uint16_t *p) {
    std::int32_t pair;
    std::memcpy(&pair, p, 4);
    const __m256i all = _mm256_set1_epi32(pair);
    return {all, all};
}
ER_INLINE __m256 even_of(__m256i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
ER_INLINE __m256 odd_of(__m256i a) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Pairs whose low and high bytes are bytes 0 to 7 (p_zip_low) or 8 to 15 (p_zip_high) of every
// quarter of `low` and `high`.
ER_INLINE P p_zip_low(I low, I high) {
    return {_mm256_unpacklo_epi8(low.lo, high.lo), _mm256_unpacklo_epi8(low.hi, high.hi)};
}
ER_INLINE P p_zip_high(I low, I high) {
    return {_mm256_unpackhi_epi8(low.lo, high.lo), _mm256_unpackhi_epi8(low.hi, high.hi)};
}
// Even and odd members of pairs of bf16, as fp32.
ER_INLINE F f_even(P a) { return {even_of(a.lo), even_of(a.hi)}; }
ER_INLINE F f_odd(P a) { return {odd_of(a.lo), odd_of(a.hi)}; }
ER_INLINE F p_dot(F acc, P a, P b) {
    return f_fma(f_odd(a), f_odd(b), f_fma(f_even(a), f_even(b), acc));
}

// --------------------------------------------------------------------------------- integers

ER_INLINE I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
ER_INLINE I i_set(std::int32_t x) {
    const __m256i all = _mm256_set1_epi32(x);
    return {all, all};
}
ER_INLINE I i_set_bytes(std::uint8_t x) {
    const __m256i all = _mm256_set1_epi8(static_cast<char>(x));
    return {all, all};
}
ER_INLINE I i_load(const void *p) {
    const __m256i *from = static_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
// The first n groups of four bytes, zeros behind them.
ER_INLINE I i_load_n(const void *p, int n) {
    const I mask = first_lanes(n);
    const int *words = static_cast<const int *>(p);
    return {_mm256_maskload_epi32(words, mask.lo), _mm256_maskload_epi32(words + 8, mask.hi)};
}
ER_INLINE void i_store(void *p, I x) {
    __m256i *to = static_cast<__m256i *>(p);
    _mm256_storeu_si256(to, x.lo);
    _mm256_storeu_si256(to + 1, x.hi);
}
ER_INLINE I i_add(I a, I b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
ER_INLINE F f_of_bits(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
ER_INLINE I bits_of_f(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
ER_INLINE I i_and(I a, I b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
ER_INLINE I i_shift16(I a) { return {_mm256_slli_epi32(a.lo, 16), _mm256_slli_epi32(a.hi, 16)}; }
// Per lane, of signed words: the product of the lower ones plus that of the upper ones.
ER_INLINE I i_dot_words(I a, I b) {
    return {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)};
}
ER_INLINE I i_or(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
ER_INLINE I i_high_nibbles(I a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 4), mask),
            _mm256_and_si256(_mm256_srli_epi16(a.hi, 4), mask)};
}
// Sixteen bytes in every quarter, and the bytes of such a table at places 0 to 15.
ER_INLINE I i_bcast16(const std::uint8_t *p) {
    const __m256i all =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return {all, all};
}
ER_INLINE I i_lookup(I table, I places) {
    return {_mm256_shuffle_epi8(table.lo, places.lo), _mm256_shuffle_epi8(table.hi, places.hi)};
}
// Adds `value` to the bytes whose bit of the 64 at p is set.
ER_INLINE __m256i add_bits(__m256i a, const std::uint8_t *p, std::uint8_t value) {
    std::int32_t bits;
    std::memcpy(&bits, p, 4);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);  // byte i of the bits, eight times
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    const __m256i here = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
    return _mm256_add_epi8(a, _mm256_and_si256(_mm256_cmpeq_epi8(here, bit),
                                               _mm256_set1_epi8(static_cast<char>(value))));
}
ER_INLINE I i_add_bits(I a, const std::uint8_t *p, std::uint8_t value) {
    return {add_bits(a.lo, p, value), add_bits(a.hi, p + 4, value)};
}
// Four activation bytes in every lane.
ER_INLINE I i_bcast4(const std::int8_t *p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return i_set(four);
}
// acc + sum over 4 of (unsigned w)(signed a), a in [-127, 127]. vpmaddubsw saturates at 16 bits, so
// dot_small needs w < 128 (2 * 127 * 127 < 2^15), and dot8 takes any w but multiplies w - 128: its
// magnitude is at most 128 (2 * 128 * 127 < 2^15), its sign goes to the activations.
ER_INLINE __m256i dot_small(__m256i acc, __m256i w, __m256i a) {
    const __m256i pairs = _mm256_maddubs_epi16(w, a);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
ER_INLINE __m256i dot8(__m256i acc, __m256i w, __m256i a) {
    const __m256i value = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return dot_small(acc, _mm256_abs_epi8(value), _mm256_sign_epi8(a, value));
}
ER_INLINE I i_dot_small(I acc, I w, I a) {
    return {dot_small(acc.lo, w.lo, a.lo), dot_small(acc.hi, w.hi, a.hi)};
}
ER_INLINE I i_dot8(I acc, I w, I a) {
    return {dot8(acc.lo, w.lo, a.lo), dot8(acc.hi, w.hi, a.hi)};
}
ER_INLINE F f_of_i(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Of sixteen floats those at places 0 to 15.
ER_INLINE __m256 lookup8(F table, __m256i places) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));  // by their bit 3
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, places),
                            _mm256_permutevar8x32_ps(table.hi, places), upper);
}
ER_INLINE F f_lookup(const float *table, I places) {
    const F all = f_load(table);
    return {lookup8(all, places.lo), lookup8(all, places.hi)};
}
ER_INLINE __m128i load8_bytes(const void *p) {
    return _mm_loadl_epi64(static_cast<const __m128i *>(p));
}
ER_INLINE F f_load_u8(const std::uint8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8_bytes(p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8_bytes(p + 8)))};
}
ER_INLINE F f_load_s8(const std::int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8_bytes(p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8_bytes(p + 8)))};
}
// Round 16 floats in [-127, 127] to nearest even int8.
ER_INLINE void i_store_int8(std::int8_t *p, F x) {
    const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
    const __m128i words_lo =
        _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
    const __m128i words_hi =
        _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(words_lo, words_hi));
}
// One number in every lane, from memory.
ER_INLINE I i_bcast(const std::int32_t *p) { return i_set(*p); }
ER_INLINE I i_xor_all(I a, const std::int32_t *p) {
    const __m256i all = _mm256_set1_epi32(*p);
    return {_mm256_xor_si256(a.lo, all), _mm256_xor_si256(a.hi, all)};
}
#include "lanes.inl"
// Byte `byte` of every lane, unsigned, as int32.
template <int byte>
ER_INLINE I i_byte(I a) {
    const __m256i mask = _mm256_set1_epi32(0xff);
    return {_mm256_and_si256(_mm256_srli_epi32(a.lo, 8 * byte), mask),
            _mm256_and_si256(_mm256_srli_epi32(a.hi, 8 * byte), mask)};
}
// Nibble `nibble` of every lane, the lowest first, as int32.
template <int nibble>
ER_INLINE I nibble_of(I a) {
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_and_si256(_mm256_srli_epi32(a.lo, 4 * nibble), mask),
            _mm256_and_si256(_mm256_srli_epi32(a.hi, 4 * nibble), mask)};
}
// Pairs of codes of 4 bits, as c_dot multiplies them: nibble n, 0 to 3, of the low and of the high
// word of every lane. c_dot: acc + even code * a[2i] + odd code * a[2i+1], a of p_bcast.
struct C {
    F even, odd;
};
template <int n>
ER_INLINE C c_pair(I a) {
    return {f_of_i(nibble_of<n>(a)), f_of_i(nibble_of<n + 4>(a))};
}
ER_INLINE F c_dot(F acc, C codes, P a) {
    return f_fma(codes.odd, f_odd(a), f_fma(codes.even, f_even(a), acc));
}
ER_INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
ER_INLINE void prefetch_far(const void *p) {  // into the L2
    _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1);
}

}  // namespace avx2
}  // namespace engineroom
