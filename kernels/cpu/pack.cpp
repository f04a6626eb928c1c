// Repacks a checkpoint's blocks into tiles (kernels.hpp): moves bits, computes nothing but kRow16's
// powers of two.
//
// The block layouts stand as data in kernels/weights.py; what they mean is said in quant/. A tile is
// filled block by block with its rows interleaved, so that what is read and what is written both stay
// within the first-level cache. Here are a tile's sizes and the choice of a format; each family of
// formats has a file of its own (pack_parts.hpp).
#include "pack.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "dequant.hpp"
#include "pack_parts.hpp"
#include "tile_bytes.hpp"

namespace engineroom {
namespace {

using namespace packing;

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

const PackFormat &find_format(const char *name) {
    std::string known;
    for (const PackFamily &family : {float_formats(), gguf_formats(), integer_formats(),
                                     float4_formats(), float8_formats()})
        for (const PackFormat &format : family) {
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
