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

// What stands before the product: an RMS norm whose result is rounded to `dtype`, or nothing; then a new
// order of the columns, or none.
struct InputNorm {
    const float *weight = nullptr;  // [K]; nullptr: no norm
    float eps = 0;
    float offset = 0;
    Dtype dtype = Dtype::kF32;
    const std::int32_t *order = nullptr;  // [K]: column k of the product is order[k] of this; nullptr: k
};

// Rows [row0, row1) of x [rows][x_stride] into `to`. `scratch`: K floats, 2 K where there is an order.
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

struct Tiles {
    int begin, end;
};

// How many of `tiles` tiles of `bytes` bytes, the first of which begins at byte `start` of the
// layer, have their middle before byte `limit`.
int tiles_before(std::size_t limit, std::size_t start, std::size_t bytes, int tiles);

// Which tiles of a linear layer are thread `thread`'s of `threads`: a contiguous range of about
// equal bytes over all parts. Calls use(part, tiles) for each part or, where `paired`, for each pair
// of parts (of equal N), `part` being its first. pack_layer packs by the same shares, so that memory
// is first touched, and by that placed, where it will be read.
template <class Use>
void each_share(const LinearPart *parts, int num_parts, bool paired, int thread, int threads,
                Use use) {
    const int step = paired ? 2 : 1;
    const auto tile_bytes = [&](int part) {
        return parts[part].weight->tile_bytes + (paired ? parts[part + 1].weight->tile_bytes : 0);
    };
    const auto bytes_of = [&](int part) {
        return tile_bytes(part) * static_cast<std::size_t>(parts[part].weight->num_tiles());
    };
    std::size_t total = 0, start = 0;
    for (int part = 0; part < num_parts; part += step) total += bytes_of(part);
    const std::size_t share = static_cast<std::size_t>(thread);
    const std::size_t begin = total * share / static_cast<std::size_t>(threads);
    const std::size_t end = total * (share + 1) / static_cast<std::size_t>(threads);
    for (int part = 0; part < num_parts; part += step) {
        const std::size_t bytes = tile_bytes(part);
        const int tiles = parts[part].weight->num_tiles();
        use(part, Tiles{tiles_before(begin, start, bytes, tiles),
                        tiles_before(end, start, bytes, tiles)});
        start += bytes_of(part);
    }
}

// The scales of a tile that products with this form leave out, [48]: kChannel's; else nullptr.
const float *channel_scale(const PackedWeight &weight, int tile, Form form);

// Second digits of rows [row0, row0 + rows), which may have up to rows * stride / 32; returns how
// many they have. starts: stride / 32 + 1 integers of scratch.
int fine_digits(const Activations &from, int row0, int rows, FineDigits *out, std::int32_t *starts);

// Scratch of one thread.
std::size_t linear_scratch_bytes(int max_columns);

// Thread `thread` of `threads`' share of the tiles (each_share), for `rows` rows. No barrier inside.
// The result does not depend on `threads`.
void linear_tiles(const Kernels &kernels, const Linear &linear, const Activations &rows_in, int rows,
                  int thread, int threads, std::uint8_t *scratch);

}  // namespace engineroom
