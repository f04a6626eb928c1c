// A packed weight and the memory that it lives in.
#pragma once

#include <string>

#include "pack.hpp"

namespace engineroom {

class PackedMatrix {
  public:
    PackedMatrix(const char *format, const std::uint8_t *from, int num_rows, int num_columns,
                 int threads);
    const PackedWeight &weight() const { return weight_; }
    const std::string &format() const { return format_; }
    std::size_t nbytes() const { return pages_.size(); }

  private:
    std::string format_;
    PackedWeight weight_;
    Pages pages_;
};

}  // namespace engineroom
