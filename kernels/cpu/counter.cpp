// Fills a row with Philox4x32-10 uniforms, bit for bit as kernels/sampling.py does.
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Every token's
// number is a pure function of (seed, sample index, position, stream, token id), so any number of
// threads, in any order, in any chunking, draws the same ones.
#include "counter.hpp"

#include <nanobind/ndarray.h>

namespace nb = nanobind;

namespace engineroom {
namespace {

constexpr int kRounds = 10;
constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

inline float uniform_of_word(std::uint32_t word) {
    const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

struct Block {
    std::uint32_t word[4];
};

inline Block philox4x32(const Draw &draw, std::uint32_t block) {
    std::uint32_t c0 = block, c1 = draw.sample_index, c2 = draw.position, c3 = draw.stream;
    std::uint32_t k0 = static_cast<std::uint32_t>(draw.seed);
    std::uint32_t k1 = static_cast<std::uint32_t>(draw.seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const std::uint64_t p0 = static_cast<std::uint64_t>(kMultiplier0) * c0;
        const std::uint64_t p1 = static_cast<std::uint64_t>(kMultiplier1) * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace

// One block after another: GCC's vectorised versions of this loop are no faster (the multiplies
// are 32 x 32 -> 64, and words leave four abreast).
void philox_uniform(const Draw &draw, float *out, std::size_t count) {
    std::size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const Block block = philox4x32(draw, static_cast<std::uint32_t>(i / 4));
        for (int j = 0; j < 4; ++j) out[i + j] = uniform_of_word(block.word[j]);
    }
    if (i < count) {
        const Block block = philox4x32(draw, static_cast<std::uint32_t>(i / 4));
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
