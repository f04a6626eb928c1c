// The kernels on avx512.
#define ER_ISA avx512
#define ER_NAME "avx512"
#include "vec_avx512.hpp"

#include "../kernels.hpp"
#include "rows.inl"
#include "tile.inl"
#include "attend_caches.inl"
#include "attend_tiles.inl"
#include "attend_products.inl"
#include "attend_rows.inl"
#include "attend.inl"
#include "kv_write.inl"
#include "table.inl"

namespace engineroom {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = avx512::table;
}  // namespace engineroom
