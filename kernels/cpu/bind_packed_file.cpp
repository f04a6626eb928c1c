// Matrices that lie in a mapped file, and what such a file must say of them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "dequant.hpp"
#include "packed_matrix.hpp"
#include "pages.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

// Elements, scaling, bias, rows, columns, bytes of a tile's scales, bytes of a tile.
using Layout = std::array<long long, 7>;
using Entry = std::tuple<std::string, Layout, std::size_t>;  // format, layout, where its tiles begin

// A whole file, shared with whoever maps it too; the system may drop its pages and read them again.
class MappedFile {
  public:
    MappedFile(int fd, std::size_t bytes) : bytes_(bytes) {
        data_ = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (data_ == MAP_FAILED)
            throw std::runtime_error("cannot map " + std::to_string(bytes) + " bytes: " +
                                     std::strerror(errno));
        // Wishes: without them it is slower at first. Pages that are faulted in one by one while the
        // first token is computed take some six times as long.
#if defined(MADV_POPULATE_READ)
        if (madvise(data_, bytes, MADV_POPULATE_READ) == 0) return;
#endif
        madvise(data_, bytes, MADV_WILLNEED);
    }
    ~MappedFile() { munmap(data_, bytes_); }
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;
    const std::uint8_t *data() const { return static_cast<const std::uint8_t *>(data_); }

  private:
    void *data_ = nullptr;
    std::size_t bytes_;
};

Layout layout_of(const PackedMatrix &matrix) {
    const PackedWeight &w = matrix.weight();
    return {static_cast<long long>(w.elements),
            static_cast<long long>(w.scaling),
            w.bias,
            w.num_rows,
            w.num_columns,
            static_cast<long long>(w.scales_bytes),
            static_cast<long long>(w.tile_bytes)};
}

PackedWeight weight_of(const Layout &layout) {
    PackedWeight w;
    w.elements = static_cast<Elements>(layout[0]);
    w.scaling = static_cast<Scaling>(layout[1]);
    w.bias = static_cast<int>(layout[2]);
    w.num_rows = static_cast<int>(layout[3]);
    w.num_columns = static_cast<int>(layout[4]);
    w.scales_bytes = static_cast<std::size_t>(layout[5]);
    w.tile_bytes = static_cast<std::size_t>(layout[6]);
    return w;
}

std::vector<PackedMatrix> map_tiles(int fd, std::size_t bytes, const std::vector<Entry> &entries) {
    struct stat status;
    if (fstat(fd, &status) != 0 || static_cast<std::size_t>(status.st_size) != bytes || bytes == 0)
        throw std::invalid_argument("the file has " + std::to_string(status.st_size) +
                                    " bytes, should have " + std::to_string(bytes));
    const auto file = std::make_shared<MappedFile>(fd, bytes);
    std::vector<PackedMatrix> matrices;
    for (const auto &[name, layout, offset] : entries) {
        const DequantFormat *format = find_dequant_format(name.c_str());
        PackedWeight w = weight_of(layout);
        const bool holds = format != nullptr && w.num_rows > 0 && w.num_columns > 0 &&
                           layout[5] >= 0 && layout[6] > layout[5] && w.tile_bytes % 64 == 0 &&
                           offset % 64 == 0 && offset <= bytes &&
                           static_cast<std::size_t>(w.num_tiles()) <=
                               (bytes - offset) / w.tile_bytes;
        if (!holds)
            throw std::invalid_argument("matrix " + std::to_string(matrices.size()) + " (" + name +
                                        ") does not lie in the file");
        w.data = file->data() + offset;
        matrices.emplace_back(format->name, w, file);
    }
    return matrices;
}

}  // namespace

void register_packed_file(nanobind::module_ &m) {
    m.def("tiles_layout", &layout_of, nb::arg("matrix"),
          "What `map_tiles` must know of a matrix beside its format.");
    m.def(
        "tiles_of",
        [](const PackedMatrix &matrix) {
            return nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(
                matrix.weight().data, {packed_bytes(matrix.weight())}, nb::find(matrix));
        },
        nb::arg("matrix"), "The bytes of a matrix's tiles, a view.");
    m.def("map_tiles", &map_tiles, nb::arg("fd"), nb::arg("num_bytes"), nb::arg("entries"),
          "Matrices whose tiles lie in an open file: (format, tiles_layout, offset) each.");
}

}  // namespace engineroom
