// Weights of every format, rows prepared for them, and their products in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "compact.hpp"
#include "dequant.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "selftest_numbers.hpp"

namespace engineroom {
namespace selftest {

struct FormatInfo {
    const char *name;
    int halves[2];  // where a block has its half-precision scales, or -1
    int floats = 0;             // scales that a block begins with
    bool has_exponent = false;  // it begins with one
    bool has_fp8 = false;       // behind the floats; multiplied as bf16, not as int8

    bool is_bf16() const { return has_fp8 || std::strcmp(name, "BF16") == 0; }
};
inline const FormatInfo kFormats[] = {
    {"F32", {-1, -1}}, {"F16", {-1, -1}}, {"BF16", {-1, -1}}, {"Q4_0", {0, -1}},
    {"Q4_1", {0, 2}},  {"Q5_0", {0, -1}}, {"Q5_1", {0, 2}},   {"Q8_0", {0, -1}},
    {"Q4_K", {0, 2}},  {"Q5_K", {0, 2}},  {"Q6_K", {208, -1}}, {"INT8", {-1, -1}},
    {"INT4", {-1, -1}}, {"I4G32", {4, -1}, 1}, {"I4G128", {4, -1}, 1},
    {"I8G32", {4, -1}, 1}, {"MXFP4", {-1, -1}, 0, true}, {"NVFP4", {0, 2}},
    {"NF4", {-1, -1}, 1}, {"FP4", {-1, -1}, 1}, {"FP8", {-1, -1}, 0, false, true}, {"FP8_128", {-1, -1}, 1, false, true},
};

// A weight of random blocks: as the checkpoint holds it, in tiles, and its values.
struct Weight {
    std::vector<std::uint8_t> raw;
    std::unique_ptr<Memory> tiles;
    PackedWeight packed;
    std::vector<float> values;  // [N][K]

    Weight(const FormatInfo &info, int num_rows, int num_columns, Random &random) {
        const DequantFormat &format = *find_dequant_format(info.name);
        const std::size_t elements = static_cast<std::size_t>(num_rows) * num_columns;
        const std::size_t blocks = num_columns / format.block_elements;
        const std::size_t row_bytes = format.row_bytes(num_columns);
        raw.resize(row_bytes * num_rows);
        for (std::size_t at = 0; at < raw.size(); at += row_bytes) {
            for (std::size_t i = 0; i < format.header_bytes; i += 4) {
                const float d = random.between(-1e-4f, 1e-3f);
                std::memcpy(raw.data() + at + i, &d, 4);
            }
            for (std::size_t b = 0; b < blocks; ++b)
                fill(raw.data() + at + format.header_bytes + b * format.block_bytes, info, format,
                     random);
        }
        if (std::strcmp(info.name, "NVFP4") == 0) {  // the second tile's are no whole numbers
            const std::uint16_t tiny = 0x0401;
            std::memcpy(raw.data() + kTileRows * row_bytes + format.header_bytes, &tiny, 2);
        }
        values.resize(elements);
        for (int n = 0; n < num_rows; ++n)
            format.run(raw.data() + n * row_bytes,
                       values.data() + static_cast<std::size_t>(n) * num_columns, blocks);
        packed = packed_layout(info.name, num_rows, num_columns);
        tiles = std::make_unique<Memory>(packed_bytes(packed), 0);
        pack_tiles(info.name, raw.data(), packed, tiles->data(), 0, packed.num_tiles());
        packed.data = tiles->data();
    }

    // Makes `values` what int8 rows multiply: those of a table are rounded.
    void round_values() {
        if (packed.elements != Elements::kNF4 && packed.elements != Elements::kFP4) return;
        const CodeTable &table = table_of(packed.elements);
        for (std::size_t i = 0; i < values.size(); ++i) {
            float absmax;
            std::memcpy(&absmax, raw.data() + i / 64 * 36, 4);
            const std::uint8_t pair = raw[i / 64 * 36 + 4 + i % 64 / 2];
            const int u = table.units[i % 2 ? pair & 15 : pair >> 4];
            values[i] = absmax * table.step * static_cast<float>(u - 128);
        }
    }

