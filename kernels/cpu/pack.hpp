// Repacks a checkpoint's blocks into tiles (kernels.hpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace engineroom {

// Elements, scaling, bias and sizes of a format (a key of kernels/weights.py FORMATS); data nullptr.
// Errors: std::invalid_argument for an unknown format or columns that are not whole blocks.
PackedWeight packed_layout(const char *format, int num_rows, int num_columns);

// How many rows of the checkpoint a tile has: 48, of the last one what is left.
inline int rows_of(const PackedWeight &layout, int tile) {
    return std::min(kTileRows, layout.num_rows - tile * kTileRows);
}

// Bytes of all tiles.
std::size_t packed_bytes(const PackedWeight &layout);

// Tiles [begin, end) of `layout`, from the checkpoint's rows at `from` to `to`.
void pack_tiles(const char *format, const std::uint8_t *from, const PackedWeight &layout,
                std::uint8_t *to, int begin, int end);

// fp32 values of one row, read back from the tiles (tests, embeddings of packed tables).
void unpack_row(const PackedWeight &weight, int row, float *out);

}  // namespace engineroom
