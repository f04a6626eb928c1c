// Rows of any format -> rows of INT8, INT4, FP8 and NF4, byte for byte as quant/integers.py and
// quant/small_floats.py have it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dequant.hpp"

namespace engineroom {

// Writes one row: `columns` floats below 2^120, whole blocks of the format, to `out`. `scratch`: 2 * columns
// floats.
using QuantiseRow = void (*)(const float *x, int columns, std::uint8_t *out, float *scratch);

// For "INT8", "INT4", "FP8" and "NF4"; nullptr for other names.
QuantiseRow find_quantise_row(const char *format);

// Quantises `rows` rows of `columns` elements at `in` to `out` on up to `threads` threads, never
// holding more than a row a thread in fp32. Returns the first row that holds a NaN, an infinity
// or 2^120 and more (`out` is then of no use), or -1.
int quantise_rows(const DequantFormat &from, const std::uint8_t *in, const DequantFormat &to,
                  std::uint8_t *out, int rows, int columns, int threads);

}  // namespace engineroom
