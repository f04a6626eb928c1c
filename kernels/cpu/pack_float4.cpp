// Packs codes of 4 bits that are floats or places in a table: MXFP4, NVFP4, NF4 and FP4.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>

#include "dequant.hpp"
#include "pack_parts.hpp"

namespace engineroom {
namespace packing {
namespace {

// A byte of exponent, which becomes the float that it stands for, and 16 of nibbles.
void pack_mxfp4(const TileJob &t) {
    for (int g = 0; g < t.columns / kGroup; ++g) {
        for (int n = 0; n < t.rows; ++n)
            store4(t.scales + 4 * (static_cast<std::size_t>(g) * kTileRows + n),
                   e8m0_half_bits(t.row(n)[g * 17]));
        by_rows(t.rows, [&](int n, auto word) {
            put_nibbles16<decltype(word)>(t.quants + static_cast<std::size_t>(g) * kNibbleBytes + 4 * n,
                                          t.row(n) + g * 17 + 1, t.row_bytes);
        });
    }
}

// A half as an odd integer times a power of two; 0 as that times the largest that a half takes.
struct OddHalf {
    int integer;
    int exponent;
};
OddHalf odd_half(std::uint16_t half) {
    const int biased = half >> 10 & 31, significand = (half & 1023) | (biased > 0 ? 1024 : 0);
    if (significand == 0) return {0, 15};
    const int zeros = __builtin_ctz(static_cast<unsigned>(significand));
    const int odd = significand >> zeros;
    return {half >> 15 ? -odd : odd, std::max(biased, 1) - 25 + zeros};
}

// The scale of a row's elements [16 i, 16 i + 16), of blocks behind a header.
std::uint16_t nvfp4_scale(const std::uint8_t *row, int i) {
    std::uint16_t half;
    std::memcpy(&half, row + 8 + i / 2 * 20 + i % 2 * 2, 2);
    return half;
}

float float_in(const std::uint8_t *p) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
}

// The largest e for which 2^e divides a row's scales, and whether they then fit 16 bits, the factor
// takes 2^e without a rounding, and none is a NaN, an infinity or -0.
bool whole_scales(const std::uint8_t *row, int scales, int *e) {
    int least = 15, most = INT_MIN;
    for (int i = 0; i < scales; ++i) {
        const std::uint16_t half = nvfp4_scale(row, i);
        if ((half & 0x7c00) == 0x7c00 || half == 0x8000) return false;
        const OddHalf odd = odd_half(half);
        least = std::min(least, odd.exponent);
        if (odd.integer != 0) most = std::max(most, odd.exponent + 32 - __builtin_clz(static_cast<unsigned>(std::abs(odd.integer))));
    }
    *e = least;
    const float factor = float_in(row);
    return most <= least + 15 && std::ldexp(std::ldexp(factor, least), -least) == factor;
}

// A factor and a divisor, then blocks of two halves, one for each 16 elements, and 16 bytes of
// nibbles, ascending.
void pack_nvfp4(const TileJob &t) {
    const int groups = t.columns / kGroup;
    int e[kTileRows] = {};
    bool is_whole = true;
    for (int n = 0; n < t.rows; ++n) is_whole &= whole_scales(t.row(n), 2 * groups, e + n);
    t.scales[kRow16Whole] = is_whole;
    for (int n = 0; n < kTileRows; ++n) {  // outputs past N are divided by one
        const float divisor = n < t.rows ? float_in(t.row(n) + 4) : 1;
        float factor = n < t.rows ? float_in(t.row(n)) : 0;
        if (is_whole) factor = std::ldexp(factor, e[n]);
        const float head[3] = {factor / divisor, factor, divisor};
        for (int i = 0; i < 3; ++i) std::memcpy(t.scales + i * kFloatBytes + 4 * n, head + i, 4);
    }
    for (int g = 0; g < groups; ++g) {
        std::uint8_t *scales = t.scales + kRow16Bytes + static_cast<std::size_t>(g) * 2 * kHalfBytes;
        for (int n = 0; n < t.rows; ++n)
            for (int part = 0; part < 2; ++part) {
                const std::uint16_t half = nvfp4_scale(t.row(n), 2 * g + part);
                const OddHalf odd = odd_half(half);
                const std::int16_t whole = static_cast<std::int16_t>(
                    is_whole ? odd.integer * (1 << (odd.exponent - e[n])) : 0);
                if (is_whole)
                    std::memcpy(scales + 2 * (2 * n + 1 - part), &whole, 2);
                else
                    std::memcpy(scales + part * kHalfBytes + 2 * n, &half, 2);
            }
        by_rows(t.rows, [&](int n, auto word) {
            put_ascending16<decltype(word)>(
                t.quants + static_cast<std::size_t>(g) * kNibbleBytes + 4 * n,
                t.row(n) + 8 + g * 20 + 4, t.row_bytes);
        });
    }
}

// Blocks of a float, then 32 bytes of codes; byte j has element 2j in its high half.
void pack_codes(const TileJob &t) {
    for (int block = 0; block < t.columns / 64; ++block) {
        for (int n = 0; n < t.rows; ++n)
            store4(t.scales + 4 * (static_cast<std::size_t>(block) * kTileRows + n),
                   load4(t.row(n) + block * 36));
        for (int half = 0; half < 2; ++half) {
            std::uint8_t *to = t.quants + static_cast<std::size_t>(2 * block + half) * kNibbleBytes;
            by_rows(t.rows, [&](int n, auto word) {
                put_ascending16<decltype(word), true>(to + 4 * n, t.row(n) + block * 36 + 4 + 16 * half,
                                                   t.row_bytes);
            });
        }
    }
}

constexpr PackFormat kFormats[] = {
    {"MXFP4", 32, Elements::kE2M1, Scaling::kSingle32, 12, pack_mxfp4},
    {"NVFP4", 32, Elements::kE2M1, Scaling::kRow16, 12, pack_nvfp4},
    {"NF4", 64, Elements::kNF4, Scaling::kSingle64, 128, pack_codes},
    {"FP4", 64, Elements::kFP4, Scaling::kSingle64, 128, pack_codes},
};

}  // namespace

PackFamily float4_formats() { return family_of(kFormats); }

}  // namespace packing
}  // namespace engineroom
