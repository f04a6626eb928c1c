// The kernels on any processor that the compiler builds for.
#define ER_ISA generic
#define ER_NAME "generic"
#include "vec_generic.hpp"

#include "../kernels.hpp"
#include "rows.inl"
#include "tile.inl"
#include "load_e4m3.inl"
#include "attend_caches.inl"
#include "attend_tiles.inl"
#include "attend_products.inl"
#include "attend_rows.inl"
#include "attend.inl"
#include "kv_write.inl"
#include "table.inl"

namespace engineroom {
extern const Kernels kernels_generic;
const Kernels kernels_generic = generic::table;
}  // namespace engineroom
