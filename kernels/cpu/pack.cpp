// Repacks a checkpoint's blocks into tiles (kernels.hpp): moves bits, computes nothing but kRow16's
// powers of two.
//
// The block layouts stand as data in kernels/weights.py; what they mean is said in quant/. A tile is
// filled block by block with its rows interleaved, so that what is read and what is written both stay
// within the first-level cache.
#include "pack.hpp"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dequant.hpp"
#include "quad.hpp"
#include "tile_bytes.hpp"

namespace engineroom {
namespace {

constexpr std::uint32_t kLow = 0x0f0f0f0fu;

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::uint32_t load4(const std::uint8_t *p) {
    std::uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

void store4(std::uint8_t *p, std::uint32_t x) { std::memcpy(p, &x, 4); }

void copy_half(std::uint8_t *to, const std::uint8_t *from) { std::memcpy(to, from, 2); }

// One tile to be filled: `rows` rows (up to 48) of the checkpoint, `row_bytes` apart.
struct TileJob {
    const std::uint8_t *from;
    std::size_t row_bytes;
    int rows;
    int columns;
    std::uint8_t *scales;
    std::uint8_t *quants;

    const std::uint8_t *row(int n) const { return from + n * row_bytes; }
};

// ------------------------------------------------------------------------------ plain floats

// Rows of 4-byte units (a float, or a pair of 16-bit ones): unit u of row n goes to [u][n].
void pack_units(const TileJob &t) {
    const int units = static_cast<int>(t.row_bytes / 4), rest = static_cast<int>(t.row_bytes % 4);
    constexpr int kRun = 16;  // a cache line of a row
    for (int u0 = 0; u0 < units; u0 += kRun) {
        const int end = std::min(u0 + kRun, units);
        by_rows(t.rows, [&](int n, auto word) {
            const std::uint8_t *from = t.row(n);
            std::uint8_t *to = t.quants + 4 * (static_cast<std::size_t>(u0) * kTileRows + n);
            int u = u0;
            for (; u + 4 <= end; u += 4) {
                decltype(word) words[4];
                load_words(from + 4 * u, t.row_bytes, words);
                for (int i = 0; i < 4; ++i, to += 4 * kTileRows) store_words(to, words[i]);
            }
            for (; u < end; ++u, to += 4 * kTileRows)
                for (std::size_t i = 0; i < sizeof word / 4; ++i)
                    store4(to + 4 * i, load4(from + i * t.row_bytes + 4 * u));
        });
    }
    if (rest == 0) return;
    for (int n = 0; n < t.rows; ++n) {  // bf16, odd K: a pair with a zero
        std::uint32_t last = 0;
        std::memcpy(&last, t.from + n * t.row_bytes + 4 * units, static_cast<std::size_t>(rest));
        store4(t.quants + 4 * (static_cast<std::size_t>(units) * kTileRows + n), last);
    }
}

void pack_f16(const TileJob &t) {
    constexpr int kRun = 32;
    for (int k0 = 0; k0 < t.columns; k0 += kRun) {
        const int run = std::min(kRun, t.columns - k0);
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *from = t.from + n * t.row_bytes + 2 * k0;
            std::uint8_t *to = t.quants + 2 * (static_cast<std::size_t>(k0) * kTileRows + n);
            for (int k = 0; k < run; ++k) copy_half(to + 2 * kTileRows * k, from + 2 * k);
        }
    }
}

// ------------------------------------------------------------------------- pieces of a group

// These are of one row (Word is std::uint32_t) or of four (Quad), `row_bytes` apart.

// Eight 4-bit elements in the low halves of two words -> one unit of kU4.
template <class Word>
Word join(Word first, Word second) {
    return (first & kLow) | ((second & kLow) << 4);
}

// 16 bytes: byte j holds element j (low half) and element j + 16 (high half).
template <class Word>
void put_nibbles16(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
    constexpr int kUnit = 4 * kTileRows;
    Word w[4];
    load_words(q, row_bytes, w);
    for (int half = 0; half < 2; ++half) {
        const Word a = w[2 * half], b = w[2 * half + 1];
        store_words(to + half * kUnit, join(a, b));
        store_words(to + (half + 2) * kUnit, join<Word>(a >> 4, b >> 4));
    }
}

// The halves of each byte change places.
template <class Word>
Word swapped(Word w) {
    return ((w >> 4) & kLow) | ((w & kLow) << 4);
}

// The low four nibbles of each word, one to a byte.
template <class Word>
Word spread_nibbles(Word w) {
    w = (w | (w << 8)) & 0x00ff00ffu;
    return (w | (w << 4)) & kLow;
}

// 16 bytes, byte j of which holds element 2j (low half) and element 2j + 1 (high half); where
// kHighFirst, the other way round.
template <class Word, bool kHighFirst = false>
void put_ascending16(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
    Word w[4];
    load_words(q, row_bytes, w);
    for (int i = 0; i < 4; ++i, to += 4 * kTileRows) {
        if (kHighFirst) w[i] = swapped(w[i]);
        const Word first = spread_nibbles<Word>(w[i] & 0xffffu);
        store_words(to, join(first, spread_nibbles<Word>(w[i] >> 16)));
    }
}

// 32 bytes, one element in each half: the low halves are one group, the high halves the next,
// `group_bytes` further on.
template <class Word>
void put_nibbles32(std::uint8_t *to, std::size_t group_bytes, const std::uint8_t *q,
                   std::size_t row_bytes) {
    for (int half = 0; half < 2; ++half) {
        Word w[4];
        load_words(q + 16 * half, row_bytes, w);
        for (int i = 0; i < 2; ++i, to += 4 * kTileRows) {
            const Word a = w[2 * i], b = w[2 * i + 1];
            store_words(to, join(a, b));
            store_words(to + group_bytes, join<Word>(a >> 4, b >> 4));
        }
    }
}

// 32 bytes s8 -> eight words of kU8, u8 = s8 + 128.
template <class Word>
void put_signed32(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
    for (int half = 0; half < 2; ++half) {
        Word w[4];
        load_words(q + 16 * half, row_bytes, w);
        for (int i = 0; i < 4; ++i, to += 4 * kTileRows) store_words(to, w[i] ^ 0x80808080u);
    }
}

// 32 bits of one row of a plane, element 0 lowest. The plane was zeroed.
void put_bits(std::uint8_t *plane, int n, std::uint32_t bits) {
    const int shift = 4 * (n % 2);
    plane += n / 2;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t four = (bits >> 4 * word) & 15;
        plane[word * (kTileRows / 2)] |= static_cast<std::uint8_t>(four << shift);
    }
}

// Bit `shift` of each of 32 bytes, byte 0's lowest.
std::uint32_t gather_bits(const std::uint8_t *bytes, int shift) {
    std::uint32_t bits = 0;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t ones = (load4(bytes + 4 * word) >> shift) & 0x01010101u;
        bits |= ((ones * 0x01020408u) >> 24 & 15) << 4 * word;
    }
    return bits;
}

