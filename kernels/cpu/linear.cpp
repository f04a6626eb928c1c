// Linear layers: rows made ready once, then multiplied by packed tiles that threads share out.
#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed_matrix.hpp"
#include "pool.hpp"

namespace engineroom {
namespace {

// What bounds the blocks. Prepared rows of a block stay in a core's L2 while its tiles pass by
// (they and two tiles' results take about half of 1 MB); its columns bound a tile's scratch.
constexpr std::size_t kBlockBytes = std::size_t{384} << 10;
// Of bf16: a tile in 12 bits is unpacked once a block, and its rows come from the L3 fast enough.
constexpr std::size_t kBlockBytesBF16 = std::size_t{768} << 10;
constexpr int kMaxRows = 512;
constexpr int kShareRows = 128;
constexpr int kMaxColumns = 2048;
constexpr int kFineRows = 64;  // whose second digits are sorted together: their results stay in the L1

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::size_t stride_of(int columns) { return (static_cast<std::size_t>(columns) + 31) / 32 * 32; }

std::size_t element_bytes(Form form) {
    return form == Form::kF32 ? 4 : form == Form::kBF16 ? 2 : 1;
}

// How many shares of rows the threads take, a power of two; those of one share split its tiles. A thread
// with rows of its own finds what it made of them, in this layer and the one before, in its own cache,
// but every share reads all weights: with fewer rows the memory would be what takes time.
int shares_of_rows(int rows, int threads) {
    int shares = 1;
    while (threads % (2 * shares) == 0 && rows / (2 * shares) >= kShareRows) shares *= 2;
    return shares;
}

// Rows of a block.
int block_rows(Form form, std::size_t stride) {
    const std::size_t most = form == Form::kBF16 ? kBlockBytesBF16 : kBlockBytes;
    const std::size_t rows = most / (stride * element_bytes(form));
    return static_cast<int>(std::clamp<std::size_t>(rows / 8 * 8, 8, kMaxRows));
}

// Room for the second digits of a block's rows, of up to so many columns.
std::size_t digits_bytes(int columns) {
    const std::size_t most = std::max(kBlockBytes, 8 * stride_of(columns));
    return padded(most / kGroup * sizeof(FineDigits));
}

}  // namespace

// ---------------------------------------------------------------------------- prepared rows

std::size_t prepared_bytes(Form form, int columns, int rows) {
    const std::size_t elements = stride_of(columns) * static_cast<std::size_t>(rows);
    const std::size_t bytes = padded(elements * element_bytes(form));
    if (form != Form::kInt8) return bytes;
    return 2 * bytes + 4 * padded(elements / 32 * 4) + 2 * padded(elements / 16 * 4) +
           padded(static_cast<std::size_t>(rows) * 4);
}

Activations place_activations(Form form, int columns, int rows, std::uint8_t *memory) {
    const std::size_t stride = stride_of(columns);
    const std::size_t elements = stride * static_cast<std::size_t>(rows);
    Activations a;
    a.form = form;
    a.stride = static_cast<std::ptrdiff_t>(stride);
    switch (form) {
        case Form::kF32: a.f32 = reinterpret_cast<const float *>(memory); break;
        case Form::kBF16: a.bf16 = reinterpret_cast<const std::uint16_t *>(memory); break;
        case Form::kInt8: {
            const auto take = [&memory](std::size_t bytes) {
                std::uint8_t *at = memory;
                memory += padded(bytes);
                return at;
            };
            const std::size_t groups = elements / 32 * 4, halves = elements / 16 * 4;
            a.q = reinterpret_cast<const std::int8_t *>(take(elements));
            a.scale = reinterpret_cast<const float *>(take(groups));
            a.sum16 = reinterpret_cast<const std::int32_t *>(take(halves));
            a.scaled_sum = reinterpret_cast<const float *>(take(groups));
            a.fine_count =
                reinterpret_cast<const std::int32_t *>(take(static_cast<std::size_t>(rows) * 4));
            a.fine_group = reinterpret_cast<const std::int32_t *>(take(groups));
            a.fine_q = reinterpret_cast<const std::int8_t *>(take(elements));
            a.fine_scale = reinterpret_cast<const float *>(take(groups));
            a.fine_sum16 = reinterpret_cast<const std::int32_t *>(take(halves));
            break;
        }
    }
    return a;
}

void prepare_rows(const Kernels &kernels, const Activations &to, const float *x,
                  std::ptrdiff_t x_stride, int columns, int row0, int row1, const InputNorm &norm,
                  float *scratch) {
    const int stride = static_cast<int>(to.stride);
    for (int row = row0; row < row1; ++row) {
        const float *from = x + row * x_stride;
        if (norm.weight != nullptr) {
            const bool rounds_later = to.form == Form::kBF16 && norm.dtype == Dtype::kBF16;
            kernels.rms_norm(from, norm.weight, scratch, columns, norm.eps, norm.offset,
                             rounds_later ? Dtype::kF32 : norm.dtype);
            from = scratch;
        }
        if (norm.order != nullptr) {
            float *ordered = scratch + columns;
            for (int k = 0; k < columns; ++k) ordered[k] = from[norm.order[k]];
            from = ordered;
        }
        const std::ptrdiff_t at = row * to.stride;
        switch (to.form) {
            case Form::kF32: {
                float *out = const_cast<float *>(to.f32) + at;
                std::memcpy(out, from, static_cast<std::size_t>(columns) * sizeof(float));
                std::fill(out + columns, out + stride, 0.0f);
                break;
            }
            case Form::kBF16:
                kernels.to_bf16(from, columns, stride, const_cast<std::uint16_t *>(to.bf16) + at);
                break;
            case Form::kInt8:
                kernels.to_int8(
                    from, columns, stride,
                    Int8Row{const_cast<std::int8_t *>(to.q) + at,
                            const_cast<float *>(to.scale) + at / 32,
                            const_cast<std::int32_t *>(to.sum16) + at / 16,
                            const_cast<float *>(to.scaled_sum) + at / 32,
                            const_cast<std::int32_t *>(to.fine_count) + row,
                            const_cast<std::int32_t *>(to.fine_group) + at / 32,
                            const_cast<std::int8_t *>(to.fine_q) + at,
                            const_cast<float *>(to.fine_scale) + at / 32,
                            const_cast<std::int32_t *>(to.fine_sum16) + at / 16});
                break;
        }
    }
}

// --------------------------------------------------------------------------------- products

const float *channel_scale(const PackedWeight &weight, int tile, Form form) {
    const bool is_left_out = form == Form::kInt8 || weight.elements == Elements::kE4M3;
    const bool is_first =  // what a tile's scales begin with
        weight.scaling == Scaling::kChannel || weight.scaling == Scaling::kRow16;
    return is_left_out && is_first
               ? reinterpret_cast<const float *>(weight.scales(tile))
               : nullptr;
}

int fine_digits(const Activations &from, int row0, int rows, FineDigits *out, std::int32_t *starts) {
    const int groups = static_cast<int>(from.stride / kGroup);
    const std::int32_t *group = from.fine_group + static_cast<std::ptrdiff_t>(row0) * groups;
    const std::int32_t *count = from.fine_count + row0;
    int total = 0;
    for (int begin = 0; begin < rows; begin += kFineRows) {
        const int end = std::min(begin + kFineRows, rows);
        std::fill(starts, starts + groups + 1, 0);
        for (int row = begin; row < end; ++row)
            for (int j = 0; j < count[row]; ++j) ++starts[group[row * groups + j] + 1];
        for (int g = 0; g < groups; ++g) starts[g + 1] += starts[g];
        for (int row = begin; row < end; ++row)
            for (int j = 0; j < count[row]; ++j) {
                const int at = row * groups + j;
                out[total + starts[group[at]]++] = FineDigits{group[at], row, at, 1};
            }
        total += starts[groups];
    }
    for (int i = total - 2; i >= 0; --i)
        if (out[i].group == out[i + 1].group) out[i].of_group = out[i + 1].of_group + 1;
    return total;
}

namespace {

// One thread's part of one linear layer, while it lasts.
struct Work {
    const Kernels &kernels;
    const Linear &linear;
    const Activations &from;
    float *first;           // [kMaxRows][48]: a tile's results
    float *second;          // the same, of the tile paired with it
    FineDigits *digits;     // of the rows at hand
    std::uint8_t *scratch;  // of a kernel
    int num_digits = 0;

