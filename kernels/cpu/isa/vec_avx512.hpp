// Sixteen lanes on AVX-512 (F, BW, VL, DQ, VNNI, BF16). The interface is that of vec_generic.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define ER_INLINE static inline __attribute__((always_inline))

#include "../e4m3.hpp"

namespace engineroom {
namespace avx512 {

using F = __m512;   // 16 fp32
using I = __m512i;  // 64 bytes: 16 int32, or 16 groups of 4 bytes
using P = __m512i;  // 16 pairs of bf16

constexpr int kBias8 = 0;       // dot8 multiplies the unsigned bytes as they are
constexpr int kVectors = 3;     // of a weight tile's three, what a register tile holds
constexpr int kInt8Rows = 4;    // rows of a register tile, by form
constexpr int kBF16Rows = 8;
constexpr int kF32Rows = 8;

// ------------------------------------------------------------------------------------- fp32

ER_INLINE F f_zero() { return _mm512_setzero_ps(); }
ER_INLINE F f_set(float x) { return _mm512_set1_ps(x); }
ER_INLINE F f_load(const float *p) { return _mm512_loadu_ps(p); }
ER_INLINE void f_store(float *p, F x) { _mm512_storeu_ps(p, x); }
ER_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
ER_INLINE F f_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
ER_INLINE void f_store_n(float *p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
ER_INLINE F f_add(F a, F b) { return _mm512_add_ps(a, b); }
ER_INLINE F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
ER_INLINE F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
ER_INLINE F f_div(F a, F b) { return _mm512_div_ps(a, b); }
ER_INLINE F f_max(F a, F b) { return _mm512_max_ps(a, b); }
ER_INLINE F f_min(F a, F b) { return _mm512_min_ps(a, b); }
ER_INLINE F f_abs(F a) { return _mm512_abs_ps(a); }
ER_INLINE F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
ER_INLINE F f_fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
ER_INLINE F f_round(F a) { return _mm512_roundscale_ps(a, 8); }          // to nearest even
// x 2^n for whole n >= -126; 0 for smaller n.
ER_INLINE F f_scale2(F x, F n) {
    const __mmask16 normal = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, x, n);
}
ER_INLINE float f_sum(F a) { return _mm512_reduce_add_ps(a); }
ER_INLINE float f_max_all(F a) { return _mm512_reduce_max_ps(a); }
// Lanes from..to-1 of x, the others `fill`.
ER_INLINE F f_keep(F x, int from, int to, F fill) {
    const unsigned upper = to >= 16 ? 0xffffu : to <= 0 ? 0u : (1u << to) - 1u;
    const unsigned lower = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1u;
    return _mm512_mask_mov_ps(fill, static_cast<__mmask16>(upper & ~lower), x);
}

// --------------------------------------------------------------------------- 16-bit floats

ER_INLINE F f_load_f16(const std::uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
ER_INLINE F f_load_f16_n(const std::uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
ER_INLINE void f_store_f16(std::uint16_t *p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, 0));
}
ER_INLINE void f_store_f16_n(std::uint16_t *p, F x, int n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, 0));
}
ER_INLINE F f_of_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
// To nearest even; NaN stays NaN. vcvtneps2bf16 flushes subnormals: these are rounded as integers.
ER_INLINE __m256i bf16_of_f(F x) {
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, 0x20) == 0, 1))
        return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
ER_INLINE F f_load_bf16(const std::uint16_t *p) {
    return f_of_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
ER_INLINE F f_load_bf16_n(const std::uint16_t *p, int n) {
    return f_of_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
ER_INLINE void f_store_bf16(std::uint16_t *p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), bf16_of_f(x));
}
// The same where no lane is subnormal.
ER_INLINE void f_store_bf16_normal(std::uint16_t *p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
ER_INLINE void f_store_bf16_n(std::uint16_t *p, F x, int n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), bf16_of_f(x));
}

