// What Python calls of quantising: argument checks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "quantise.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const DequantFormat &format_of(const std::string &name) {
    const DequantFormat *format = find_dequant_format(name.c_str());
    if (format == nullptr) throw std::invalid_argument("unknown format '" + name + "'");
    return *format;
}

void check_size(const DequantFormat &format, int rows, int columns, std::size_t have) {
    const std::size_t width = static_cast<std::size_t>(columns);
    const std::size_t want = static_cast<std::size_t>(rows) * format.row_bytes(width);
    if (width % format.block_elements == 0 && have == want) return;
    throw std::invalid_argument(std::string(format.name) + " of shape [" + std::to_string(rows) +
                                ", " + std::to_string(columns) + "] takes " +
                                std::to_string(want) + " bytes, and rows are blocks of " +
                                std::to_string(format.block_elements) + "; the array has " +
                                std::to_string(have) + " bytes");
}

int quantise(const std::string &format_name, Bytes data, int num_rows, int num_columns,
             const std::string &to_name, Result out, int threads) {
    const DequantFormat &from = format_of(format_name), &to = format_of(to_name);
    if (find_quantise_row(to.name) == nullptr)
        throw std::invalid_argument("nothing quantises to " + to_name + "; known: INT8, INT4, FP8, NF4");
    if (num_rows < 1 || num_columns < 1 || threads < 1)
        throw std::invalid_argument("rows, columns and threads must be at least 1");
    check_size(from, num_rows, num_columns, data.shape(0));
    check_size(to, num_rows, num_columns, out.shape(0));
    const std::uint8_t *in = data.data();
    std::uint8_t *to_bytes = out.data();
    nb::gil_scoped_release unlocked;
    return quantise_rows(from, in, to, to_bytes, num_rows, num_columns, threads);
}

}  // namespace

void register_quantise(nb::module_ &m) {
    m.def("quantise", &quantise, nb::arg("format_name"), nb::arg("data").noconvert(),
          nb::arg("num_rows"), nb::arg("num_columns"), nb::arg("to_format"),
          nb::arg("out").noconvert(), nb::arg("threads"),
          "Quantise rows to INT8 or INT4, without the GIL; the first row that cannot be, or -1.");
}

}  // namespace engineroom
