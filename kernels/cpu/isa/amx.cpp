// The AVX-512 kernels with products by AMX (Sapphire Rapids and later): `amx::product` is their tile.
//
// int8: 16 rows at a time; what is left over and everything else goes to the AVX-512 unit. A group
// of 32 activations has a scale of its own, so a 16 x 16 tile of its exact integer products leaves
// the registers by way of the L1 and is scaled there with the AVX-512 unit's operations in the AVX-512
// unit's order: the two tables agree in every bit, whatever rows each of them takes. A tile's shape
// is a group: 8 of the 16 steps that the instruction could sum over. It costs as much as a full one,
// which the scaling hides: per row and output vector 3 vector operations, where the AVX-512 unit has
// 11.
//
// bf16: every number of rows, for the instruction sums 32 columns apart before it adds them, unlike
// vdpbf16ps, and a row must not depend on how many rows are beside it.
//
// The shapes are set on entry and released on return: between calls a thread has no tile state that
// a context switch would save, and ldtilecfg's some 20 cycles are little beside the thousands here.
#define ER_ISA amx
#include "vec_avx512.hpp"

namespace engineroom {
namespace amx {
using namespace avx512;
}
}  // namespace engineroom

#include "../kernels.hpp"
#include "tile.inl"
#if defined(ENGINEROOM_TILE_MODEL)
#include "tiles_model.hpp"
#else
#include "tiles_amx.hpp"
#endif