    // The same bf16 in 12 bits; K is a multiple of 8.
    void compact() {
        const auto rows_of = [&](int tile) {
            return std::min(kTileRows, packed.num_rows - tile * kTileRows);
        };
        const std::size_t from_tile = static_cast<std::size_t>(kTileRows) * 2 * packed.num_columns;
        std::vector<CompactTile> tables;
        for (int tile = 0; tile < packed.num_tiles(); ++tile)
            tables.push_back(
                count_compact(raw.data() + tile * from_tile, rows_of(tile), packed.num_columns));
        if (!make_compact(packed, tables)) std::abort();
        tiles = std::make_unique<Memory>(packed_bytes(packed), 0);
        packed.data = tiles->data();
        for (int tile = 0; tile < packed.num_tiles(); ++tile)
            pack_compact(raw.data() + tile * from_tile, rows_of(tile), packed, tables[tile],
                         tiles->data() + tile * packed.tile_bytes);
    }

    static void fill(std::uint8_t *block, const FormatInfo &info, const DequantFormat &format,
                     Random &random) {
        if (format.block_elements == 1) {
            const float x = random.normal();
            if (format.block_bytes == 4) {
                std::memcpy(block, &x, 4);
                return;
            }
            const bool is_half = info.name[0] == 'F';
            const float y = static_cast<float>(rounded(x, is_half ? Dtype::kF16 : Dtype::kBF16));
            // Subnormal halves are not made here: f16_bits knows normal ones.
            const float z = is_half && std::fabs(y) < 0x1p-14f ? 0.0f : y;
            const std::uint16_t bits = is_half ? f16_bits(z) : bf16_bits(z);
            std::memcpy(block, &bits, 2);
            return;
        }
        for (std::size_t i = 0; i < format.block_bytes; ++i)
            block[i] = static_cast<std::uint8_t>(random.next());
        for (int i = 0; i < info.floats; ++i) {
            const float d = random.between(-1e-3f, 1e-2f);
            std::memcpy(block + 4 * i, &d, 4);
        }
        for (std::size_t i = 4 * info.floats; info.has_fp8 && i < format.block_bytes; ++i)
            if ((block[i] & 0x7f) == 0x7f) block[i] = 0;  // NaN
        if (info.has_exponent) block[0] = static_cast<std::uint8_t>(117 + random.below(8));
        for (int at : info.halves) {
            if (at < 0) continue;
            double d = rounded(random.between(0.01f, 0.05f), Dtype::kF16);
            if (random.below(8) == 0) d = -d;
            const std::uint16_t bits = f16_bits(static_cast<float>(d));
            std::memcpy(block + at, &bits, 2);
        }
    }
};

// Rows prepared by the table itself, and the values that they stand for.
struct Rows {
    std::unique_ptr<Memory> memory;
    Activations ready;
    std::vector<double> values;  // [rows][K]

    Rows(const Kernels &k, Form form, const std::vector<float> &x, int rows, int columns)
        : values(x.begin(), x.end()) {
        memory = std::make_unique<Memory>(prepared_bytes(form, columns, rows));
        ready = place_activations(form, columns, rows, memory->data());
        prepare_rows(k, ready, x.data(), columns, columns, 0, rows, InputNorm(), nullptr);
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < columns; ++i) {
                double &value = values[static_cast<std::size_t>(r) * columns + i];
                if (form == Form::kBF16) value = bf16_value(ready.bf16[r * ready.stride + i]);
                if (form == Form::kInt8)
                    value = static_cast<double>(ready.scale[(r * ready.stride + i) / 32]) *
                            ready.q[r * ready.stride + i];
            }
        for (int r = 0; r < rows && form == Form::kInt8; ++r)
            for (int j = 0; j < ready.fine_count[r]; ++j) {
                const std::ptrdiff_t at = r * (ready.stride / 32) + j;
                const int first = 32 * ready.fine_group[at];
                const double step = ready.fine_scale[at];
                for (int i = first; i < std::min(first + 32, columns); ++i)
                    values[static_cast<std::size_t>(r) * columns + i] +=
                        step * ready.fine_q[32 * at + i - first];
            }
    }
};

struct Product {
    double sum = 0, size = 0;  // of the terms and of their magnitudes
};
inline Product product(const Weight &w, int n, const Rows &x, int row) {
    const int columns = w.packed.num_columns;
    const float *a = w.values.data() + static_cast<std::size_t>(n) * columns;
    const double *b = x.values.data() + static_cast<std::size_t>(row) * columns;
    Product p;
    for (int i = 0; i < columns; ++i) {
        const double term = a[i] * b[i];
        p.sum += term;
        p.size += std::fabs(term);
    }
    return p;
}

inline const char *name_of(Form form) {
    return form == Form::kF32 ? "f32" : form == Form::kBF16 ? "bf16" : "int8";
}

}  // namespace selftest
}  // namespace engineroom
