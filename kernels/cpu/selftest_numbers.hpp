// Numbers as the self-test knows them: roundings and activation functions in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dequant.hpp"
#include "selftest.hpp"

namespace engineroom {
namespace selftest {

// The nearest number with `digits` significant bits and exponents from `lowest` (of the last bit)
// on, ties to even; beyond `largest`, infinity. Double precision holds every step exactly.
inline double rounded(double x, int digits, int lowest, double largest) {
    if (std::isnan(x) || std::isinf(x) || x == 0) return x;
    int exponent;
    std::frexp(x, &exponent);
    const int last = std::max(exponent - digits, lowest);
    const double y = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
    return std::fabs(y) > largest ? std::copysign(kInfinity, x) : y;
}
inline double rounded(double x, Dtype dtype) {
    if (dtype == Dtype::kBF16) return rounded(x, 8, -133, 0x1.fep127);
    if (dtype == Dtype::kF16) return rounded(x, 11, -24, 65504.0);
    return x;
}

inline std::uint16_t bf16_bits(float x) {  // of a value that is one
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>(bits >> 16);
}
inline float bf16_value(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline std::uint16_t f16_bits(float x) {  // of a normal value that is one
    int exponent;
    const double mantissa = std::frexp(std::fabs(static_cast<double>(x)), &exponent);
    if (x == 0) return 0;
    const int fraction = static_cast<int>(std::ldexp(mantissa, 11)) - 1024;
    return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | fraction);
}
inline float f16_value(std::uint16_t x) {
    float value;
    find_dequant_format("F16")->run(reinterpret_cast<const std::uint8_t *>(&x), &value, 1);
    return value;
}

inline const char *name_of(Dtype dtype) {
    const char *const names[] = {"f32", "bf16", "f16", "int8", "int4", "fp8"};
    return names[static_cast<int>(dtype)];
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }
inline double clamped_silu(double x) {
    x = x > 7 ? 7 : x;
    return x / (1 + std::exp(-static_cast<double>(1.702f) * x));
}
inline double clamped_up(double x) { return (x > 7 ? 7 : x < -7 ? -7 : x) + 1; }
inline double gelu(double x) {
    const double u = std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
    return x / (1 + std::exp(-2 * u));
}

}  // namespace selftest
}  // namespace engineroom
