// Paged attention over a packed step, shared out among threads.
#include "bindings.hpp"

namespace engineroom {

void register_attention(nanobind::module_ &) {}

}  // namespace engineroom
