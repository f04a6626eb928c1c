// The tile registers of AMX in software, for tests on machines without them: what tiles_amx.hpp asks
// of the processor, after the operations in Intel's Software Developer's Manual (volume 2, TDPBSSD,
// TDPBF16PS, TILELOADD). Where the processor would raise a fault, it says so and aborts.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tile_shapes.hpp"

namespace engineroom {
namespace amx {

struct TileState {
    bool configured = false;
    TileShapes shapes;
    std::uint8_t bytes[8][16][64];
};
static thread_local TileState t_state;

static void t_require(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "tile model: the processor would fault: %s\n", what);
    std::abort();
}
static int t_rows(int tile) {
    t_require(t_state.configured && tile >= 0 && tile < 8, "a tile without a shape");
    t_require(t_state.shapes.rows[tile] > 0, "a tile of no rows");
    return t_state.shapes.rows[tile];
}
static std::size_t t_row_bytes(int tile) { return t_state.shapes.row_bytes[tile]; }

static void t_shape(const TileShapes &shapes) {
    t_require(shapes.palette == 1 && shapes.start_row == 0, "palette");
    for (std::uint8_t byte : shapes.reserved) t_require(byte == 0, "reserved bytes");
    for (int i = 0; i < 16; ++i) {
        const int rows = shapes.rows[i], row_bytes = shapes.row_bytes[i];
        t_require(rows <= (i < 8 ? 16 : 0) && row_bytes <= (i < 8 ? 64 : 0), "a tile too large");
        t_require((rows == 0) == (row_bytes == 0), "rows without bytes, or bytes without rows");
    }
    t_state.shapes = shapes;
    t_state.configured = true;
    std::memset(t_state.bytes, 0, sizeof t_state.bytes);
}
static void t_release() {
    t_state.configured = false;
    std::memset(t_state.bytes, 0xa5, sizeof t_state.bytes);
}
template <int kTile>
static void t_zero() {
    t_rows(kTile);
    std::memset(t_state.bytes[kTile], 0, sizeof t_state.bytes[kTile]);
}
template <int kTile>
static void t_load(const void *from, std::ptrdiff_t stride) {
    const int rows = t_rows(kTile);
    t_zero<kTile>();
    for (int m = 0; m < rows; ++m)
        std::memcpy(t_state.bytes[kTile][m], static_cast<const char *>(from) + m * stride,
                    t_row_bytes(kTile));
}
template <int kTile>
static void t_store(void *to, std::ptrdiff_t stride) {
    for (int m = 0; m < t_rows(kTile); ++m)
        std::memcpy(static_cast<char *>(to) + m * stride, t_state.bytes[kTile][m],
                    t_row_bytes(kTile));
}
static void t_require_product(int c, int a, int b) {
    t_require(c != a && c != b && a != b, "one tile twice");
    t_require(t_rows(c) == t_rows(a) && t_row_bytes(c) == t_row_bytes(b), "the result's shape");
    t_require(t_row_bytes(a) == 4 * static_cast<std::size_t>(t_rows(b)), "the sum's length");
    t_require(t_row_bytes(c) % 4 == 0, "bytes that are no lanes");
}
template <int kC, int kA, int kB>
static void t_dot_int8() {
    t_require_product(kC, kA, kB);
    for (int m = 0; m < t_rows(kC); ++m)
        for (int k = 0; k < t_rows(kB); ++k)
            for (std::size_t n = 0; n < t_row_bytes(kC) / 4; ++n) {
                std::int32_t sum;
                std::memcpy(&sum, t_state.bytes[kC][m] + 4 * n, 4);
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<std::int8_t>(t_state.bytes[kA][m][4 * k + i]) *
                           static_cast<std::int8_t>(t_state.bytes[kB][k][4 * n + i]);
                std::memcpy(t_state.bytes[kC][m] + 4 * n, &sum, 4);
            }
}
static float t_bf16(const std::uint8_t *p) {
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
static float t_flushed(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
template <int kC, int kA, int kB>
static void t_dot_bf16() {
    t_require_product(kC, kA, kB);
    for (int m = 0; m < t_rows(kC); ++m) {
        float sums[16][2] = {};
        for (int k = 0; k < t_rows(kB); ++k)
            for (std::size_t n = 0; n < t_row_bytes(kC) / 4; ++n)
                for (int i = 0; i < 2; ++i)
                    sums[n][i] = t_flushed(std::fma(t_bf16(t_state.bytes[kA][m] + 4 * k + 2 * i),
                                                    t_bf16(t_state.bytes[kB][k] + 4 * n + 2 * i),
                                                    sums[n][i]));
        for (std::size_t n = 0; n < t_row_bytes(kC) / 4; ++n) {
            float c;
            std::memcpy(&c, t_state.bytes[kC][m] + 4 * n, 4);
            c = t_flushed(t_flushed(c) + t_flushed(sums[n][0] + sums[n][1]));
            std::memcpy(t_state.bytes[kC][m] + 4 * n, &c, 4);
        }
    }
}

}  // namespace amx
}  // namespace engineroom
