// Sixteen lanes on NEON with dot products: four registers. Interface: that of vec_generic.hpp.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define ER_INLINE static inline __attribute__((always_inline))

#include "../e4m3.hpp"

namespace engineroom {
namespace neon {

// Structures of four, not arrays: GCC keeps their members in registers.
struct F {  // 16 fp32
    float32x4_t a, b, c, d;
};
struct I {  // 64 bytes: 16 int32, or 16 groups of 4 bytes
    int32x4_t a, b, c, d;
};
using P = I;  // 16 pairs of bf16

constexpr int kBias8 = 128;     // both operands of sdot are signed: dot8 multiplies w - 128
constexpr int kVectors = 1;     // of a weight tile's three, what a register tile holds
// Rows of a register tile, by form: four accumulators a row, of 32 registers.
constexpr int kInt8Rows = 4;
constexpr int kBF16Rows = 4;
constexpr int kF32Rows = 5;

#define ER_MAP1(T, f, x) (T{f(x.a), f(x.b), f(x.c), f(x.d)})
#define ER_MAP2(T, f, x, y) (T{f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)})

// ------------------------------------------------------------------------------------- fp32

ER_INLINE F f_spread(float32x4_t x) { return F{x, x, x, x}; }
ER_INLINE F f_set(float x) { return f_spread(vdupq_n_f32(x)); }
ER_INLINE F f_zero() { return f_set(0.0f); }
ER_INLINE F f_load(const float *p) {
    return F{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
ER_INLINE void f_store(float *p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
// The first n lanes, 0 <= n <= 16; zeros behind them. Memory behind them is not touched.
ER_INLINE F f_load_n(const float *p, int n) {
    float x[16] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return f_load(x);
}
ER_INLINE void f_store_n(float *p, F x, int n) {
    float y[16];
    f_store(y, x);
    for (int i = 0; i < n; ++i) p[i] = y[i];
}
ER_INLINE F f_add(F x, F y) { return ER_MAP2(F, vaddq_f32, x, y); }
ER_INLINE F f_sub(F x, F y) { return ER_MAP2(F, vsubq_f32, x, y); }
ER_INLINE F f_mul(F x, F y) { return ER_MAP2(F, vmulq_f32, x, y); }
ER_INLINE F f_div(F x, F y) { return ER_MAP2(F, vdivq_f32, x, y); }
// vmaxq and vminq would return NaN; these return y where one is NaN.
ER_INLINE float32x4_t q_greater(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
ER_INLINE float32x4_t q_lesser(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
ER_INLINE F f_max(F x, F y) { return ER_MAP2(F, q_greater, x, y); }
ER_INLINE F f_min(F x, F y) { return ER_MAP2(F, q_lesser, x, y); }
ER_INLINE F f_abs(F x) { return ER_MAP1(F, vabsq_f32, x); }
ER_INLINE F f_fma(F x, F y, F z) {  // x y + z
    return F{vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
             vfmaq_f32(z.d, x.d, y.d)};
}
ER_INLINE F f_fnma(F x, F y, F z) {  // z - x y
    return F{vfmsq_f32(z.a, x.a, y.a), vfmsq_f32(z.b, x.b, y.b), vfmsq_f32(z.c, x.c, y.c),
             vfmsq_f32(z.d, x.d, y.d)};
}
ER_INLINE F f_round(F x) { return ER_MAP1(F, vrndnq_f32, x); }  // to nearest even
// x 2^n for whole n; results below the normal range become 0.
ER_INLINE float32x4_t q_power_of_2(float32x4_t n) {
    n = q_greater(q_lesser(n, vdupq_n_f32(127.0f)), vdupq_n_f32(-127.0f));
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
ER_INLINE F f_scale2(F x, F n) { return f_mul(x, ER_MAP1(F, q_power_of_2, n)); }
// Over all lanes, halving: lane i with i + 8, then i + 4, i + 2, i + 1.
ER_INLINE float f_sum(F x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
ER_INLINE float f_max_all(F x) {
    const float32x4_t four = q_greater(q_greater(x.a, x.c), q_greater(x.b, x.d));
    return vmaxvq_f32(four);
}
ER_INLINE float32x4_t q_keep(float32x4_t x, int first, int from, int to, float32x4_t fill) {
    const std::int32_t count[4] = {0, 1, 2, 3};
    const int32x4_t lane = vaddq_s32(vld1q_s32(count), vdupq_n_s32(first));
    const uint32x4_t inside =
        vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
    return vbslq_f32(inside, x, fill);
}
// Lanes from..to-1 of x, the others `fill`; any int for from and to.
ER_INLINE F f_keep(F x, int from, int to, F fill) {
    return F{q_keep(x.a, 0, from, to, fill.a), q_keep(x.b, 4, from, to, fill.b),
             q_keep(x.c, 8, from, to, fill.c), q_keep(x.d, 12, from, to, fill.d)};
}

// --------------------------------------------------------------------------- 16-bit floats

ER_INLINE float32x4_t q_of_half(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
ER_INLINE uint16x4_t q_half_of(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
ER_INLINE float32x4_t q_of_bf16(uint16x4_t x) {
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}
// To nearest even; NaN stays NaN. Without the BF16 instructions, which not every unit with dot
// products has.
ER_INLINE uint16x4_t q_bf16_of(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
ER_INLINE F f_load_f16(const std::uint16_t *p) {
    return F{q_of_half(vld1_u16(p)), q_of_half(vld1_u16(p + 4)), q_of_half(vld1_u16(p + 8)),
             q_of_half(vld1_u16(p + 12))};
}
ER_INLINE void f_store_f16(std::uint16_t *p, F x) {
    vst1_u16(p, q_half_of(x.a));
    vst1_u16(p + 4, q_half_of(x.b));
    vst1_u16(p + 8, q_half_of(x.c));
    vst1_u16(p + 12, q_half_of(x.d));
}
ER_INLINE F f_load_bf16(const std::uint16_t *p) {
    return F{q_of_bf16(vld1_u16(p)), q_of_bf16(vld1_u16(p + 4)), q_of_bf16(vld1_u16(p + 8)),
             q_of_bf16(vld1_u16(p + 12))};
}
ER_INLINE void f_store_bf16(std::uint16_t *p, F x) {
    vst1_u16(p, q_bf16_of(x.a));
    vst1_u16(p + 4, q_bf16_of(x.b));
    vst1_u16(p + 8, q_bf16_of(x.c));
    vst1_u16(p + 12, q_bf16_of(x.d));
}
// The same where no lane is subnormal.
ER_INLINE void f_store_bf16_normal(std::uint16_t *p, F x) {
    f_store_bf16(p, x);
}
ER_INLINE F f_load_f16_n(const std::uint16_t *p, int n) {
    std::uint16_t x[16] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return f_load_f16(x);
}
ER_INLINE void f_store_f16_n(std::uint16_t *p, F x, int n) {
    std::uint16_t y[16];
    f_store_f16(y, x);
    for (int i = 0; i < n; ++i) p[i] = y[i];
}
ER_INLINE F f_load_bf16_n(const std::uint16_t *p, int n) {
    std::uint16_t x[16] = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return f_load_bf16(x);
}
ER_INLINE void f_store_bf16_n(std::uint16_t *p, F x, int n) {
    std::uint16_t y[16];
    f_store_bf16(y, x);
    for (int i = 0; i < n; ++i) p[i] = y[i];
}

// --------------------------------------------------------------------------------- integers

ER_INLINE I i_spread(int32x4_t x) { return I{x, x, x, x}; }
ER_INLINE I i_set(std::int32_t x) { return i_spread(vdupq_n_s32(x)); }
ER_INLINE I i_zero() { return i_set(0); }
ER_INLINE I i_set_bytes(std::uint8_t x) {
    return i_spread(vreinterpretq_s32_u8(vdupq_n_u8(x)));
}
ER_INLINE I i_load(const void *p) {
    const std::uint8_t *from = static_cast<const std::uint8_t *>(p);
    return I{vreinterpretq_s32_u8(vld1q_u8(from)), vreinterpretq_s32_u8(vld1q_u8(from + 16)),
             vreinterpretq_s32_u8(vld1q_u8(from + 32)), vreinterpretq_s32_u8(vld1q_u8(from + 48))};
}
// The first n groups of four bytes, zeros behind them.
ER_INLINE I i_load_n(const void *p, int n) {
    std::uint8_t x[64] = {};
    std::memcpy(x, p, static_cast<std::size_t>(n) * 4);
    return i_load(x);
}
ER_INLINE void i_store(void *p, I x) {
    std::uint8_t *to = static_cast<std::uint8_t *>(p);
    vst1q_u8(to, vreinterpretq_u8_s32(x.a));
    vst1q_u8(to + 16, vreinterpretq_u8_s32(x.b));
    vst1q_u8(to + 32, vreinterpretq_u8_s32(x.c));
    vst1q_u8(to + 48, vreinterpretq_u8_s32(x.d));
}
ER_INLINE I i_add(I x, I y) { return ER_MAP2(I, vaddq_s32, x, y); }
ER_INLINE F f_of_bits(I x) { return ER_MAP1(F, vreinterpretq_f32_s32, x); }
ER_INLINE I bits_of_f(F x) { return ER_MAP1(I, vreinterpretq_s32_f32, x); }
ER_INLINE I i_and(I x, I y) { return ER_MAP2(I, vandq_s32, x, y); }
ER_INLINE I i_or(I x, I y) { return ER_MAP2(I, vorrq_s32, x, y); }
ER_INLINE int32x4_t q_shift16(int32x4_t x) { return vshlq_n_s32(x, 16); }
ER_INLINE I i_shift16(I x) { return ER_MAP1(I, q_shift16, x); }
// Per lane, of signed words: the product of the lower ones plus that of the upper ones.
ER_INLINE int32x4_t q_dot_words(int32x4_t x, int32x4_t y) {
    const int32x4_t low = vmulq_s32(vshrq_n_s32(q_shift16(x), 16), vshrq_n_s32(q_shift16(y), 16));
    return vmlaq_s32(low, vshrq_n_s32(x, 16), vshrq_n_s32(y, 16));
}
ER_INLINE I i_dot_words(I x, I y) { return ER_MAP2(I, q_dot_words, x, y); }
ER_INLINE int32x4_t q_high_nibbles(int32x4_t x) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
}
ER_INLINE I i_high_nibbles(I x) { return ER_MAP1(I, q_high_nibbles, x); }
// Sixteen bytes in every quarter, and the bytes of such a table at places 0 to 15.
ER_INLINE I i_bcast16(const std::uint8_t *p) {
    return i_spread(vreinterpretq_s32_u8(vld1q_u8(p)));
}
ER_INLINE int32x4_t q_lookup(int32x4_t table, int32x4_t places) {
    return vreinterpretq_s32_u8(
        vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(places)));
}
ER_INLINE I i_lookup(I table, I places) { return ER_MAP2(I, q_lookup, table, places); }
// Two bytes of bits, 8 times each: adds `value` to the bytes of x whose own bit is set.
ER_INLINE int32x4_t q_add_bits(int32x4_t x, uint32x4_t bytes, uint8x16_t value) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    const uint8x16_t added = vandq_u8(vtstq_u8(vreinterpretq_u8_u32(bytes), bit), value);
    return vreinterpretq_s32_u8(vaddq_u8(vreinterpretq_u8_s32(x), added));
}
// Adds `value` to the bytes whose bit of the 64 at p is set.
ER_INLINE I i_add_bits(I x, const std::uint8_t *p, std::uint8_t value) {
    const uint8x16_t v = vdupq_n_u8(value), all = vcombine_u8(vld1_u8(p), vld1_u8(p));
    const uint16x8_t twice = vreinterpretq_u16_u8(vzip1q_u8(all, all));  // bytes 0 0 1 1 ... 7 7
    const uint32x4_t low = vreinterpretq_u32_u16(vzip1q_u16(twice, twice));
    const uint32x4_t high = vreinterpretq_u32_u16(vzip2q_u16(twice, twice));
    return I{q_add_bits(x.a, vzip1q_u32(low, low), v), q_add_bits(x.b, vzip2q_u32(low, low), v),
             q_add_bits(x.c, vzip1q_u32(high, high), v),
             q_add_bits(x.d, vzip2q_u32(high, high), v)};
}
// Four activation bytes in every lane.
ER_INLINE I i_bcast4(const std::int8_t *p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return i_set(four);
}
// One number in every lane, from memory. Inline assembly, volatile: from intrinsics GCC 12 merges
// the equal starting values of several accumulators, copies them, and spills the register tile.
ER_INLINE int32x4_t q_bcast(const std::int32_t *p) {
    int32x4_t x;
    __asm__ volatile("ld1r {%0.4s}, %1" : "=w"(x) : "Q"(*p));
    return x;
}
ER_INLINE I i_bcast(const std::int32_t *p) {
    return I{q_bcast(p), q_bcast(p), q_bcast(p), q_bcast(p)};
}
ER_INLINE I i_xor_all(I x, const std::int32_t *p) { return ER_MAP2(I, veorq_s32, x, i_set(*p)); }
// acc + sum over 4 of (w)(signed a). dot_small needs w < 128; dot8 multiplies w - 128 for any w.
// Inline assembly for the same reason: the scheduler moves the intrinsic away from its accumulator.
ER_INLINE int32x4_t q_dot(int32x4_t acc, int32x4_t w, int32x4_t a) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(a));
    return acc;
}
ER_INLINE I i_dot_small(I acc, I w, I a) {
    return I{q_dot(acc.a, w.a, a.a), q_dot(acc.b, w.b, a.b), q_dot(acc.c, w.c, a.c),
             q_dot(acc.d, w.d, a.d)};
}
ER_INLINE I i_dot8(I acc, I w, I a) {
    return i_dot_small(acc, ER_MAP2(I, veorq_s32, w, i_set_bytes(0x80)), a);
}
ER_INLINE F f_of_i(I x) { return ER_MAP1(F, vcvtq_f32_s32, x); }
// Of sixteen floats those at places 0 to 15.
ER_INLINE F f_lookup(const float *table, I places) {
    std::int32_t at[16];
    i_store(at, places);
    float x[16];
    for (int i = 0; i < 16; ++i) x[i] = table[at[i]];
    return f_load(x);
}
#include "lanes.inl"
// Byte `byte` of every lane, unsigned, as int32.
template <int byte>
ER_INLINE I i_byte(I x) {
    I y = x;
    if constexpr (byte > 0)
        y = I{vshrq_n_s32(x.a, 8 * byte), vshrq_n_s32(x.b, 8 * byte), vshrq_n_s32(x.c, 8 * byte),
              vshrq_n_s32(x.d, 8 * byte)};
    return i_and(y, i_set(0xff));
}
ER_INLINE F f_load_u8(const std::uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
    return F{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
             vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
             vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))};
}
ER_INLINE F f_load_s8(const std::int8_t *p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    return F{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))};
}
// Round 16 floats in [-127, 127] to nearest even int8.
ER_INLINE void i_store_int8(std::int8_t *p, F x) {
    const I whole = ER_MAP1(I, vcvtnq_s32_f32, x);
    const int16x8_t low = vcombine_s16(vmovn_s32(whole.a), vmovn_s32(whole.b));
    const int16x8_t high = vcombine_s16(vmovn_s32(whole.c), vmovn_s32(whole.d));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

// Pairs of bf16. p_dot: acc + a[2i] b[2i] + a[2i+1] b[2i+1] per lane, even products first, fused.
// p_bcast: one pair in every lane. p_load_n: pairs behind n are zeros.
ER_INLINE P p_load(const std::uint16_t *p) { return i_load(p); }
ER_INLINE P p_load_n(const std::uint16_t *p, int pairs) {
    return i_load_n(p, pairs);
}
ER_INLINE P p_bcast(const std::uint16_t *p) {
    std::int32_t pair;
    std::memcpy(&pair, p, 4);
    return i_set(pair);
}
// Pairs whose low and high bytes are bytes 0 to 7 (p_zip_low) or 8 to 15 (p_zip_high) of every
// quarter of `low` and `high`.
ER_INLINE int32x4_t q_zip_low(int32x4_t low, int32x4_t high) {
    return vreinterpretq_s32_u8(vzip1q_u8(vreinterpretq_u8_s32(low), vreinterpretq_u8_s32(high)));
}
ER_INLINE int32x4_t q_zip_high(int32x4_t low, int32x4_t high) {
    return vreinterpretq_s32_u8(vzip2q_u8(vreinterpretq_u8_s32(low), vreinterpretq_u8_s32(high)));
}
ER_INLINE P p_zip_low(I low, I high) { return ER_MAP2(P, q_zip_low, low, high); }
ER_INLINE P p_zip_high(I low, I high) { return ER_MAP2(P, q_zip_high, low, high); }
// Even and odd members of pairs of bf16, as fp32.
ER_INLINE float32x4_t q_even(int32x4_t x) { return vreinterpretq_f32_s32(vshlq_n_s32(x, 16)); }
ER_INLINE float32x4_t q_odd(int32x4_t x) {
    return vreinterpretq_f32_s32(vandq_s32(x, vdupq_n_s32(static_cast<int>(0xffff0000u))));
}
ER_INLINE F f_even(P x) { return ER_MAP1(F, q_even, x); }
ER_INLINE F f_odd(P x) { return ER_MAP1(F, q_odd, x); }
ER_INLINE F p_dot(F acc, P a, P b) {
    return f_fma(f_odd(a), f_odd(b), f_fma(f_even(a), f_even(b), acc));
}
// Nibble `nibble` of every lane, the lowest first, as int32.
template <int nibble>
ER_INLINE I nibble_of(I x) {
    I y = x;
    if constexpr (nibble > 0)
        y = I{vshrq_n_s32(x.a, 4 * nibble), vshrq_n_s32(x.b, 4 * nibble),
              vshrq_n_s32(x.c, 4 * nibble), vshrq_n_s32(x.d, 4 * nibble)};
    return i_and(y, i_set(15));
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
ER_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
ER_INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }  // into the L2

#undef ER_MAP1
#undef ER_MAP2

}  // namespace neon
}  // namespace engineroom
