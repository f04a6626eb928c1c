// Block formats -> float32: the formats of kernels/weights.py, whose layouts they must match.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engineroom {

struct DequantFormat {
    const char *name;
    std::size_t block_elements;
    std::size_t block_bytes;
    // Reads `blocks` blocks at `in` and writes blocks * block_elements floats at `out`.
    void (*run)(const std::uint8_t *in, float *out, std::size_t blocks);
};

// The format of that name, or nullptr.
const DequantFormat *find_dequant_format(const char *name);

// The name of the i-th supported format, or nullptr past the last one.
const char *dequant_format_name(std::size_t i);

}  // namespace engineroom
