// Self-test of products by one weight tile: every format, any number of rows, blocks of K.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "selftest_products.hpp"

namespace engineroom {
namespace selftest {
namespace {

// What follows the tiles: second digits of int8 rows, and the scale that was left out.
void finish(const Kernels &k, const PackedWeight &w, int tile, const Activations &a, int row0, int rows,
            float *out) {
    if (a.form == Form::kInt8) {
        const std::size_t groups = static_cast<std::size_t>(a.stride) / kGroup;
        std::vector<FineDigits> digits(groups * static_cast<std::size_t>(rows));
        std::vector<std::int32_t> starts(groups + 1);
        const int count = fine_digits(a, row0, rows, digits.data(), starts.data());
        k.tile_fine(w, tile, a, row0, digits.data(), count, out);
    }
    FinishedTile t;
    t.y = out;
    t.scale = channel_scale(w, tile, a.form);
    t.out = out;
    t.out_stride = kTileRows;
    t.rows = rows;
    t.outputs = kTileRows;
    k.finish(t);
}

}  // namespace

void check_tiles(const Kernels &k) {
    Random random{6};
    for (const FormatInfo &info : kFormats) {
        const int block = static_cast<int>(find_dequant_format(info.name)->block_elements);
        std::vector<int> columns;
        if (block == 1) columns = {1, 7, 40, 301};
        if (block == 32) columns = {32, 96, 544};
        if (block == 64) columns = {64, 192, 576};
        if (block == 128) columns = {128, 384};
        if (block == 256) columns = {256, 768};
        std::vector<Form> forms = {Form::kF32};
        if (info.is_bf16()) forms.push_back(Form::kBF16);
        if (block > 1 && !info.has_fp8) forms.push_back(Form::kInt8);
        for (Form form : forms) {
            Check check(k.name, std::string("tile ") + info.name + " x " + name_of(form), 3e-6);
            for (int num_columns : columns) {
                const int num_rows = 48 + 1 + random.below(47), rows = 13;
                Weight w(info, num_rows, num_columns, random);
                if (form == Form::kInt8) w.round_values();
                std::vector<float> inputs = random.normals(rows * num_columns);
                for (std::size_t i = 9; i < inputs.size(); i += 150) inputs[i] *= 30;
                const Rows x(k, form, inputs, rows, num_columns);
                const Memory scratch(tile_scratch_bytes(num_columns));
                for (int tile = 0; tile < w.packed.num_tiles(); ++tile) {
                    std::vector<float> all(rows * kTileRows, kNaN);
                    k.tile(w.packed, tile, 0, num_columns, x.ready, 0, rows, true, all.data(),
                           scratch.data());
                    finish(k, w.packed, tile, x.ready, 0, rows, all.data());
                    for (int r = 0; r < rows; ++r)
                        for (int n = 0; n < kTileRows; ++n) {
                            const int output = tile * kTileRows + n;
                            Product p;
                            if (output < num_rows) p = product(w, output, x, r);
                            check.near(all[r * kTileRows + n], p.sum, p.size + 1e-30, "out",
                                       output);
                        }
                    // A row's bits do not depend on what rows are multiplied with it, nor on
                    // blocks of K.
                    int begin = 0;
                    for (int count : {1, 2, 3, 4, 3}) {
                        std::vector<float> some(count * kTileRows, kNaN);
                        for (int k0 = 0; k0 < num_columns; k0 += kSuper)
                            k.tile(w.packed, tile, k0, std::min(k0 + kSuper, num_columns), x.ready,
                                   begin, count, k0 == 0, some.data(), scratch.data());
                        finish(k, w.packed, tile, x.ready, begin, count, some.data());
                        check.same_bits(some.data(), all.data() + begin * kTileRows,
                                        4 * some.size(), "rows apart and blocks of K", begin);
                        begin += count;
                    }
                }
            }
        }
        Check check(k.name, std::string("unpack_row ") + info.name);
        const Weight w(info, 50, 2 * block, random);
        std::vector<float> out(2 * block);
        for (int n = 0; n < 50; ++n) {
            unpack_row(w.packed, n, out.data());
            check.same_bits(out.data(), w.values.data() + n * 2 * block, 4 * out.size(), "row", n);
        }
    }
}

// Any number of rows from any row on has the bits that the same rows have beside many others: of
// int8 in `other`'s table, for tables whose multiply-add rounds once agree in every bit; of bf16,
// which each table sums in its own way, in the same table.
void check_numbers_of_rows(const Kernels &k, const Kernels &other) {
    Random random{8};
    for (const FormatInfo &info : kFormats) {
        const int block = static_cast<int>(find_dequant_format(info.name)->block_elements);
        const bool is_bf16 = info.is_bf16();
        if (block == 1 && !is_bf16) continue;
        const Kernels &oracle = is_bf16 ? k : other;
        Check check(k.name, std::string("rows of ") + info.name + " as in " + oracle.name);
        for (int num_columns : {(block == 1 ? 33 : 1) * block, (block == 1 ? 64 : 3) * block,
                                (block == 1 ? 561 : 17) * block}) {
            constexpr int kMost = 67;
            const Weight w(info, 48 + 1 + random.below(47), num_columns, random);
            const Rows x(other, is_bf16 ? Form::kBF16 : Form::kInt8,
                         random.normals(kMost * num_columns), kMost, num_columns);
            const Memory scratch(tile_scratch_bytes(num_columns));
            const auto product = [&](const Kernels &kernels, int tile, int row0, int rows) {
                std::vector<float> out(rows * kTileRows, kNaN);
                for (int k0 = 0; k0 < num_columns; k0 += 2 * kSuper)
                    kernels.tile(w.packed, tile, k0, std::min(k0 + 2 * kSuper, num_columns), x.ready,
                                 row0, rows, k0 == 0, out.data(), scratch.data());
                return out;
            };
            for (int tile = 0; tile < w.packed.num_tiles(); ++tile) {
                const std::vector<float> want = product(oracle, tile, 0, kMost);
                for (int rows = 1; rows <= 64; rows += num_columns > 100 ? 9 : 1) {
                    const std::vector<float> got = product(k, tile, 3, rows);
                    check.same_bits(got.data(), want.data() + 3 * kTileRows, 4 * got.size(), "rows",
                                    rows);
                }
            }
        }
    }
}

// bf16 in 12 bits gives the bits of plain bf16, in both forms, with exceptions and without.
void check_compact(const Kernels &k) {
    Random random{16};
    for (Form form : {Form::kF32, Form::kBF16}) {
        Check check(k.name, std::string("tile of compact BF16 x ") + name_of(form));
        const int num_rows = 60, num_columns = 520, rows = 13;
        Weight w({"BF16", {-1, -1}}, num_rows, num_columns, random);
        const std::uint16_t rare = 0x1001;  // its high byte is in no table
        for (int i = 0; i < 30; ++i) {
            const int at = random.below(kTileRows * num_columns);  // the first tile's
            std::memcpy(w.raw.data() + 2 * at, &rare, 2);
            w.values[at] = bf16_value(rare);
        }
        pack_tiles("BF16", w.raw.data(), w.packed, w.tiles->data(), 0, 1);
        const Rows x(k, form, random.normals(rows * num_columns), rows, num_columns);
        const Memory scratch(tile_scratch_bytes(num_columns));
        std::vector<std::vector<float>> plain;
        const auto products = [&](int tile, int count) {
            std::vector<float> out(count * kTileRows, kNaN);
            for (int k0 = 0; k0 < num_columns; k0 += kSuper)
                k.tile(w.packed, tile, k0, std::min(k0 + kSuper, num_columns), x.ready, 0, count,
                       k0 == 0, out.data(), scratch.data());
            return out;
        };
        for (int tile = 0; tile < 2; ++tile) plain.push_back(products(tile, rows));
        w.compact();
        for (int tile = 0; tile < 2; ++tile)
            for (int count : {1, 2, 3, 4, 5, 8, 9, 13}) {
                const std::vector<float> out = products(tile, count);
                check.same_bits(out.data(), plain[tile].data(), 4 * out.size(), "rows", count);
            }
        std::vector<float> out(num_columns);
        for (int n = 0; n < num_rows; ++n) {
            unpack_row(w.packed, n, out.data());
            check.same_bits(out.data(), w.values.data() + static_cast<std::size_t>(n) * num_columns,
                            4 * out.size(), "row", n);
        }
    }
}

}  // namespace selftest
}  // namespace engineroom
