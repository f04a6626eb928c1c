// Repacks a checkpoint's blocks into tiles (kernels.hpp), on all threads.
#include "bindings.hpp"

namespace engineroom {

void register_pack(nanobind::module_ &) {}

}  // namespace engineroom
