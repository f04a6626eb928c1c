// Repacks a checkpoint's blocks into tiles (kernels.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace engineroom {

// Memory of whole pages, 64-byte aligned, zeroed, in huge pages where the system gives them.
class Pages {
  public:
    explicit Pages(std::size_t bytes);
    ~Pages();
    Pages(const Pages &) = delete;
    Pages &operator=(const Pages &) = delete;
    std::uint8_t *data() const { return data_; }
    std::size_t size() const { return size_; }

  private:
    std::uint8_t *data_ = nullptr;
    std::size_t size_ = 0;
    void *mapping_ = nullptr;
    std::size_t mapped_ = 0;
};

// Elements, scaling, bias and sizes of a format (a key of kernels/weights.py FORMATS); data nullptr.
// Errors: std::invalid_argument for an unknown format or columns that are not whole blocks.
PackedWeight packed_layout(const char *format, int num_rows, int num_columns);

// Bytes of all tiles.
std::size_t packed_bytes(const PackedWeight &layout);

// Tiles [begin, end) of `layout`, from the checkpoint's rows at `from` to `to`.
void pack_tiles(const char *format, const std::uint8_t *from, const PackedWeight &layout,
                std::uint8_t *to, int begin, int end);

// fp32 values of one row, read back from the tiles (tests, embeddings of packed tables).
void unpack_row(const PackedWeight &weight, int row, float *out);

}  // namespace engineroom
