// Counter-based random numbers: Philox4x32-10, laid out as kernels/sampling.py specifies.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

namespace engineroom {

// What, beside the token id, makes one row's random numbers (see kernels/sampling.py).
struct Draw {
    std::uint64_t seed;
    std::uint32_t sample_index;
    std::uint32_t position;
    std::uint32_t stream;
};

// out[i] = the uniform of token id i, for i in [0, count): fp32 strictly inside (0, 1).
void philox_uniform(const Draw &draw, float *out, std::size_t count);

// Adds philox_uniform to the native module.
void register_counter(nanobind::module_ &m);

}  // namespace engineroom
