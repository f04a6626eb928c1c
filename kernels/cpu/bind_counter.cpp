// What Python calls of random numbers: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>


#include "bindings.hpp"
#include "counter.hpp"

namespace nb = nanobind;

namespace engineroom {
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
