// Fills a row with Philox4x32-10 uniforms, bit for bit as kernels/sampling.py does.
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Every token's
// number is a pure function of (seed, sample index, position, stream, token id), so any number of
// threads, in any order, in any chunking, draws the same ones.
#include "counter.hpp"

#include <nanobind/ndarray.h>

namespace nb = nanobind;

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

void register_counter(nb::module_ &m) {
    using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    m.def(
        "philox_uniform",
        [](std::uint64_t seed, std::uint32_t sample_index, std::uint32_t position,
           std::uint32_t stream, Floats out) {
            float *to = out.data();
            const std::size_t count = out.shape(0);
            nb::gil_scoped_release unlocked;
            philox_uniform(Draw{seed, sample_index, position, stream}, to, count);
        },
        nb::arg("seed"), nb::arg("sample_index"), nb::arg("position"), nb::arg("stream"),
        nb::arg("out").noconvert(),
        "Write to out[i] the uniform in (0, 1) of token id i; counter layout in kernels/sampling.py.");
}

}  // namespace engineroom
