// The kernels on neon with the dot product instructions.
#define ER_ISA neon
#define ER_NAME "neon"
#include "vec_neon.hpp"

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
extern const Kernels kernels_neon;
const Kernels kernels_neon = neon::table;
}  // namespace engineroom