// Pairs of bf16. p_dot: acc + a[2i] b[2i] + a[2i+1] b[2i+1] per lane, two products and two sums in
// an order of the unit's own. p_bcast: one pair in every lane.
ER_INLINE P p_load(const std::uint16_t *p) { return _mm512_loadu_si512(p); }
ER_INLINE P p_load_n(const std::uint16_t *p, int pairs) {
    return _mm512_maskz_loadu_epi32(first_lanes(pairs), p);
}
ER_INLINE P p_bcast(const std::uint16_t *p) {
    std::int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
ER_INLINE F p_dot(F acc, P a, P b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Numbers of E4M3, in pairs as p_load's, times 2^-8: bf16_of_e4m3.
ER_INLINE P p_of_e4m3(__m256i codes) {
    alignas(64) static const std::uint16_t tiny[32] = {0,      0x3700, 0x3780, 0x37c0,
                                                       0x3800, 0x3820, 0x3840, 0x3860};
    const __m512i words = _mm512_cvtepi8_epi16(codes);  // the signs stay in place
    const __mmask32 is_tiny = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    const __m512i normal =
        _mm512_ternarylogic_epi32(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x7f0),
                                  _mm512_set1_epi16(0x3800), 0xea);  // a & b | c
    const __m512i size =
        _mm512_mask_permutexvar_epi16(normal, is_tiny, words, _mm512_load_si512(tiny));
    return _mm512_ternarylogic_epi32(size, words, _mm512_set1_epi16(static_cast<short>(0x8000)),
                                     0xf8);  // a | b & c
}
ER_INLINE P p_load_e4m3(const std::uint8_t *p) {
    return p_of_e4m3(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
ER_INLINE P p_load_e4m3_n(const std::uint8_t *p, int pairs) {
    return p_of_e4m3(_mm256_maskz_loadu_epi16(first_lanes(pairs), p));
}
// Pairs whose low and high bytes are bytes 0 to 7 (p_zip_low) or 8 to 15 (p_zip_high) of every
// quarter of `low` and `high`.
ER_INLINE P p_zip_low(I low, I high) { return _mm512_unpacklo_epi8(low, high); }
ER_INLINE P p_zip_high(I low, I high) { return _mm512_unpackhi_epi8(low, high); }
// Even and odd members of pairs of bf16, as fp32.
ER_INLINE F f_even(P a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
ER_INLINE F f_odd(P a) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// --------------------------------------------------------------------------------- integers

ER_INLINE I i_zero() { return _mm512_setzero_si512(); }
ER_INLINE I i_set(std::int32_t x) { return _mm512_set1_epi32(x); }
ER_INLINE I i_set_bytes(std::uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
ER_INLINE I i_load(const void *p) { return _mm512_loadu_si512(p); }
// The first n groups of four bytes, zeros behind them.
ER_INLINE I i_load_n(const void *p, int n) {
    return _mm512_maskz_loadu_epi32(first_lanes(n), p);
}
ER_INLINE void i_store(void *p, I x) { _mm512_storeu_si512(p, x); }
ER_INLINE I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
ER_INLINE F f_of_bits(I a) { return _mm512_castsi512_ps(a); }
ER_INLINE I bits_of_f(F a) { return _mm512_castps_si512(a); }
ER_INLINE I i_and(I a, I b) { return _mm512_and_si512(a, b); }
ER_INLINE I i_shift16(I a) { return _mm512_slli_epi32(a, 16); }
// Per lane, of signed words: the product of the lower ones plus that of the upper ones.
ER_INLINE I i_dot_words(I a, I b) { return _mm512_madd_epi16(a, b); }
ER_INLINE I i_or(I a, I b) { return _mm512_or_si512(a, b); }
ER_INLINE I i_high_nibbles(I a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}
// Sixteen bytes in every quarter, and the bytes of such a table at places 0 to 15.
ER_INLINE I i_bcast16(const std::uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
ER_INLINE I i_lookup(I table, I places) { return _mm512_shuffle_epi8(table, places); }
// Adds `value` to the bytes whose bit of the 64 at p is set.
ER_INLINE I i_add_bits(I a, const std::uint8_t *p, std::uint8_t value) {
    std::uint64_t bits;
    std::memcpy(&bits, p, 8);
    return _mm512_mask_add_epi8(a, bits, a, _mm512_set1_epi8(static_cast<char>(value)));
}
// Four activation bytes in every lane.
ER_INLINE I i_bcast4(const std::int8_t *p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
// acc + sum over 4 of (unsigned w)(signed a). Inline assembly: from intrinsics GCC 12 merges equal
// accumulators and then spills the register tile. dot_small needs w < 128, dot8 takes any w.
ER_INLINE I i_dot_small(I acc, I w, I a) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
    return acc;
}
ER_INLINE I i_dot8(I acc, I w, I a) { return i_dot_small(acc, w, a); }
ER_INLINE F f_of_i(I a) { return _mm512_cvtepi32_ps(a); }
// Of sixteen floats those at places 0 to 15.
ER_INLINE F f_lookup(const float *table, I places) {
    return _mm512_permutexvar_ps(places, f_load(table));
}
ER_INLINE F f_load_u8(const std::uint8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
ER_INLINE F f_load_s8(const std::int8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
// Round 16 floats in [-127, 127] to int8.
ER_INLINE void i_store_int8(std::int8_t *p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
// One number in every lane, from memory. Inline assembly, volatile, for the same reason as the dot
// product: equal starting values of several accumulators stay several registers.
ER_INLINE I i_bcast(const std::int32_t *p) {
    I x;
    __asm__ volatile("vpbroadcastd %1, %0" : "=v"(x) : "m"(*p));
    return x;
}
// Inline assembly: GCC would keep the number in a register that is needed.
ER_INLINE I i_xor_all(I a, const std::int32_t *p) {
    __asm__("vpxord %1%{1to16%}, %0, %0" : "+v"(a) : "m"(*p));
    return a;
}
// Sums of products begin at kBegin, whose bits as a float are those of 1.5 * 2^23: below 2^22 of
// either sign they add to its significand, so that one exact subtraction makes a float of a sum and
// adds what it should have begun at. Copies between registers cost nothing; loading twelve beginnings
// for every group costs the loop 4%.
constexpr std::int32_t kBegin = 0x4b400000;
static const std::int32_t beginning = kBegin;
ER_INLINE std::int32_t start_of(std::int32_t x) { return kBegin - x; }
ER_INLINE I i_begin(const std::int32_t *) { return i_bcast(&beginning); }
ER_INLINE I i_begin_like(I one, const std::int32_t *) {
    I x;
    __asm__ volatile("vmovdqa64 %1, %0" : "=v"(x) : "v"(one));
    return x;
}
ER_INLINE F f_of_sum(I sum, const std::int32_t *start) {
    F x;  // inline assembly: GCC would keep what is subtracted in registers that are needed
    __asm__("vsubps %2%{1to16%}, %1, %0" : "=v"(x) : "v"(sum), "m"(*start));
    return x;
}
// Lane i: the largest number of x[i]. Every step halves the vectors: two in one, of half their lanes.
ER_INLINE F halved_quarters(F a, F b) {  // lanes of a in the lower half, of b in the upper
    return _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
ER_INLINE F halved_pairs(F a, F b) {  // of a in the first half of every quarter
    return _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
ER_INLINE F f_max_each(const F (&x)[16]) {
    F eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) eight[i] = halved_quarters(x[i], x[i + 8]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        four[i] = _mm512_max_ps(_mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88),
                                _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xdd));
    two[0] = halved_pairs(four[0], four[2]);
    two[1] = halved_pairs(four[1], four[3]);
    const F most = _mm512_max_ps(_mm512_shuffle_ps(two[0], two[1], 0x88),
                                 _mm512_shuffle_ps(two[0], two[1], 0xdd));
    // Lanes are now x[0, 2, 1, 3], and the same 8, 4 and 12 further.
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), most);
}
// Lane 4 i + j: the sum of lanes 4 j to 4 j + 3 of x[i].
ER_INLINE I i_sum_fours(const I (&x)[4]) {
    const I a = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const I b = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    const I sums = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    return _mm512_permutexvar_epi32(  // lane 4 j + i is x[i]'s j-th
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}
// Byte `byte` of every lane, unsigned, as int32.
template <int byte>
ER_INLINE I i_byte(I a) {
    return _mm512_and_si512(_mm512_srli_epi32(a, 8 * byte), _mm512_set1_epi32(0xff));
}
// Pairs of codes of 4 bits, as c_dot multiplies them: nibble n, 0 to 3, of the low and of the high
// word of every lane. c_dot: as p_dot. A permutation reads 5 bits of its word: bit 4 chooses between
// equal halves of the table.
using C = P;  // in bf16, which has every code
template <int n>
ER_INLINE C c_pair(I a) {
    alignas(64) static const std::uint16_t codes[32] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    };
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4 * n), _mm512_load_si512(codes));
}
ER_INLINE F c_dot(F acc, C codes, P a) { return p_dot(acc, codes, a); }
ER_INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
ER_INLINE void prefetch_far(const void *p) {  // into the L2
    _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1);
}

}  // namespace avx512
}  // namespace engineroom