// ---------------------------------------------------------------------------- blocks of 32

template <bool kMinimum>
void put_halves(const TileJob &t, int group, int n, const std::uint8_t *block) {
    std::uint8_t *to = t.scales + static_cast<std::size_t>(group) * (1 + kMinimum) * kHalfBytes;
    copy_half(to + 2 * n, block);
    if (kMinimum) copy_half(to + kHalfBytes + 2 * n, block + 2);
}

template <bool kMinimum>
void pack_q4(const TileJob &t) {
    constexpr int kHeader = kMinimum ? 4 : 2;
    for (int g = 0; g < t.columns / kGroup; ++g) {
        const int at = g * (kHeader + 16);
        std::uint8_t *to = t.quants + static_cast<std::size_t>(g) * kNibbleBytes;
        for (int n = 0; n < t.rows; ++n) put_halves<kMinimum>(t, g, n, t.row(n) + at);
        by_rows(t.rows, [&](int n, auto word) {
            put_nibbles16<decltype(word)>(to + 4 * n, t.row(n) + at + kHeader, t.row_bytes);
        });
    }
}

template <bool kMinimum>
void pack_q5(const TileJob &t) {
    constexpr int kHeader = kMinimum ? 4 : 2;
    for (int g = 0; g < t.columns / kGroup; ++g) {
        const int at = g * (kHeader + 20);
        std::uint8_t *to = t.quants + static_cast<std::size_t>(g) * (kNibbleBytes + kPlaneBytes);
        for (int n = 0; n < t.rows; ++n) {
            put_halves<kMinimum>(t, g, n, t.row(n) + at);
            put_bits(to + kNibbleBytes, n, load4(t.row(n) + at + kHeader));
        }
        by_rows(t.rows, [&](int n, auto word) {
            put_nibbles16<decltype(word)>(to + 4 * n, t.row(n) + at + kHeader + 4, t.row_bytes);
        });
    }
}

