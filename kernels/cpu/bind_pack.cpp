// What Python calls of packing: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
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

using Raw = std::tuple<std::string, Bytes, int, int>;  // format, blocks, rows, columns

std::vector<PackedMatrix> pack_on(Pool &pool, const std::vector<Raw> &matrices, bool paired,
                                  bool compact) {
    std::vector<RawMatrix> layer;
    for (const auto &[format_name, data, num_rows, num_columns] : matrices) {
        packed_layout(format_name.c_str(), num_rows, num_columns);  // its errors come first
        const DequantFormat &format = *find_dequant_format(format_name.c_str());
        const std::size_t want = static_cast<std::size_t>(num_rows) *
                                 format.row_bytes(static_cast<std::size_t>(num_columns));
        if (data.shape(0) != want)
            throw std::invalid_argument(std::string(format.name) + " of shape [" +
                                        std::to_string(num_rows) + ", " +
                                        std::to_string(num_columns) + "] takes " +
                                        std::to_string(want) + " bytes, data has " +
                                        std::to_string(data.shape(0)));
        if (paired && layer.size() % 2 == 1 && layer.back().num_rows != num_rows)
            throw std::invalid_argument("a pair of " + std::to_string(layer.back().num_rows) +
                                        " and " + std::to_string(num_rows) + " rows");
        layer.push_back({format.name, data.data(), num_rows, num_columns});
    }
    if (paired && layer.size() % 2 == 1)
        throw std::invalid_argument(std::to_string(layer.size()) + " matrices are no pairs");
    nb::gil_scoped_release unlocked;
    return pack_layer(pool, layer, paired, compact);
}

PackedMatrix pack(const std::string &format, Bytes data, int num_rows, int num_columns, int threads,
                  bool compact) {
    if (threads < 1)
        throw std::invalid_argument("threads must be at least 1, not " + std::to_string(threads));
    Pool pool(threads);
    return pack_on(pool, {Raw(format, data, num_rows, num_columns)}, false, compact)[0];
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
    m.def("pack_layer", &pack_on, nb::arg("pool"), nb::arg("matrices"), nb::arg("paired"),
          nb::arg("compact") = true,
          "`pack` of each matrix of a linear layer, on the threads that will multiply by it.");
}

}  // namespace engineroom
