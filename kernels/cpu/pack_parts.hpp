// What the files of each family of formats share: a tile to be filled, and pieces of a group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quad.hpp"
#include "tile_bytes.hpp"
#include "versions.hpp"

namespace engineroom {
namespace packing {

inline std::uint32_t load4(const std::uint8_t *p) {
    std::uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

inline void store4(std::uint8_t *p, std::uint32_t x) { std::memcpy(p, &x, 4); }

inline void copy_half(std::uint8_t *to, const std::uint8_t *from) { std::memcpy(to, from, 2); }

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

// How a format lies in tiles, and what fills one.
struct PackFormat {
    const char *name;
    int block_elements;
    Elements elements;
    Scaling scaling;
    int bias;
    void (*pack)(const TileJob &);
};

// The formats of one family, in the file that packs them.
struct PackFamily {
    const PackFormat *first, *last;
    const PackFormat *begin() const { return first; }
    const PackFormat *end() const { return last; }
};
template <std::size_t N>
constexpr PackFamily family_of(const PackFormat (&formats)[N]) {
    return {formats, formats + N};
}

PackFamily float_formats();    // pack_float.cpp
PackFamily gguf_formats();     // pack_gguf.cpp
PackFamily integer_formats();  // pack_integer.cpp
PackFamily float4_formats();   // pack_float4.cpp
PackFamily float8_formats();   // pack_float8.cpp

// ---- pieces of a group

constexpr std::uint32_t kLow = 0x0f0f0f0fu;

// These are of one row (Word is std::uint32_t) or of four (Quad), `row_bytes` apart.

// Eight 4-bit elements in the low halves of two words -> one unit of kU4.
template <class Word>
static Word join(Word first, Word second) {
    return (first & kLow) | ((second & kLow) << 4);
}

// 16 bytes: byte j holds element j (low half) and element j + 16 (high half). Inlined always: GCC would
// call it for every four rows.
template <class Word>
ER_INLINE void put_nibbles16(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
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
static Word swapped(Word w) {
    return ((w >> 4) & kLow) | ((w & kLow) << 4);
}

// The low four nibbles of each word, one to a byte.
template <class Word>
static Word spread_nibbles(Word w) {
    w = (w | (w << 8)) & 0x00ff00ffu;
    return (w | (w << 4)) & kLow;
}

// 16 bytes, byte j of which holds element 2j (low half) and element 2j + 1 (high half); where
// kHighFirst, the other way round.
template <class Word, bool kHighFirst = false>
static void put_ascending16(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
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
static void put_nibbles32(std::uint8_t *to, std::size_t group_bytes, const std::uint8_t *q,
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
static void put_signed32(std::uint8_t *to, const std::uint8_t *q, std::size_t row_bytes) {
    for (int half = 0; half < 2; ++half) {
        Word w[4];
        load_words(q + 16 * half, row_bytes, w);
        for (int i = 0; i < 4; ++i, to += 4 * kTileRows) store_words(to, w[i] ^ 0x80808080u);
    }
}

// 32 bits of one row of a plane, element 0 lowest. The plane was zeroed.
static inline void put_bits(std::uint8_t *plane, int n, std::uint32_t bits) {
    const int shift = 4 * (n % 2);
    plane += n / 2;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t four = (bits >> 4 * word) & 15;
        plane[word * (kTileRows / 2)] |= static_cast<std::uint8_t>(four << shift);
    }
}

// Bit `shift` of each of 32 bytes, byte 0's lowest.
static inline std::uint32_t gather_bits(const std::uint8_t *bytes, int shift) {
    std::uint32_t bits = 0;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t ones = (load4(bytes + 4 * word) >> shift) & 0x01010101u;
        bits |= ((ones * 0x01020408u) >> 24 & 15) << 4 * word;
    }
    return bits;
}

}  // namespace packing
}  // namespace engineroom
