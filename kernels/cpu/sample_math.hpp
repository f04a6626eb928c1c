// The elementary functions of kernels/sampling.py, bit for bit; they bear the names used there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "versions.hpp"

namespace engineroom {
namespace sampling {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kWeightOne = 0x1p40f;

constexpr float kExpZeroBelow = -87.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.1219444005469057e-4f;
constexpr std::int32_t kSqrtHalfBits = 0x3F3504F3;
constexpr float kExpPoly[] = {0.4999999403953552f, 0.1666652113199234f, 0.04166838899254799f,
                              0.008368710055947304f, 0.0013814610429108143f};
constexpr float kLogPoly[] = {0.3333331346511841f,   -0.25000008940696716f, 0.2000211924314499f,
                              -0.1666799634695053f,  0.14219550788402557f,  -0.12405591458082199f,
                              0.11888174712657928f,  -0.11675640940666199f, 0.06746601313352585f};

ER_INLINE float float_of_bits(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ER_INLINE std::int32_t bits_of_float(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// By bits: of a conditional GCC makes a branch around the work, and then no vector loop.
ER_INLINE float select(bool condition, float yes, float no) {
    const std::int32_t mask = -static_cast<std::int32_t>(condition);
    return float_of_bits((bits_of_float(yes) & mask) | (bits_of_float(no) & ~mask));
}

// Integers in the order of floats, -0 and 0 equal, every NaN outside [-inf, inf].
ER_INLINE std::int32_t ordered(float value) {
    const std::int32_t bits = bits_of_float(value + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

constexpr std::uint32_t kSignBit = 0x80000000u;

ER_INLINE std::uint32_t key_of(float score) {
    return static_cast<std::uint32_t>(ordered(score)) ^ kSignBit;
}

// To the nearest even integer, for |x| < 2^22: where the float's last bit is worth 1.
ER_INLINE float rint_f32(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// The same for 0 <= x <= 2^40, into an integer: the last bit of a double near 2^52 is worth 1.
ER_INLINE std::int64_t rint_i64(float x) {
    const double shifted = static_cast<double>(x) + 0x1.8p52;
    std::int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4338000000000000;
}

template <std::size_t N>
ER_INLINE float horner(const float (&poly)[N], float x) {
    float y = poly[N - 2] + poly[N - 1] * x;
    for (int i = static_cast<int>(N) - 3; i >= 0; --i) y = y * x + poly[i];
    return y;
}

ER_INLINE float exp_f32(float x) {
    const float clamped = select(x > kExpZeroBelow, x, kExpZeroBelow);
    const float n = rint_f32(clamped * kLog2E);
    const float r = (clamped - n * kLn2Hi) - n * kLn2Lo;
    float y = (r * r) * horner(kExpPoly, r);
    y = (y + r) + 1.0f;
    const float power = float_of_bits((static_cast<std::int32_t>(n) + 127) * (1 << 23));  // 2^n
    return select(x < kExpZeroBelow, 0.0f, y * power);
}

struct Reduced {
    float k, m;
};

ER_INLINE Reduced reduce(float x) {
    const std::int32_t bits = bits_of_float(x);
    const std::int32_t k = (bits - kSqrtHalfBits) >> 23;
    return {static_cast<float>(k), float_of_bits(bits - k * (1 << 23))};
}

ER_INLINE float log_reduced(float k, float f) {
    const float square = f * f;
    float y = (f * square) * horner(kLogPoly, f);
    y = y + k * kLn2Lo;
    y = y - 0.5f * square;
    return (f + y) + k * kLn2Hi;
}

ER_INLINE float log_f32(float x) {
    const Reduced reduced = reduce(x);
    return log_reduced(reduced.k, reduced.m - 1.0f);
}

ER_INLINE float exponential_f32(float u) {
    const Reduced reduced = reduce(1.0f - u);
    return -log_reduced(reduced.k, select(u < 0.25f, -u, reduced.m - 1.0f));
}

ER_INLINE float gumbel_f32(float u) { return -log_f32(exponential_f32(u)); }

ER_INLINE std::int64_t weight_of(float z) { return rint_i64(exp_f32(z) * kWeightOne); }

}  // namespace sampling
}  // namespace engineroom
