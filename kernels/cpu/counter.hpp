// Counter-based random numbers: Philox4x32-10, laid out as kernels/sampling.py specifies.
#pragma once

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

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// The words of token ids 4 * block .. 4 * block + 3.
struct PhiloxBlock {
    std::uint32_t word[4];
};

// Always inlined: a loop over blocks then vectorises for whatever its function is compiled for.
inline __attribute__((always_inline)) PhiloxBlock philox4x32(const Draw &draw,
                                                             std::uint32_t block) {
    std::uint32_t c0 = block, c1 = draw.sample_index, c2 = draw.position, c3 = draw.stream;
    std::uint32_t k0 = static_cast<std::uint32_t>(draw.seed);
    std::uint32_t k1 = static_cast<std::uint32_t>(draw.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const std::uint64_t p0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * c0;
        const std::uint64_t p1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// A word as a number strictly inside (0, 1).
inline __attribute__((always_inline)) float uniform_of_word(std::uint32_t word) {
    const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

// out[i] = the uniform of token id i, for i in [0, count): fp32 strictly inside (0, 1).
void philox_uniform(const Draw &draw, float *out, std::size_t count);

}  // namespace engineroom
