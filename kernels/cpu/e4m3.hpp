// Numbers of one sign, 4 bits of exponent and 3 of significand (E4M3): made of fp32, and as bf16. In
// C++ that compilers vectorise; included where ER_INLINE is defined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace engineroom {

constexpr float kE4M3Most = 448.0f;

// The nearest one, ties to even; |x| is below 464.
ER_INLINE std::uint8_t e4m3_of(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its last place is 1
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    const std::uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120u << 3);
    const float tiny = (std::fabs(x) * 0x1p9f + kMagic) - kMagic;  // of the least: 2^-9
    const std::uint32_t code = size < (121u << 23) ? static_cast<std::uint32_t>(tiny) : normal;
    return static_cast<std::uint8_t>(sign | code);
}

// A code's number times 2^-8, which makes its exponent the last four bits of a bf16's: exact, and
// normal or 0. 0x7f and 0xff, which are no numbers, are 480 with a sign: they lie in slots that
// nothing was written to, whose weight is 0.
constexpr float kE4M3Unit = 256.0f;
ER_INLINE std::uint16_t bf16_of_e4m3(std::uint8_t code) {
    const int size = code & 0x7f, sign = (code & 0x80) << 8;
    const int below_4 = size < 2 ? (size < 1 ? 0 : 0x3700) : 0x3700 + 0x40 * size;
    const int tiny = size < 4 ? below_4 : 0x3780 + 0x20 * size;
    return static_cast<std::uint16_t>(sign | (size < 8 ? tiny : size << 4 | 0x3800));
}

}  // namespace engineroom
