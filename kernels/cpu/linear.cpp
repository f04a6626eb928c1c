// Linear layers: prepared activations times packed tiles, shared out among threads.
#include "bindings.hpp"

namespace engineroom {

void register_linear(nanobind::module_ &) {}

}  // namespace engineroom
