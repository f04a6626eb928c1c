// Every element takes the same IEEE operations in the same order as the numpy specification, sums
// too: they run over a group's elements in ascending order, and eight groups are eight lanes.
#include "quantise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "versions.hpp"

#include "e4m3.hpp"

namespace engineroom {
namespace {

constexpr int kGroup = 32;
constexpr int kLanes = 8;   // groups of a row that are searched at once
constexpr int kGrids = 21;  // that are tried for a group
constexpr float kSpread = 0x1p-14f;    // levels that vary less give no fit that means anything
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its last place is 1
constexpr float kTiny = 0x1p-126f;  // a scale below it would not be exact

// To the nearest integer, ties to even, within [low, high]; x may be any number.
ER_INLINE float round_within(float x, float low, float high) {
    const float above = x < low ? low : x, both = above > high ? high : above;
    return (both + kMagic) - kMagic;
}

// Whether every value is of less than 2^120, so that none that is made of it overflows.
ER_VERSIONS bool all_fit(const float *ER_RESTRICT x, int columns) {
    std::uint32_t worst = 0;
    for (int k = 0; k < columns; ++k) {
        std::uint32_t bits;
        std::memcpy(&bits, x + k, 4);
        worst = std::max(worst, bits & 0x7f800000u);
    }
    return worst < (127u + 120u) << 23;
}

ER_VERSIONS float largest(const float *ER_RESTRICT x, int count) {
    float lanes[kLanes] = {};
    for (int i = 0; i + kLanes <= count; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] = std::max(lanes[j], std::fabs(x[i + j]));
    for (int i = count / kLanes * kLanes; i < count; ++i)
        lanes[0] = std::max(lanes[0], std::fabs(x[i]));
    return *std::max_element(lanes, lanes + kLanes);
}

void store_float(std::uint8_t *to, float x) { std::memcpy(to, &x, 4); }

// -------------------------------------------------------------------------------------- INT8

ER_VERSIONS void int8_quants(const float *ER_RESTRICT x, int columns, float d,
                             std::uint8_t *ER_RESTRICT out) {
    for (int k = 0; k < columns; ++k)
        out[k] = static_cast<std::uint8_t>(
            static_cast<int>(round_within(x[k] / d, -127.0f, 127.0f)));
}

void int8_row(const float *x, int columns, std::uint8_t *out, float *) {
    const float d = largest(x, columns) / 127.0f;
    if (d < kTiny) {
        std::memset(out, 0, 4 + static_cast<std::size_t>(columns));
        return;
    }
    store_float(out, d);
    int8_quants(x, columns, d, out + 4);
}

// -------------------------------------------------------------------------------------- INT4

// One number of each of kLanes groups.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

ER_INLINE Lanes round_within(Lanes x, float low, float high) {
    const Lanes above = x < low ? Lanes{} + low : x;
    return ((above > high ? Lanes{} + high : above) + kMagic) - kMagic;
}

// Step and minimum of kLanes groups, t[i] being their elements i, |t| <= 1. Weighted least squares
// over several grids, as quant/integers.py says.
ER_VERSIONS void search(const Lanes *ER_RESTRICT t, Lanes *ER_RESTRICT scale,
                        Lanes *ER_RESTRICT minimum) {
    Lanes low = {}, high = t[0], squares = {}, sw = {}, sx = {}, weight[kGroup];
    for (int i = 0; i < kGroup; ++i) {
        low = t[i] < low ? t[i] : low;
        high = t[i] > high ? t[i] : high;
        squares += t[i] * t[i];
    }
    squares /= 32.0f;
    for (int j = 0; j < kLanes; ++j) squares[j] = std::sqrt(squares[j]);
    for (int i = 0; i < kGroup; ++i) {
        weight[i] = squares + (t[i] < 0 ? -t[i] : t[i]);
        sw += weight[i];
        sx += weight[i] * t[i];
    }
    const Lanes range = high - low;
    Lanes step = range / 15.0f, least = low, best = Lanes{} - 1.0f;
    for (int grid = 0; grid < kGrids; ++grid) {
        const float levels = 14.0f + static_cast<float>(grid) / 10.0f;
        const Lanes inverse = range > 0 ? levels / range : Lanes{};
        Lanes sl = {}, sll = {}, sxl = {};
        for (int i = 0; i < kGroup; ++i) {
            const Lanes level = round_within(inverse * (t[i] - low), 0.0f, 15.0f);
            const Lanes wl = weight[i] * level;
            sl += wl;
            sll += wl * level;
            sxl += wl * t[i];
        }
        const Lanes det = sw * sll - sl * sl;
        const Lanes m = (sll * sx - sl * sxl) / det;
        const Lanes s = m > 0 ? sxl / sll : (sw * sxl - sx * sl) / det;
        const Lanes n = m > 0 ? Lanes{} : m;
        const Lanes gain = s * sxl + n * sx;  // of the squared error: sum w x^2 less it
        const auto better = (det > kSpread * (sw * sll)) & (s > 0) & (gain > best);
        best = better ? gain : best;
        step = better ? s : step;
        least = better ? n : least;
    }
    *scale = step;
    *minimum = -least;
}

ER_VERSIONS void int4_quants(const float *ER_RESTRICT x, float scale, float minimum,
                             std::uint8_t *ER_RESTRICT out) {
    std::uint8_t u[kGroup];
    for (int i = 0; i < kGroup; ++i)
        u[i] = static_cast<std::uint8_t>(
            static_cast<int>(round_within((x[i] + minimum) / scale, 0.0f, 15.0f)));
    for (int i = 0; i < 16; ++i) out[i] = static_cast<std::uint8_t>(u[i] | (u[i + 16] << 4));
}

void int4_row(const float *x, int columns, std::uint8_t *out, float *scratch) {
    const int groups = columns / kGroup;
    int exponent = 0;
    std::frexp(largest(x, columns), &exponent);
    exponent = std::max(exponent, -126);
    const float down = std::ldexp(1.0f, -exponent), up = std::ldexp(1.0f, exponent);
    float *y = scratch, *scale = scratch + columns, *minimum = scale + groups;
    for (int k = 0; k < columns; ++k) y[k] = x[k] * down;
    for (int g0 = 0; g0 < groups; g0 += kLanes) {
        const int lanes = std::min(kLanes, groups - g0);
        Lanes t[kGroup] = {}, s, m;
        for (int j = 0; j < lanes; ++j)
            for (int i = 0; i < kGroup; ++i) t[i][j] = y[(g0 + j) * kGroup + i];
        search(t, &s, &m);
        for (int j = 0; j < lanes; ++j) {
            scale[g0 + j] = s[j];
            minimum[g0 + j] = m[j];
        }
    }
    const float d = largest(scale, groups) / 255.0f, dmin = largest(minimum, groups) / 255.0f;
    store_float(out, d * up);
    store_float(out + 4, dmin * up);
    out += 8;
    for (int g = 0; g < groups; ++g, out += 18) {
        const float sc = d > 0 ? round_within(scale[g] / d, 0.0f, 255.0f) : 0.0f;
        const float mn = dmin > 0 ? round_within(minimum[g] / dmin, 0.0f, 255.0f) : 0.0f;
        out[0] = static_cast<std::uint8_t>(sc);
        out[1] = static_cast<std::uint8_t>(mn);
        if (sc > 0)
            int4_quants(y + g * kGroup, d * sc, dmin * mn, out + 2);
        else
            std::memset(out + 2, 0, 16);
    }
}

// ------------------------------------------------------------------------------------- floats

ER_VERSIONS void fp8_values(const float *ER_RESTRICT x, int columns, float scale,
                            std::uint8_t *ER_RESTRICT out) {
    for (int k = 0; k < columns; ++k) {
        const float y = x[k] / scale, above = y < -kE4M3Most ? -kE4M3Most : y;
        out[k] = e4m3_of(above > kE4M3Most ? kE4M3Most : above);
    }
}

void fp8_row(const float *x, int columns, std::uint8_t *out, float *) {
    const float scale = largest(x, columns) / kE4M3Most;
    if (scale < kTiny) {
        std::memset(out, 0, 4 + static_cast<std::size_t>(columns));
        return;
    }
    store_float(out, scale);
    fp8_values(x, columns, scale, out + 4);
}

// The place of x in the table: between which two of its entries' middles it lies.
ER_INLINE std::uint8_t nf4_of(float x) {
    int code = 0;
    for (int i = 0; i < 15; ++i) code += x > (kNf4.values[i] + kNf4.values[i + 1]) / 2.0f;
    return static_cast<std::uint8_t>(code);
}

ER_VERSIONS void nf4_block(const float *ER_RESTRICT x, float inverse,
                           std::uint8_t *ER_RESTRICT out) {
    std::uint8_t code[64];
    for (int i = 0; i < 64; ++i) {
        const float y = x[i] * inverse, above = y < -1.0f ? -1.0f : y;
        code[i] = nf4_of(above > 1.0f ? 1.0f : above);
    }
    for (int i = 0; i < 32; ++i)
        out[i] = static_cast<std::uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
}

void nf4_row(const float *x, int columns, std::uint8_t *out, float *) {
    for (int k = 0; k < columns; k += 64, out += 36) {
        const float absmax = largest(x + k, 64);
        store_float(out, absmax);
        nf4_block(x + k, 1.0f / std::max(absmax, 1e-38f), out + 4);
    }
}

}  // namespace

QuantiseRow find_quantise_row(const char *format) {
    if (std::strcmp(format, "INT8") == 0) return int8_row;
    if (std::strcmp(format, "INT4") == 0) return int4_row;
    if (std::strcmp(format, "FP8") == 0) return fp8_row;
    if (std::strcmp(format, "NF4") == 0) return nf4_row;
    return nullptr;
}

int quantise_rows(const DequantFormat &from, const std::uint8_t *in, const DequantFormat &to,
                  std::uint8_t *out, int rows, int columns, int threads) {
    const QuantiseRow row = find_quantise_row(to.name);
    const std::size_t width = static_cast<std::size_t>(columns);
    const std::size_t in_bytes = from.row_bytes(width), out_bytes = to.row_bytes(width);
    const int used = std::clamp(threads, 1, rows / 16 + 1);  // a thread costs some rows' time
    std::vector<int> bad(static_cast<std::size_t>(used), rows);
    on_threads(used, [&](int thread) {
        std::vector<float> x(3 * width);
        const int end = static_cast<int>(static_cast<std::int64_t>(rows) * (thread + 1) / used);
        for (int r = static_cast<int>(static_cast<std::int64_t>(rows) * thread / used); r < end;
             ++r) {
            const std::size_t at = static_cast<std::size_t>(r);
            from.run(in + at * in_bytes, x.data(), width / from.block_elements);
            if (!all_fit(x.data(), columns)) {
                bad[static_cast<std::size_t>(thread)] = r;
                return;
            }
            row(x.data(), columns, out + at * out_bytes, x.data() + width);
        }
    });
    const int first = *std::min_element(bad.begin(), bad.end());
    return first < rows ? first : -1;
}

}  // namespace engineroom