namespace engineroom {
namespace amx {

constexpr int kBlock = 16;  // rows of a tile
constexpr int kSums = kBlock * 16;

// --------------------------------------------------------------------------------------- int8

// Results in tiles 0 and 1, activations in 2, weights in 3.
template <int kColumns>
static constexpr TileShapes int8_shapes() {
    TileShapes shapes;
    for (int tile = 0; tile < 4; ++tile) {
        shapes.rows[tile] = tile < 3 ? kBlock : kColumns / 4;
        shapes.row_bytes[tile] = tile == 2 ? kColumns : 64;
    }
    return shapes;
}

// to [16][16] = rows q times the weights of one group or part of it.
template <int kTile>
ER_INLINE void multiply_part(const std::int8_t *q, std::ptrdiff_t stride,
                             const std::uint8_t *weights, std::int32_t *to) {
    t_zero<kTile>();
    t_load<2>(q, stride);
    t_load<3>(weights, kWordBytes);
    t_dot_int8<kTile, 2, 3>();
    t_store<kTile>(to, 64);
}

// f += the products of part `step`, and with a group's last part its minima's share.
template <class Ready>
ER_INLINE void scale_part(F (&f)[kBlock], const std::int32_t *sums, const std::uint8_t *scales,
                          int step, int v, const Int8Rows &a) {
    const std::ptrdiff_t groups32 = a.stride / 32;
    const int g = step / Ready::kParts;
    const F d = Ready::scale(scales, step, v);
#pragma GCC unroll 16
    for (int r = 0; r < kBlock; ++r)
        f[r] = f_fma(f_of_i(i_load(sums + 16 * r)),
                     product_scale<Ready>(d, f_set(a.scale[r * groups32 + g])), f[r]);
    if constexpr (Ready::kHasMinimum) {
        const F m = Ready::minimum(scales, g, v);
#pragma GCC unroll 16
        for (int r = 0; r < kBlock; ++r)
            f[r] = f_fma(m, f_set(a.scaled_sum[r * groups32 + g]), f[r]);
    }
}

// The same of both halves of a group.
ER_INLINE void scale_halves(F (&f)[kBlock], const std::int32_t *sums, const std::uint8_t *scales,
                            int group, int v, const Int8Rows &a) {
    const I d = ScaleWhole16::both(scales, group, v), low = i_set(0xffff);
#pragma GCC unroll 16
    for (int r = 0; r < kBlock; ++r) {
        const I both = i_or(i_shift16(i_load(sums + 16 * r)), i_and(i_load(sums + kSums + 16 * r), low));
        f[r] = f_fma(f_of_i(i_dot_words(both, d)), f_set(a.scale[r * (a.stride / 32) + group]), f[r]);
    }
}

// out [16][48] from `groups` groups of signed weights [K/4][48][4]. Two parts at a time: while one
// is scaled the other is multiplied.
template <class Ready>
static __attribute__((noinline)) void int8_block(const std::uint8_t *weights,
                                                 const std::uint8_t *scales, int groups,
                                                 const Int8Rows &a, bool first, float *out,
                                                 std::int32_t *sums, Fetch fetch) {
    static_assert(Ready::kParts == 1 || !Ready::kHasMinimum, "minima follow a group's only part");
    constexpr int kColumns = kGroup / Ready::kParts;
    constexpr int kPartBytes = kColumns / 4 * kWordBytes;
    const int steps = groups * Ready::kParts;
    for (int v = 0; v < kTileVectors; ++v) {
        F f[kBlock];
#pragma GCC unroll 16
        for (int r = 0; r < kBlock; ++r)
            f[r] = first ? f_zero() : f_load(out + r * kTileRows + 16 * v);
        const std::uint8_t *from = weights + 64 * v;
        const std::int8_t *q = a.q;
        for (int step = 0; step < steps; step += 2, q += 2 * kColumns, from += 2 * kPartBytes) {
            if (v == 0) fetch_step(fetch);
            const bool has_second = step + 1 < steps;
            multiply_part<0>(q, a.stride, from, sums);
            if (has_second)
                multiply_part<1>(q + kColumns, a.stride, from + kPartBytes, sums + kSums);
            if constexpr (kIsWhole<Ready>) {
                scale_halves(f, sums, scales, step / 2, v, a);
            } else {
                scale_part<Ready>(f, sums, scales, step, v, a);
                if (has_second) scale_part<Ready>(f, sums + kSums, scales, step + 1, v, a);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kBlock; ++r) f_store(out + r * kTileRows + 16 * v, f[r]);
    }
}

// Groups [g0, g1) less their bias, signed: [K/4][48][4].
template <class Quants>
static __attribute__((noinline)) void signed_groups(const std::uint8_t *quants, int g0, int g1,
                                                    int bias, std::uint8_t *to) {
    const I zero_point = i_set_bytes(static_cast<std::uint8_t>(bias));
    for (int g = g0; g < g1; ++g) {
        const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g) * Quants::kBytes;
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4, to += kWordBytes)
            for (int v = 0; v < kTileVectors; ++v)
                i_store(to + 64 * v, _mm512_sub_epi8(Quants::word(group, k4, v), zero_point));
    }
}

// As kernels.hpp's tile; `rows` is a multiple of 16.
template <class Quants, class Scale>
static void int8_product(const PackedWeight &w, int tile, int k0, int k1, const Activations &a,
                         int row0, int rows, bool first, float *out, std::uint8_t *scratch) {
    using Ready = Prepared<Scale>;
    static constexpr TileShapes shapes = int8_shapes<kGroup / Scale::kParts>();
    const std::uint8_t *scales = w.scales(tile), *quants = w.quants(tile);
    std::int32_t *sums = reinterpret_cast<std::int32_t *>(scratch);
    float *ready = reinterpret_cast<float *>(sums + 2 * kSums);
    const int most = least(kChunk, (k1 - k0 + kGroup - 1) / kGroup * kGroup);  // columns of a chunk
    std::uint8_t *weights = reinterpret_cast<std::uint8_t *>(ready + Ready::kFloats * most / kGroup);
    t_shape(shapes);
    for (int c0 = k0; c0 < k1; c0 += kChunk) {
        const int c1 = least(c0 + kChunk, k1), groups = (c1 - c0) / kGroup;
        if constexpr (!kIsWhole<Scale>) unpack_scales<Scale>(scales, c0 / kGroup, c1 / kGroup, ready);
        signed_groups<Quants>(quants, c0 / kGroup, c1 / kGroup, w.bias, weights);
        // The next chunk follows this one in memory; behind the last lies the next tile.
        const int next = c1 / kGroup * Quants::kBytes, bytes = groups * Quants::kBytes;
        const int fetches = rows / kBlock * ((groups * Scale::kParts + 1) / 2);
        Fetch fetch{quants + next + (c1 < k1 ? 0 : w.scales_bytes),
                    (bytes / 64 + fetches - 1) / fetches};
        for (int row = 0; row < rows; row += kBlock) {
            const std::ptrdiff_t at = (row0 + row) * a.stride + c0;
            const Int8Rows from{a.q + at, a.scale + at / 32, a.sum16 + at / 16,
                                a.scaled_sum + at / 32, a.stride};
            int8_block<Ready>(weights, prepared<Scale>(scales, c0 / kGroup, ready), groups, from,
                              first && c0 == k0, out + row * kTileRows, sums, fetch);
            fetch.next += bytes * kBlock / rows;
        }
    }
    t_release();
}

// --------------------------------------------------------------------------------------- bf16

constexpr int kDepth = 32;  // columns of one step
constexpr int kStepBytes = kDepth / 2 * kWordBytes;

// Results in tiles 0, 1, 2 (16 outputs each), activations in 3, weights in 4, 5, 6.
static TileShapes bf16_shapes(int rows) {
    TileShapes shapes;
    for (int tile = 0; tile < 7; ++tile) {
        shapes.rows[tile] = static_cast<std::uint8_t>(tile < 4 ? rows : kDepth / 2);
        shapes.row_bytes[tile] = 64;
    }
    return shapes;
}

// One step of up to 16 rows.
ER_INLINE void bf16_step(const std::uint16_t *x, std::ptrdiff_t stride, const std::uint8_t *weights) {
    t_load<3>(x, 2 * stride);
    t_load<4>(weights, kWordBytes);
    t_dot_bf16<0, 3, 4>();
    t_load<5>(weights + 64, kWordBytes);
    t_dot_bf16<1, 3, 5>();
    t_load<6>(weights + 128, kWordBytes);
    t_dot_bf16<2, 3, 6>();
}

// As kernels.hpp's tile.
static __attribute__((noinline)) void bf16_product(const PackedWeight &w, int tile, int k0, int k1,
                                                   const Activations &a, int row0, int rows,
                                                   bool first, float *out, std::uint8_t *scratch) {
    const std::uint8_t *weights = w.quants(tile);
    const int whole = k1 / kDepth * kDepth;  // the columns behind are multiplied from a copy
    if (whole < k1) {
        const std::size_t bytes = static_cast<std::size_t>((k1 - whole + 1) / 2) * kWordBytes;
        std::memcpy(scratch, weights + static_cast<std::ptrdiff_t>(whole / 2) * kWordBytes, bytes);
        std::memset(scratch + bytes, 0, kStepBytes - bytes);
    }
    int shaped = 0;
    for (int c0 = k0; c0 < k1; c0 += kChunk) {
        const int c1 = least(c0 + kChunk, k1);
        for (int row = 0; row < rows; row += kBlock) {
            const int count = least(kBlock, rows - row);
            if (count != shaped) t_shape(bf16_shapes(count));
            shaped = count;
            float *to = out + row * kTileRows;
            constexpr std::ptrdiff_t kStride = kTileRows * sizeof(float);
            if (first && c0 == k0) {
                t_zero<0>(), t_zero<1>(), t_zero<2>();
            } else {
                t_load<0>(to, kStride), t_load<1>(to + 16, kStride), t_load<2>(to + 32, kStride);
            }
            const std::uint16_t *x = a.bf16 + (row0 + row) * a.stride;
            for (int k = c0; k < c1; k += kDepth) {
                const std::uint8_t *from =
                    weights + static_cast<std::ptrdiff_t>(k / 2) * kWordBytes;
                if (row == 0)
                    for (int i = 0; i < kStepBytes / 64; ++i) prefetch_far(from + kAhead + 64 * i);
                bf16_step(x + k, a.stride, k < whole ? from : scratch);
            }
            t_store<0>(to, kStride), t_store<1>(to + 16, kStride), t_store<2>(to + 32, kStride);
        }
    }
    t_release();
}

// ----------------------------------------------------------------------------------- dispatch

void product(const PackedWeight &w, int tile, int k0, int k1, const Activations &a, int row0,
             int rows, bool first, float *out, std::uint8_t *scratch) {
    if (a.form == Form::kBF16 && w.elements == Elements::kBF16) {
        bf16_product(w, tile, k0, k1, a, row0, rows, first, out, scratch);
        return;
    }
    // Unsigned bytes without a bias of 128 would not fit signed ones.
    const bool fits = w.elements != Elements::kU8 || w.bias == 128;
    const int blocks = a.form == Form::kInt8 && fits ? rows / kBlock * kBlock : 0;
    if (blocks > 0)
        with_types(w, tile, [&](auto quants, auto scale) {
            int8_product<decltype(quants), decltype(scale)>(w, tile, k0, k1, a, row0, blocks, first,
                                                            out, scratch);
        });
    if (blocks < rows)
        kernels_avx512.tile(w, tile, k0, k1, a, row0 + blocks, rows - blocks, first,
                            out + blocks * kTileRows, scratch);
}

}  // namespace amx
}  // namespace engineroom