void pack_q8_0(const TileJob &t) {
    for (int g = 0; g < t.columns / kGroup; ++g) {
        std::uint8_t *to = t.quants + static_cast<std::size_t>(g) * kGroup * kTileRows;
        for (int n = 0; n < t.rows; ++n) put_halves<false>(t, g, n, t.row(n) + g * 34);
        by_rows(t.rows, [&](int n, auto word) {
            put_signed32<decltype(word)>(to + 4 * n, t.row(n) + g * 34 + 2, t.row_bytes);
        });
    }
}

// --------------------------------------------------------------------------- blocks of 256

// Q4_K and Q5_K: d, dmin and the twelve bytes of 6-bit scales and minima.
void put_super_min(const TileJob &t, int super, int n, const std::uint8_t *block) {
    std::uint8_t *to = t.scales + static_cast<std::size_t>(super) * kSuperMinBytes;
    copy_half(to + 2 * n, block);
    copy_half(to + kHalfBytes + 2 * n, block + 2);
    const std::uint8_t *p = block + 4;
    std::uint8_t *scale = to + 2 * kHalfBytes + n, *minimum = scale + kTileRows;
    for (int g = 0; g < 4; ++g) {
        scale[2 * kTileRows * g] = p[g] & 63;
        minimum[2 * kTileRows * g] = p[g + 4] & 63;
        scale[2 * kTileRows * (g + 4)] =
            static_cast<std::uint8_t>((p[g + 8] & 15) | ((p[g] >> 6) << 4));
        minimum[2 * kTileRows * (g + 4)] =
            static_cast<std::uint8_t>((p[g + 8] >> 4) | ((p[g + 4] >> 6) << 4));
    }
}

void pack_q4_k(const TileJob &t) {
    for (int s = 0; s < t.columns / kSuper; ++s) {
        std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kNibbleBytes;
        for (int n = 0; n < t.rows; ++n) put_super_min(t, s, n, t.row(n) + s * 144);
        by_rows(t.rows, [&](int n, auto word) {
            for (int pair = 0; pair < 4; ++pair)
                put_nibbles32<decltype(word)>(to + pair * 2 * kNibbleBytes + 4 * n, kNibbleBytes,
                                              t.row(n) + s * 144 + 16 + 32 * pair, t.row_bytes);
        });
    }
}

void pack_q5_k(const TileJob &t) {
    constexpr int kBytes = kNibbleBytes + kPlaneBytes;
    for (int s = 0; s < t.columns / kSuper; ++s) {
        std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kBytes;
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.row(n) + s * 176;
            put_super_min(t, s, n, block);
            for (int g = 0; g < 8; ++g)
                put_bits(to + g * kBytes + kNibbleBytes, n, gather_bits(block + 16, g));
        }
        by_rows(t.rows, [&](int n, auto word) {
            for (int pair = 0; pair < 4; ++pair)
                put_nibbles32<decltype(word)>(to + pair * 2 * kBytes + 4 * n, kBytes,
                                              t.row(n) + s * 176 + 48 + 32 * pair, t.row_bytes);
        });
    }
}

