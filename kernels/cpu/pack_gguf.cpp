// Packs the blocks of GGUF files: Q4_0 to Q8_0 of 32 elements, Q4_K to Q6_K of 256.
#include "pack_parts.hpp"

namespace engineroom {
namespace packing {
namespace {

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

constexpr PackFormat kFormats[] = {
    {"Q4_0", 32, Elements::kU4, Scaling::kHalf, 8, pack_q4<false>},
    {"Q4_1", 32, Elements::kU4, Scaling::kHalfMin, 0, pack_q4<true>},
    {"Q5_0", 32, Elements::kU5, Scaling::kHalf, 16, pack_q5<false>},
    {"Q5_1", 32, Elements::kU5, Scaling::kHalfMin, 0, pack_q5<true>},
    {"Q8_0", 32, Elements::kU8, Scaling::kHalf, 128, pack_q8_0},
    {"Q4_K", 256, Elements::kU4, Scaling::kSuperMin, 0, pack_q4_k},
    {"Q5_K", 256, Elements::kU5, Scaling::kSuperMin, 0, pack_q5_k},
    {"Q6_K", 256, Elements::kU6, Scaling::kSuperSigned, 32, pack_q6_k},
};

}  // namespace

PackFamily gguf_formats() { return family_of(kFormats); }

}  // namespace packing
}  // namespace engineroom
