// Packs integers of 4 and 8 bits with float scales: of a whole row, or of groups with zero points.
#include "pack_parts.hpp"

namespace engineroom {
namespace packing {
namespace {

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

constexpr PackFormat kFormats[] = {
    {"INT8", 32, Elements::kU8, Scaling::kChannel, 128, pack_int8},
    {"INT4", 32, Elements::kU4, Scaling::kChannelMin, 0, pack_int4},
    {"I4G32", 32, Elements::kU4, Scaling::kZero32, 8, pack_int4_zero<1>},
    {"I4G128", 128, Elements::kU4, Scaling::kZero128, 8, pack_int4_zero<4>},
    {"I8G32", 32, Elements::kU8, Scaling::kZero32, 128, pack_int8_zero},
};

}  // namespace

PackFamily integer_formats() { return family_of(kFormats); }

}  // namespace packing
}  // namespace engineroom
