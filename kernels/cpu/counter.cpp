// Fills a row with Philox4x32-10 uniforms, bit for bit as kernels/sampling.py does.
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Every token's
// number is a pure function of (seed, sample index, position, stream, token id), so any number of
// threads, in any order, in any chunking, draws the same ones.
#include "counter.hpp"

namespace engineroom {

// One block after another: GCC's vectorised versions of this loop are no faster (the multiplies
// are 32 x 32 -> 64, and words leave four abreast).
void philox_uniform(const Draw &draw, float *out, std::size_t count) {
    std::size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const PhiloxBlock block = philox4x32(draw, static_cast<std::uint32_t>(i / 4));
        for (int j = 0; j < 4; ++j) out[i + j] = uniform_of_word(block.word[j]);
    }
    if (i < count) {
        const PhiloxBlock block = philox4x32(draw, static_cast<std::uint32_t>(i / 4));
        for (int j = 0; i < count; ++i, ++j) out[i] = uniform_of_word(block.word[j]);
    }
}

}  // namespace engineroom
