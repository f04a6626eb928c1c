// What Python calls of packing: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings.hpp"
#include "dequant.hpp"
#include "pack.hpp"
#include "packed_matrix.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

PackedMatrix pack(const char *format_name, Bytes data, int num_rows, int num_columns, int threads,
                  bool compact) {
    packed_layout(format_name, num_rows, num_columns);  // its errors come first
    if (threads < 1)
        throw std::invalid_argument("threads must be at least 1, not " + std::to_string(threads));
    const DequantFormat &format = *find_dequant_format(format_name);
    const std::size_t want = static_cast<std::size_t>(num_rows) *
                             format.row_bytes(static_cast<std::size_t>(num_columns));
    if (data.shape(0) != want)
        throw std::invalid_argument(std::string(format.name) + " of shape [" +
                                    std::to_string(num_rows) + ", " + std::to_string(num_columns) +
                                    "] takes " + std::to_string(want) + " bytes, data has " +
                                    std::to_string(data.shape(0)));
    const std::uint8_t *from = data.data();
    nb::gil_scoped_release unlocked;
    return pack_matrix(format.name, from, num_rows, num_columns, threads, compact);
}

void row(const PackedMatrix &matrix, int i, Floats out) {
    const PackedWeight &weight = matrix.weight();
    if (i < 0 || i >= weight.num_rows)
        throw std::invalid_argument("row " + std::to_string(i) + " of a matrix of " +
                                    std::to_string(weight.num_rows) + " rows");
    if (out.shape(0) != static_cast<std::size_t>(weight.num_columns))
        throw std::invalid_argument("a row has " + std::to_string(weight.num_columns) +
                                    " values, out has " + std::to_string(out.shape(0)));
    unpack_row(weight, i, out.data());
}

}  // namespace

void register_pack(nanobind::module_ &m) {
    nb::class_<PackedMatrix>(m, "PackedMatrix", "A weight in the tiles of kernels/cpu/kernels.hpp.")
        .def_prop_ro("shape",
                     [](const PackedMatrix &p) {
                         return nb::make_tuple(p.weight().num_rows, p.weight().num_columns);
                     })
        .def_prop_ro("nbytes", [](const PackedMatrix &p) { return packed_bytes(p.weight()); })
        .def_prop_ro("format", &PackedMatrix::format)
        .def("row", &row, nb::arg("i"), nb::arg("out").noconvert(),
             "Write the float32 values of row i to `out`.");
    m.def("pack", &pack, nb::arg("format_name"), nb::arg("data").noconvert(), nb::arg("num_rows"),
          nb::arg("num_columns"), nb::arg("threads"), nb::arg("compact") = true,
          "Repack the blocks in `data` into tiles, without the GIL. compact: BF16 takes 12 bits an "
          "element, losing nothing, where its exponents allow it.");
}

}  // namespace engineroom
