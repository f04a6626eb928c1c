// Sixteen lanes in C++ that any GCC or Clang vectorises: the fallback, and the oracle of the others.
//
// This is the interface that isa/*.inl are written over. F: 16 fp32. I: 64 bytes, 16 int32 or 16
// groups of 4 bytes. P: 16 pairs of bf16. A multiply-add here rounds twice; where a unit has a fused
// one it rounds once, so units differ in last bits and each is deterministic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ER_INLINE static inline __attribute__((always_inline))

#include "../e4m3.hpp"

namespace engineroom {
namespace generic {

typedef float F __attribute__((vector_size(64)));
typedef std::int32_t I __attribute__((vector_size(64)));
typedef std::int8_t Bytes __attribute__((vector_size(64)));
typedef std::int32_t P __attribute__((vector_size(64)));

constexpr int kBias8 = 0;       // what dot8 subtracts from the unsigned bytes by itself: 0 or 128
constexpr int kVectors = 1;     // of a weight tile's three, what a register tile holds
constexpr int kInt8Rows = 1;    // rows of a register tile, by form
constexpr int kBF16Rows = 2;
constexpr int kF32Rows = 2;

// ------------------------------------------------------------------------------------- fp32

ER_INLINE F f_zero() { return F{}; }
ER_INLINE F f_set(float x) { return F{} + x; }
ER_INLINE F f_load(const float *p) {
    F x;
    std::memcpy(&x, p, 64);
    return x;
}
ER_INLINE void f_store(float *p, F x) { std::memcpy(p, &x, 64); }
// The first n lanes, 0 <= n <= 16; zeros behind them.
ER_INLINE F f_load_n(const float *p, int n) {
    F x = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
ER_INLINE void f_store_n(float *p, F x, int n) {
    for (int i = 0; i < n; ++i) p[i] = x[i];
}
ER_INLINE F f_add(F a, F b) { return a + b; }
ER_INLINE F f_sub(F a, F b) { return a - b; }
ER_INLINE F f_mul(F a, F b) { return a * b; }
ER_INLINE F f_div(F a, F b) { return a / b; }
ER_INLINE F f_max(F a, F b) { return a > b ? a : b; }  // b where one is NaN
ER_INLINE F f_min(F a, F b) { return a < b ? a : b; }
ER_INLINE F f_abs(F a) { return reinterpret_cast<F>(reinterpret_cast<I>(a) & 0x7fffffff); }
ER_INLINE F f_fma(F a, F b, F c) { return a * b + c; }   // a b + c
ER_INLINE F f_fnma(F a, F b, F c) { return c - a * b; }  // c - a b
// To nearest even, |a| < 2^22: what is added pushes the fraction out.
ER_INLINE F f_round(F a) { return (a + 12582912.0f) - 12582912.0f; }
// x 2^n for whole n; results below the normal range become 0.
ER_INLINE F f_scale2(F x, F n) {
    const F m = f_max(f_min(n, f_set(127.0f)), f_set(-127.0f));
    const I power = (__builtin_convertvector(m, I) + 127) << 23;  // 2^n; 0 at n = -127
    return x * reinterpret_cast<F>(power);
}
// Over all lanes, halving: lane i with i + 8, then i + 4, i + 2, i + 1.
ER_INLINE float f_sum(F a) {
    float x[16];
    f_store(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
ER_INLINE float f_max_all(F a) {
    float most = a[0];
    for (int i = 1; i < 16; ++i) most = a[i] > most ? a[i] : most;
    return most;
}
// Lanes from..to-1 of x, the others `fill`; any int for from and to.
ER_INLINE F f_keep(F x, int from, int to, F fill) {
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return ((lane >= from) & (lane < to)) ? x : fill;
}

// --------------------------------------------------------------------------- 16-bit floats

ER_INLINE float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
ER_INLINE std::uint32_t bits_of_float(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
ER_INLINE float float_of_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000u | (magnitude << 13));
    const float value = magnitude < 0x400
                            ? static_cast<float>(magnitude) * 0x1p-24f
                            : float_of_bits((magnitude << 13) + (112u << 23));
    return float_of_bits(bits_of_float(value) | sign);
}
// To nearest even; beyond the range infinity; NaN stays NaN.
ER_INLINE std::uint16_t half_of_float(float x) {
    const std::uint32_t bits = bits_of_float(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 rounds at 2^-24
        const float shifted = float_of_bits(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
    }
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<std::uint16_t>(
        sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}
ER_INLINE std::uint16_t bf16_of_float(float x) {
    const std::uint32_t bits = bits_of_float(x);
    if (x != x) return static_cast<std::uint16_t>((bits | 0x400000u) >> 16);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ER_INLINE F f_load_f16_n(const std::uint16_t *p, int n) {
    F x = {};
    for (int i = 0; i < n; ++i) x[i] = float_of_half(p[i]);
    return x;
}
ER_INLINE F f_load_f16(const std::uint16_t *p) { return f_load_f16_n(p, 16); }
ER_INLINE void f_store_f16_n(std::uint16_t *p, F x, int n) {
    for (int i = 0; i < n; ++i) p[i] = half_of_float(x[i]);
}
ER_INLINE void f_store_f16(std::uint16_t *p, F x) { f_store_f16_n(p, x, 16); }
ER_INLINE F f_load_bf16_n(const std::uint16_t *p, int n) {
    F x = {};
    for (int i = 0; i < n; ++i) x[i] = float_of_bits(static_cast<std::uint32_t>(p[i]) << 16);
    return x;
}
ER_INLINE F f_load_bf16(const std::uint16_t *p) { return f_load_bf16_n(p, 16); }
ER_INLINE void f_store_bf16_n(std::uint16_t *p, F x, int n) {
    for (int i = 0; i < n; ++i) p[i] = bf16_of_float(x[i]);
}
ER_INLINE void f_store_bf16(std::uint16_t *p, F x) { f_store_bf16_n(p, x, 16); }
// The same where no lane is subnormal.
ER_INLINE void f_store_bf16_normal(std::uint16_t *p, F x) {
    f_store_bf16(p, x);
}

// Pairs of bf16. p_dot: acc + a[2i] b[2i] + a[2i+1] b[2i+1] per lane, two products and two sums in
// an order of the unit's own. p_bcast: one pair in every lane. p_load_n: pairs behind n are zeros.
ER_INLINE P p_load(const std::uint16_t *p) {
    P x;
    std::memcpy(&x, p, 64);
    return x;
}
ER_INLINE P p_load_n(const std::uint16_t *p, int pairs) {
    P x = {};
    std::memcpy(&x, p, static_cast<std::size_t>(pairs) * 4);
    return x;
}
ER_INLINE P p_bcast(const std::uint16_t *p) {
    std::int32_t pair;
    std::memcpy(&pair, p, 4);
    return P{} + pair;
}
ER_INLINE F p_dot(F acc, P a, P b) {
    const P high = P{} + static_cast<std::int32_t>(0xffff0000u);
    acc = reinterpret_cast<F>(a << 16) * reinterpret_cast<F>(b << 16) + acc;
    return reinterpret_cast<F>(a & high) * reinterpret_cast<F>(b & high) + acc;
}
// Even and odd members of pairs of bf16, as fp32.
ER_INLINE F f_even(P a) { return reinterpret_cast<F>(a << 16); }
ER_INLINE F f_odd(P a) {
    return reinterpret_cast<F>(a & (P{} + static_cast<std::int32_t>(0xffff0000u)));
}

// Pairs whose low and high bytes are bytes 0 to 7 (p_zip_low) or 8 to 15 (p_zip_high) of every
// quarter of `low` and `high`.
template <int kFirst>
static inline P zipped(I low, I high) {
    std::uint8_t a[64], b[64], x[64];
    std::memcpy(a, &low, 64);
    std::memcpy(b, &high, 64);
    for (int i = 0; i < 32; ++i) {
        const int from = i / 8 * 16 + kFirst + i % 8;
        x[2 * i] = a[from];
        x[2 * i + 1] = b[from];
    }
    P pairs;
    std::memcpy(&pairs, x, 64);
    return pairs;
}
ER_INLINE P p_zip_low(I low, I high) { return zipped<0>(low, high); }
ER_INLINE P p_zip_high(I low, I high) { return zipped<8>(low, high); }

// --------------------------------------------------------------------------------- integers

ER_INLINE I i_zero() { return I{}; }
ER_INLINE I i_set(std::int32_t x) { return I{} + x; }
ER_INLINE I i_set_bytes(std::uint8_t x) {
    return reinterpret_cast<I>(Bytes{} + static_cast<std::int8_t>(x));
}
ER_INLINE I i_load(const void *p) {
    I x;
    std::memcpy(&x, p, 64);
    return x;
}
// The first n groups of four bytes, zeros behind them.
ER_INLINE I i_load_n(const void *p, int n) {
    I x = {};
    std::memcpy(&x, p, static_cast<std::size_t>(n) * 4);
    return x;
}
ER_INLINE void i_store(void *p, I x) { std::memcpy(p, &x, 64); }
ER_INLINE I i_add(I a, I b) { return a + b; }
ER_INLINE F f_of_bits(I a) { return reinterpret_cast<F>(a); }
ER_INLINE I bits_of_f(F a) { return reinterpret_cast<I>(a); }
ER_INLINE I i_and(I a, I b) { return a & b; }
ER_INLINE I i_shift16(I a) { return a << 16; }
// Per lane, of signed words: the product of the lower ones plus that of the upper ones.
ER_INLINE I i_dot_words(I a, I b) {
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
ER_INLINE I i_or(I a, I b) { return a | b; }
ER_INLINE I i_high_nibbles(I a) { return (a >> 4) & i_set_bytes(15); }
// Sixteen bytes in every quarter, and the bytes of such a table at places 0 to 15.
ER_INLINE I i_bcast16(const std::uint8_t *p) {
    I x;
    for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char *>(&x) + 16 * i, p, 16);
    return x;
}
ER_INLINE I i_lookup(I table, I places) {
    std::uint8_t from[64], at[64];
    std::memcpy(from, &table, 64);
    std::memcpy(at, &places, 64);
    for (int i = 0; i < 64; ++i) at[i] = from[at[i]];
    std::memcpy(&places, at, 64);
    return places;
}
// Adds `value` to the bytes whose bit of the 64 at p is set.
ER_INLINE I i_add_bits(I a, const std::uint8_t *p, std::uint8_t value) {
    std::uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = (p[i / 8] >> (i % 8)) & 1 ? value : 0;
    return reinterpret_cast<I>(reinterpret_cast<Bytes>(a) + reinterpret_cast<Bytes>(i_load(bytes)));
}
// Four activation bytes in every lane.
ER_INLINE I i_bcast4(const std::int8_t *p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return I{} + four;
}
// acc + sum over 4 of (unsigned w)(signed a). dot_small needs w < 128, dot8 takes any w, and where
// kBias8 is 128 it multiplies w - 128.
ER_INLINE I i_dot8(I acc, I w, I a) {
    for (int byte = 0; byte < 4; ++byte)
        acc += ((w >> (8 * byte)) & 0xff) * ((a << (24 - 8 * byte)) >> 24);
    return acc;
}
ER_INLINE I i_dot_small(I acc, I w, I a) { return i_dot8(acc, w, a); }
ER_INLINE F f_of_i(I a) { return __builtin_convertvector(a, F); }
// Of sixteen floats those at places 0 to 15.
ER_INLINE F f_lookup(const float *table, I places) {
    F x;
    for (int i = 0; i < 16; ++i) x[i] = table[places[i]];
    return x;
}
ER_INLINE F f_load_u8(const std::uint8_t *p) {
    F x;
    for (int i = 0; i < 16; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
ER_INLINE F f_load_s8(const std::int8_t *p) {
    F x;
    for (int i = 0; i < 16; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
// Round 16 floats in [-127, 127] to nearest even int8.
ER_INLINE void i_store_int8(std::int8_t *p, F x) {
    const F whole = f_round(x);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(whole[i]);
}
// One number in every lane, from memory.
ER_INLINE I i_bcast(const std::int32_t *p) { return I{} + *p; }
ER_INLINE I i_xor_all(I a, const std::int32_t *p) { return a ^ *p; }
#include "lanes.inl"
// Byte `byte` of every lane, unsigned, as int32.
template <int byte>
ER_INLINE I i_byte(I a) {
    return (a >> (8 * byte)) & 0xff;
}
// Nibble `nibble` of every lane, the lowest first, as int32.
template <int nibble>
ER_INLINE I nibble_of(I a) {
    return (a >> (4 * nibble)) & 15;
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

}  // namespace generic
}  // namespace engineroom
