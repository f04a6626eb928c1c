// The native module's entry points: what Python calls, its argument checks and its errors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "bindings.hpp"
#include "dequant.hpp"
#include "features.hpp"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::string supported_formats() {
    std::string names;
    for (std::size_t i = 0; engineroom::dequant_format_name(i) != nullptr; ++i) {
        if (i) names += ", ";
        names += engineroom::dequant_format_name(i);
    }
    return names;
}

void dequantise(const char *format_name, Bytes data, Floats out, std::size_t num_columns) {
    const engineroom::DequantFormat *format = engineroom::find_dequant_format(format_name);
    if (format == nullptr) {
        throw nb::value_error(("unknown format '" + std::string(format_name) +
                               "'; supported: " + supported_formats())
                                  .c_str());
    }
    const std::size_t have = data.shape(0), want = out.shape(0);
    const std::size_t columns = num_columns ? num_columns : want;
    const std::size_t rows = columns ? want / columns : 0, row_bytes = format->row_bytes(columns);
    if (columns % format->block_elements != 0 || rows * columns != want ||
        rows * row_bytes != have) {
        const std::string header =
            format->header_bytes ? " after " + std::to_string(format->header_bytes) + " of each row"
                                 : "";
        throw nb::value_error(
            (std::string(format->name) + " stores " + std::to_string(format->block_elements) +
             " elements in " + std::to_string(format->block_bytes) + " bytes" + header +
             "; data has " + std::to_string(have) + " bytes, out has " + std::to_string(want) +
             " elements in rows of " + std::to_string(columns))
                .c_str());
    }
    const std::uint8_t *from = data.data();
    float *to = out.data();
    nb::gil_scoped_release unlocked;
    for (std::size_t row = 0; row < rows; ++row)
        format->run(from + row * row_bytes, to + row * columns, columns / format->block_elements);
}

nb::dict cpu_features() {
    nb::dict features;
    for (const engineroom::CpuFeature &feature : engineroom::cpu_features()) {
        features[feature.name] = feature.usable;
    }
    return features;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native parts of engineroom's kernels.";
    m.def("dequantise", &dequantise, nb::arg("format_name"), nb::arg("data").noconvert(),
          nb::arg("out").noconvert(), nb::arg("num_columns") = 0,
          "Write the float32 values of the blocks in `data` to `out`; see kernels/weights.py.");
    m.def("cpu_features", &cpu_features,
          "Instruction set extensions that this processor and operating system can run.");
    engineroom::register_counter(m);
    engineroom::register_pack(m);
    engineroom::register_packed_file(m);
    engineroom::register_probe(m);
    engineroom::register_quantise(m);
    engineroom::register_linear(m);
    engineroom::register_attention(m);
    engineroom::register_sample(m);
    engineroom::register_step(m);
}
