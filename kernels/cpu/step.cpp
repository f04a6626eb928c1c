// A lowered Program: a list of operations that one call runs.
#include "bindings.hpp"

namespace engineroom {

void register_step(nanobind::module_ &) {}

}  // namespace engineroom
