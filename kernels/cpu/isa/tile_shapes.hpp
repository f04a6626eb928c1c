// The operand of ldtilecfg, palette 1: eight tiles of up to 16 rows of up to 64 bytes.
#pragma once

#include <cstdint>

namespace engineroom {
namespace amx {

struct alignas(64) TileShapes {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "as the processor reads it");

}  // namespace amx
}  // namespace engineroom