void pack_q6_k(const TileJob &t) {
    constexpr int kBytes = kNibbleBytes + 2 * kPlaneBytes;
    for (int s = 0; s < t.columns / kSuper; ++s) {
        std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kBytes;
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.row(n) + s * 210;
            std::uint8_t *scale = t.scales + static_cast<std::size_t>(s) * kSuperSignedBytes;
            copy_half(scale + 2 * n, block + 208);
            for (int i = 0; i < 16; ++i) scale[kHalfBytes + kTileRows * i + n] = block[192 + i];
            for (int g = 0; g < 8; ++g) {
                const std::uint8_t *high = block + 128 + 32 * (g / 4);
                std::uint8_t *planes = to + g * kBytes + kNibbleBytes;
                put_bits(planes, n, gather_bits(high, 2 * (g % 4)));
                put_bits(planes + kPlaneBytes, n, gather_bits(high, 2 * (g % 4) + 1));
            }
        }
        // 32 low bytes hold two groups that are two apart: of each half of the block, 0 and 2, 1 and 3.
        by_rows(t.rows, [&](int n, auto word) {
            for (int i = 0; i < 4; ++i)
                put_nibbles32<decltype(word)>(to + (i / 2 * 4 + i % 2) * kBytes + 4 * n, 2 * kBytes,
                                              t.row(n) + s * 210 + 32 * i, t.row_bytes);
        });
    }
}

// ----------------------------------------------------------------------- scales of a whole row

void pack_int8(const TileJob &t) {
    for (int n = 0; n < t.rows; ++n) store4(t.scales + 4 * n, load4(t.row(n)));
    for (int g = 0; g < t.columns / kGroup; ++g)
        by_rows(t.rows, [&](int n, auto word) {
            put_signed32<decltype(word)>(
                t.quants + static_cast<std::size_t>(g) * kGroup * kTileRows + 4 * n,
                t.row(n) + 4 + g * kGroup, t.row_bytes);
        });
}

void pack_int4(const TileJob &t) {
    for (int n = 0; n < t.rows; ++n) {
        store4(t.scales + 4 * n, load4(t.row(n)));
        store4(t.scales + kFloatBytes + 4 * n, load4(t.row(n) + 4));
    }
    for (int g = 0; g < t.columns / kGroup; ++g) {
        const int at = 8 + g * 18;
        std::uint8_t *small = t.scales + 2 * kFloatBytes + g * 2 * kTileRows;
        for (int n = 0; n < t.rows; ++n) {
            small[n] = t.row(n)[at];
            small[kTileRows + n] = t.row(n)[at + 1];
        }
        by_rows(t.rows, [&](int n, auto word) {
            put_nibbles16<decltype(word)>(
                t.quants + static_cast<std::size_t>(g) * kNibbleBytes + 4 * n, t.row(n) + at + 2,
                t.row_bytes);
        });
    }
}

// ------------------------------------------------------------------- scales with a zero point

// Blocks of a float scale, a half zero point, then `quant_bytes` bytes for each group of 32. Calls
// put(word, first output's bytes in the tile, its bytes in the checkpoint) for each group.
template <class Put>
void pack_zero(const TileJob &t, int groups, int quant_bytes, int tile_bytes, Put put) {
    for (int block = 0; block < t.columns / (kGroup * groups); ++block) {
        const int at = block * (6 + groups * quant_bytes);
        std::uint8_t *scale = t.scales + static_cast<std::size_t>(block) * kZeroBytes;
        for (int n = 0; n < t.rows; ++n) {
            store4(scale + 4 * n, load4(t.row(n) + at));
            copy_half(scale + kFloatBytes + 2 * n, t.row(n) + at + 4);
        }
        for (int g = 0; g < groups; ++g) {
            std::uint8_t *to = t.quants + static_cast<std::size_t>(block * groups + g) *
                                              static_cast<std::size_t>(tile_bytes);
            by_rows(t.rows, [&](int n, auto word) {
                put(word, to + 4 * n, t.row(n) + at + 6 + g * quant_bytes);
            });
        }
    }
}

