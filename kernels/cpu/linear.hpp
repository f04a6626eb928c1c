// Linear layers: rows made ready once, then multiplied by packed tiles that threads share out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace engineroom {

// ------------------------------------------------------------------------------ prepared rows

// Bytes of `rows` prepared rows of K columns; 64-byte aligned parts, row stride K rounded up to 32.
std::size_t prepared_bytes(Form form, int columns, int rows);

// Lays an Activations out over `memory` (64-byte aligned).
Activations place_activations(Form form, int columns, int rows, std::uint8_t *memory);

// What stands before the product: an RMS norm whose result is rounded to `dtype`, or nothing.
struct InputNorm {
    const float *weight = nullptr;  // [K]; nullptr: no norm
    float eps = 0;
    float offset = 0;
    Dtype dtype = Dtype::kF32;
};

// Rows [row0, row1) of x [rows][x_stride] into `to`. `scratch`: K floats.
void prepare_rows(const Kernels &kernels, const Activations &to, const float *x,
                  std::ptrdiff_t x_stride, int columns, int row0, int row1, const InputNorm &norm,
                  float *scratch);

// ------------------------------------------------------------------------------------ products

// One weight of a linear layer and where its result goes: out[row * out_stride + n].
struct LinearPart {
    const PackedWeight *weight = nullptr;
    const float *bias = nullptr;  // [N] or nullptr
    float *out = nullptr;
    std::ptrdiff_t out_stride = 0;
};

struct Linear {
    const LinearPart *parts = nullptr;  // all of the same K, reading the same rows
    int num_parts = 0;
    Epilogue epilogue = Epilogue::kStore;
    Dtype dtype = Dtype::kF32;  // rounding of every intermediate result; kF32 rounds nothing
    const float *residual = nullptr;
    std::ptrdiff_t residual_stride = 0;
};

// Multiplies finished int8 products out [rows][48] of a tile by the scales that `tile` and
// `tile_fine` left out: kChannel's, and no other's.
void channel_scale(const PackedWeight &weight, int tile, int rows, float *out);

// Scratch of one thread.
std::size_t linear_scratch_bytes(int max_columns);

// Thread `thread` of `threads`' share of the tiles, for `rows` rows. No barrier inside; tiles are
// shared out in contiguous ranges of about equal bytes. The result does not depend on `threads`.
void linear_tiles(const Kernels &kernels, const Linear &linear, const Activations &rows_in, int rows,
                  int thread, int threads, std::uint8_t *scratch);

}  // namespace engineroom