    // Products of rows [row0, row0 + rows).
    void multiply(const PackedWeight &weight, int tile, int row0, int rows, float *to) const {
        for (int k0 = 0; k0 < weight.num_columns; k0 += kMaxColumns) {
            const int k1 = std::min(k0 + kMaxColumns, weight.num_columns);
            kernels.tile(weight, tile, k0, k1, from, row0, rows, k0 == 0, to, scratch);
        }
        if (num_digits > 0)
            kernels.tile_fine(weight, tile, from, row0, digits, num_digits, to);
    }

    void finish(const LinearPart *parts, int tile, int row0, int rows) const {
        const LinearPart &part = parts[0];
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(tile) * kTileRows;
        const auto bias_of = [at](const LinearPart &of) {
            return of.bias != nullptr ? of.bias + at : nullptr;
        };
        const auto scale_of = [&](const LinearPart &of) {
            return channel_scale(*of.weight, tile, from.form);
        };
        FinishedTile t;
        multiply(*part.weight, tile, row0, rows, first);
        t.y = first;
        t.scale = scale_of(part);
        t.bias = bias_of(part);
        if (is_paired(linear.epilogue)) {
            multiply(*parts[1].weight, tile, row0, rows, second);
            t.up = second;
            t.up_scale = scale_of(parts[1]);
            t.up_bias = bias_of(parts[1]);
        }
        if (linear.epilogue == Epilogue::kAddResidual) {
            t.residual = linear.residual + row0 * linear.residual_stride + at;
            t.residual_stride = linear.residual_stride;
        }
        t.out = part.out + row0 * part.out_stride + at;
        t.out_stride = part.out_stride;
        t.rows = rows;
        t.outputs = std::min(kTileRows, part.weight->num_rows - tile * kTileRows);
        t.epilogue = linear.epilogue;
        t.dtype = linear.dtype;
        kernels.finish(t);
    }
};

}  // namespace

int tiles_before(std::size_t limit, std::size_t start, std::size_t bytes, int tiles) {
    if (limit <= start + bytes / 2) return 0;
    const std::size_t before = (limit - start - bytes / 2 + bytes - 1) / bytes;
    return static_cast<int>(std::min(before, static_cast<std::size_t>(tiles)));
}

std::size_t linear_scratch_bytes(int max_columns) {
    return 2 * sizeof(float) * kMaxRows * kTileRows + digits_bytes(max_columns) +
           padded(tile_scratch_bytes(std::min(max_columns, kMaxColumns)));
}

void linear_tiles(const Kernels &kernels, const Linear &linear, const Activations &rows_in,
                  int rows, int thread, int threads, std::uint8_t *scratch) {
    if (rows == 0 || linear.num_parts == 0) return;
    float *first = reinterpret_cast<float *>(scratch);
    float *second = first + kMaxRows * kTileRows;
    std::uint8_t *digits = reinterpret_cast<std::uint8_t *>(second + kMaxRows * kTileRows);
    Work work{kernels, linear, rows_in, first, second, reinterpret_cast<FineDigits *>(digits),
              digits + digits_bytes(static_cast<int>(rows_in.stride))};
    const int row_shares = shares_of_rows(rows, threads), tile_shares = threads / row_shares;
    const int row_share = thread / tile_shares, tile_share = thread % tile_shares;
    const auto at = [&](int share) { return static_cast<int>(std::int64_t{rows} * share / row_shares); };
    const int end = at(row_share + 1);
    const int block = block_rows(rows_in.form, static_cast<std::size_t>(rows_in.stride));
    for (int row0 = at(row_share); row0 < end; row0 += block) {
        const int count = std::min(block, end - row0);
        if (rows_in.form == Form::kInt8)
            work.num_digits = fine_digits(rows_in, row0, count, work.digits,
                                          reinterpret_cast<std::int32_t *>(work.scratch));
        each_share(linear.parts, linear.num_parts, is_paired(linear.epilogue), tile_share, tile_shares,
                   [&](int part, Tiles mine) {
                       for (int tile = mine.begin; tile < mine.end; ++tile)
                           work.finish(linear.parts + part, tile, row0, count);
                   });
    }
}

}  // namespace engineroom