template <int kGroups>
void pack_int4_zero(const TileJob &t) {
    pack_zero(t, kGroups, kGroup / 2, kNibbleBytes,
              [&](auto word, std::uint8_t *to, const std::uint8_t *from) {
                  put_ascending16<decltype(word)>(to, from, t.row_bytes);
              });
}

void pack_int8_zero(const TileJob &t) {
    pack_zero(t, 1, kGroup, kGroup * kTileRows,
              [&](auto word, std::uint8_t *to, const std::uint8_t *from) {
                  put_signed32<decltype(word)>(to, from, t.row_bytes);
              });
}

// ------------------------------------------------------------------------------ 4-bit floats

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

// ------------------------------------------------------------------------------ 8-bit floats

bool is_odd_e4m3(std::uint8_t code) { return (code & 0x78) == 0 || (code & 0x7f) == 0x7f; }

// Four columns of one output or of four, of which the first is k of a step's and n; returns whether some
// are subnormal numbers, zeros or NaN.
bool put_e4m3(std::uint8_t *step, int k, int n, std::uint32_t word) {
    bool is_odd = false;
    for (int i = 0; i < 4; ++i) {
        const std::uint8_t code = static_cast<std::uint8_t>(word >> 8 * i);
        step[place_in_e4m3(k + i, n)] = static_cast<std::uint8_t>(code << 4 | code >> 4);
        is_odd |= is_odd_e4m3(code);
    }
    return is_odd;
}
bool put_e4m3(std::uint8_t *step, int k, int n, Quad words) {
    const Bytes16 codes = (Bytes16)words;
    const Bytes16 odd = (Bytes16)((codes & all_of(0x78)) == 0) |
                        (Bytes16)((codes & all_of(0x7f)) == all_of(0x7f));
    const Quad halves = swapped(words);
    store_words(step + place_in_e4m3(k, n),
                ENGINEROOM_SHUFFLE(Bytes16, (Bytes16)halves, (Bytes16)halves, 0, 1, 4, 5, 8, 9, 12,
                                   13, 2, 3, 6, 7, 10, 11, 14, 15));
    std::uint64_t any[2];
    std::memcpy(any, &odd, sizeof any);
    return (any[0] | any[1]) != 0;
}

// Rows of a float and codes, or of blocks of a float and 128 codes.
template <bool kBlocks>
void pack_fp8(const TileJob &t) {
    constexpr int kBlock = 128;
    const int scales = kBlocks ? t.columns / kBlock : 1;
    for (int i = 0; i < scales; ++i)
        for (int n = 0; n < t.rows; ++n)
            store4(t.scales + 4 * (static_cast<std::size_t>(i) * kTileRows + n),
                   load4(t.row(n) + i * (4 + kBlock)));
    std::uint8_t *odd = t.scales + static_cast<std::size_t>(scales) * kFloatBytes;
    for (int k0 = 0; k0 < t.columns; k0 += 2 * kE4M3Columns) {
        const int at = k0 + 4 * (kBlocks ? k0 / kBlock + 1 : 1);
        std::uint8_t *to = t.quants + static_cast<std::size_t>(k0) * kTileRows;
        bool is_odd[2] = {false, false};
        by_rows(t.rows, [&](int n, auto word) {
            decltype(word) words[4];
            load_words(t.row(n) + at, t.row_bytes, words);
            for (int i = 0; i < 4; ++i)
                is_odd[i / 2] |= put_e4m3(to + i / 2 * kE4M3Bytes, i % 2 * 4, n, words[i]);
        });
        odd[k0 / kE4M3Columns] = is_odd[0];
        odd[k0 / kE4M3Columns + 1] = is_odd[1];
    }
}

