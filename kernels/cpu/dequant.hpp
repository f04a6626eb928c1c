// Block formats -> float32: the formats of kernels/weights.py, whose layouts they must match.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engineroom {

struct DequantFormat {
    const char *name;
    std::size_t block_elements;
    std::size_t block_bytes;
    std::size_t header_bytes;  // of a row, before its blocks
    // Reads a row of `blocks` blocks at `in` and writes blocks * block_elements floats at `out`.
    // Without headers any number of rows may be read as one.
    void (*run)(const std::uint8_t *in, float *out, std::size_t blocks);

    // Of whole blocks.
    std::size_t row_bytes(std::size_t columns) const {
        return header_bytes + columns / block_elements * block_bytes;
    }
};

// The bits of 2^(code - 128), half of what an exponent byte of MXFP4 stands for.
constexpr std::uint32_t e8m0_half_bits(std::uint8_t code) {
    return code < 2 ? 0x00200000u << code : (code - 1u) << 23;
}

// What a code of an 8-bit float (E4M3) stands for.
float e4m3_value(std::uint8_t code);

// The format of that name, or nullptr.
const DequantFormat *find_dequant_format(const char *name);

// The name of the i-th supported format, or nullptr past the last one.
const char *dequant_format_name(std::size_t i);

}  // namespace engineroom
