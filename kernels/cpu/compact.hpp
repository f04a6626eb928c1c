// Packs bf16 in 12 bits (kCompactBF16 of kernels.hpp), losing nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace engineroom {

// The commonest high bytes of a tile, and how many of its elements have another.
struct CompactTile {
    std::uint8_t table[kTableBytes];
    std::uint32_t exceptions;
};

// Of the `rows` rows (up to 48) of bf16 at `from`; the rows that a tile lacks are zeros.
CompactTile count_compact(const std::uint8_t *from, int rows, int columns);

// Makes the kBF16 `layout` one of kCompactBF16 where that takes 0.9 of the memory or less; a tile has
// room for as many exceptions as the tile that has most. Returns whether it did.
bool make_compact(PackedWeight &layout, const std::vector<CompactTile> &tiles);

// Fills one tile of a compact layout; `from` and `rows` as count_compact had them.
void pack_compact(const std::uint8_t *from, int rows, const PackedWeight &layout,
                  const CompactTile &how, std::uint8_t *to);

// fp32 values of one row, read back from its tile.
void unpack_compact(const PackedWeight &weight, int row, float *out);

}  // namespace engineroom