// ---------------------------------------------------------------------------- the formats

struct PackFormat {
    const char *name;
    int block_elements;
    Elements elements;
    Scaling scaling;
    int bias;
    void (*pack)(const TileJob &);
};

const PackFormat kFormats[] = {
    {"F32", 1, Elements::kF32, Scaling::kNone, 0, pack_units},
    {"F16", 1, Elements::kF16, Scaling::kNone, 0, pack_f16},
    {"BF16", 1, Elements::kBF16, Scaling::kNone, 0, pack_units},
    {"Q4_0", 32, Elements::kU4, Scaling::kHalf, 8, pack_q4<false>},
    {"Q4_1", 32, Elements::kU4, Scaling::kHalfMin, 0, pack_q4<true>},
    {"Q5_0", 32, Elements::kU5, Scaling::kHalf, 16, pack_q5<false>},
    {"Q5_1", 32, Elements::kU5, Scaling::kHalfMin, 0, pack_q5<true>},
    {"Q8_0", 32, Elements::kU8, Scaling::kHalf, 128, pack_q8_0},
    {"Q4_K", 256, Elements::kU4, Scaling::kSuperMin, 0, pack_q4_k},
    {"Q5_K", 256, Elements::kU5, Scaling::kSuperMin, 0, pack_q5_k},
    {"Q6_K", 256, Elements::kU6, Scaling::kSuperSigned, 32, pack_q6_k},
    {"INT8", 32, Elements::kU8, Scaling::kChannel, 128, pack_int8},
    {"INT4", 32, Elements::kU4, Scaling::kChannelMin, 0, pack_int4},
    {"I4G32", 32, Elements::kU4, Scaling::kZero32, 8, pack_int4_zero<1>},
    {"I4G128", 128, Elements::kU4, Scaling::kZero128, 8, pack_int4_zero<4>},
    {"I8G32", 32, Elements::kU8, Scaling::kZero32, 128, pack_int8_zero},
    {"MXFP4", 32, Elements::kE2M1, Scaling::kSingle32, 12, pack_mxfp4},
    {"NVFP4", 32, Elements::kE2M1, Scaling::kRow16, 12, pack_nvfp4},
    {"NF4", 64, Elements::kNF4, Scaling::kSingle64, 128, pack_codes},
    {"FP4", 64, Elements::kFP4, Scaling::kSingle64, 128, pack_codes},
    {"FP8", 32, Elements::kE4M3, Scaling::kChannel, 0, pack_fp8<false>},
    {"FP8_128", 128, Elements::kE4M3, Scaling::kSingle128, 0, pack_fp8<true>},
};

