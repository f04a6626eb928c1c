// The tile registers of AMX, one instruction a function; tiles_model.hpp has the same in software.
//
// Inline assembly: the intrinsics of GCC 12 neither take a tile's number from a template nor tell the
// compiler that they read and write memory.
#pragma once

#include <cstddef>

#include "tile_shapes.hpp"

namespace engineroom {
namespace amx {

// Gives the tile registers their shapes and clears them.
ER_INLINE void t_shape(const TileShapes &shapes) {
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}
// Back to the initial state: nothing that a context switch must save, and the core may sleep deeply.
ER_INLINE void t_release() { __asm__ volatile("tilerelease"); }
template <int kTile>
ER_INLINE void t_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
ER_INLINE void t_load(const void *from, std::ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile)
                     : "memory");
}
template <int kTile>
ER_INLINE void t_store(void *to, std::ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile)
                     : "memory");
}
// c[m][n] += the products of bytes a[m][k] and b[k / 4][n][k % 4], both signed, over all k: exact.
template <int kC, int kA, int kB>
ER_INLINE void t_dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
// The same of bf16 a[m][k] and b[k / 2][n][k % 2], in fp32: even and odd k are summed apart in
// ascending order, these two sums are added, and the result is added to c.
template <int kC, int kA, int kB>
ER_INLINE void t_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace amx
}  // namespace engineroom
