// The kernels on avx2.
#define ER_ISA avx2
#define ER_NAME "avx2"
#include "vec_avx2.hpp"

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
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = avx2::table;
}  // namespace engineroom
