// A packed weight that owns its memory: what Python holds and what a step reads.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pack.hpp"
#include "pool.hpp"

namespace engineroom {

// Rows of one format in tiles. Copies share the memory. Matrices packed one after another lie in
// the same large mapping, so that small ones get huge pages too and are read as one stream; those of
// a packed file share its mapping.
class PackedMatrix {
  public:
    PackedMatrix(const char *format, const PackedWeight &weight, std::shared_ptr<const void> memory)
        : format_(format), weight_(weight), memory_(std::move(memory)) {}

    const PackedWeight &weight() const { return weight_; }
    const char *format() const { return format_; }  // of static storage

  private:
    const char *format_;
    PackedWeight weight_;
    std::shared_ptr<const void> memory_;  // keeps the tiles alive
};

// Rows of a checkpoint, as it holds them.
struct RawMatrix {
    const char *format;
    const std::uint8_t *from;
    int num_rows, num_columns;
};

// Packs the matrices of one linear layer; `paired`: in pairs of equal rows, as linear_tiles takes
// them. A pinned thread packs the tiles that it will multiply by (each_share). compact: bf16 becomes
// kCompactBF16 where that saves memory.
// Errors: std::invalid_argument as packed_layout; std::bad_alloc.
std::vector<PackedMatrix> pack_layer(Pool &pool, const std::vector<RawMatrix> &matrices, bool paired,
                                     bool compact);

}  // namespace engineroom