const PackFormat &find_format(const char *name) {
    std::string known;
    for (const PackFormat &format : kFormats) {
        if (std::strcmp(format.name, name) == 0) return format;
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    throw std::invalid_argument("no tile layout for format '" + std::string(name) +
                                "'; known: " + known);
}

std::size_t quants_bytes(Elements elements, std::size_t columns) {
    const std::size_t groups = columns / kGroup;
    switch (elements) {
        case Elements::kF32: return columns * kTileRows * 4;
        case Elements::kF16: return columns * kTileRows * 2;
        case Elements::kBF16: return (columns + 1) / 2 * kTileRows * 4;
        case Elements::kU4:
        case Elements::kE2M1:
        case Elements::kNF4:
        case Elements::kFP4: return groups * kNibbleBytes;
        case Elements::kE4M3: return columns * kTileRows;
        case Elements::kU5: return groups * (kNibbleBytes + kPlaneBytes);
        case Elements::kU6: return groups * (kNibbleBytes + 2 * kPlaneBytes);
        case Elements::kU8: return groups * kGroup * kTileRows;
        case Elements::kCompactBF16: break;  // of no format: make_compact knows
    }
    return 0;
}

std::size_t scales_bytes(Scaling scaling, std::size_t columns) {
    switch (scaling) {
        case Scaling::kNone: return 0;
        case Scaling::kHalf: return columns / kGroup * kHalfBytes;
        case Scaling::kHalfMin: return columns / kGroup * 2 * kHalfBytes;
        case Scaling::kSuperMin: return columns / kSuper * kSuperMinBytes;
        case Scaling::kSuperSigned: return columns / kSuper * kSuperSignedBytes;
        case Scaling::kChannel: return kFloatBytes;
        case Scaling::kChannelMin: return 2 * kFloatBytes + columns / kGroup * 2 * kTileRows;
        case Scaling::kZero32: return columns / kGroup * kZeroBytes;
        case Scaling::kZero128: return columns / (4 * kGroup) * kZeroBytes;
        case Scaling::kSingle32: return columns / kGroup * kFloatBytes;
        case Scaling::kRow16: return kRow16Bytes + columns / kGroup * 2 * kHalfBytes;
        case Scaling::kSingle64: return columns / 64 * kFloatBytes;
        case Scaling::kSingle128: return columns / 128 * kFloatBytes;
    }
    return 0;
}

// Behind the scales.
std::size_t marks_bytes(Elements elements, std::size_t columns) {
    return elements == Elements::kE4M3 ? columns / kE4M3Columns : 0;
}

}  // namespace

// --------------------------------------------------------------------------------- packing

PackedWeight packed_layout(const char *format_name, int num_rows, int num_columns) {
    const PackFormat &format = find_format(format_name);
    if (num_rows < 1 || num_columns < 1)
        throw std::invalid_argument("a packed weight needs rows and columns, not [" +
                                    std::to_string(num_rows) + ", " + std::to_string(num_columns) +
                                    "]");
    if (num_columns % format.block_elements != 0)
        throw std::invalid_argument(std::string(format.name) + " stores blocks of " +
                                    std::to_string(format.block_elements) + " elements; a row of " +
                                    std::to_string(num_columns) +
                                    " is not a whole number of them");
    PackedWeight layout;
    layout.elements = format.elements;
    layout.scaling = format.scaling;
    layout.bias = format.bias;
    layout.num_rows = num_rows;
    layout.num_columns = num_columns;
    const std::size_t columns = static_cast<std::size_t>(num_columns);
    layout.scales_bytes =
        padded(scales_bytes(format.scaling, columns) + marks_bytes(format.elements, columns));
    layout.tile_bytes = layout.scales_bytes + padded(quants_bytes(format.elements, columns));
    return layout;
}

std::size_t packed_bytes(const PackedWeight &layout) {
    return static_cast<std::size_t>(layout.num_tiles()) * layout.tile_bytes;
}

void pack_tiles(const char *format_name, const std::uint8_t *from, const PackedWeight &layout,
                std::uint8_t *to, int begin, int end) {
    const PackFormat &format = find_format(format_name);
    const std::size_t row_bytes = find_dequant_format(format.name)
                                      ->row_bytes(static_cast<std::size_t>(layout.num_columns));
    const bool adds_bits =
        format.elements == Elements::kU5 || format.elements == Elements::kU6;
    for (int tile = begin; tile < end; ++tile) {
        std::uint8_t *at = to + static_cast<std::size_t>(tile) * layout.tile_bytes;
        const int rows = rows_of(layout, tile);
        if (rows < kTileRows || adds_bits) std::memset(at, 0, layout.tile_bytes);
        format.pack(TileJob{from + static_cast<std::size_t>(tile) * kTileRows * row_bytes,
                            row_bytes, rows, layout.num_columns, at, at + layout.scales_bytes});
    }
}

}  // namespace engineroom
