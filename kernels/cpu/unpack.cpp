// Reads a row back from its tiles (kernels.hpp): an embedding's, whose table is the head as well.
#include <algorithm>
#include <cstring>

#include "compact.hpp"
#include "dequant.hpp"
#include "isa/vec_generic.hpp"
#include "pack.hpp"
#include "tile_bytes.hpp"

namespace engineroom {
namespace {

constexpr int kRun = 16;  // elements that share a scale and a minimum, whatever the scaling

float half_at(const std::uint8_t *p, int i) {
    std::uint16_t half;
    std::memcpy(&half, p + 2 * i, 2);
    return generic::float_of_half(half);
}

float word_at(const std::uint8_t *p, int i) {
    std::int16_t x;
    std::memcpy(&x, p + 2 * i, 2);
    return static_cast<float>(x);
}

float float_at(const std::uint8_t *p, int i) {
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
}

float bf16_at(const std::uint8_t *quants, int k, int n) {
    std::uint16_t x;
    std::memcpy(&x, quants + 4 * (static_cast<std::size_t>(k / 2) * kTileRows + n) + k % 2 * 2, 2);
    return generic::float_of_bits(static_cast<std::uint32_t>(x) << 16);
}

float e4m3_at(const std::uint8_t *quants, int k, int n) {
    const std::uint8_t code =
        quants[k / kE4M3Columns * kE4M3Bytes + place_in_e4m3(k % kE4M3Columns, n)];
    return e4m3_value(static_cast<std::uint8_t>(code << 4 | code >> 4));
}

// The integer of element k of output n, or the code that it is.
int quant_at(Elements elements, const std::uint8_t *quants, int k, int n) {
    if (elements == Elements::kU8)
        return quants[(static_cast<std::size_t>(k / 4) * kTileRows + n) * 4 + k % 4];
    const int planes = elements == Elements::kU6 ? 2 : elements == Elements::kU5;
    const std::uint8_t *group =
        quants + static_cast<std::size_t>(k / kGroup) * (kNibbleBytes + planes * kPlaneBytes);
    const int in_group = k % kGroup;
    const std::uint8_t byte = group[(in_group / 8 * kTileRows + n) * 4 + k % 4];
    int value = in_group / 4 % 2 ? byte >> 4 : byte & 15;
    for (int p = 0; p < planes; ++p) {
        const int bit = in_group / 4 * 4 * kTileRows + 4 * n + k % 4;
        const std::uint8_t *plane = group + kNibbleBytes + p * kPlaneBytes;
        value |= ((plane[bit / 8] >> (bit % 8)) & 1) << (4 + p);
    }
    return elements == Elements::kE2M1 ? kE2M1Units[value] : value;
}

// What the scale of element k multiplies.
float number_at(const PackedWeight &w, const std::uint8_t *quants, int k, int n) {
    const std::size_t at = static_cast<std::size_t>(k) * kTileRows + n;
    switch (w.elements) {
        case Elements::kF32: return float_at(quants + 4 * at, 0);
        case Elements::kF16: return half_at(quants + 2 * at, 0);
        case Elements::kBF16: return bf16_at(quants, k, n);
        case Elements::kE4M3: return e4m3_at(quants, k, n);
        case Elements::kNF4:
        case Elements::kFP4:
            return table_of(w.elements).values[quant_at(w.elements, quants, k, n)];
        default: return static_cast<float>(quant_at(w.elements, quants, k, n) - w.bias);
    }
}

// value = scale * number + minimum; a minimum of -0 leaves every number as it is, zeros' signs too.
struct Line {
    float scale = 1.0f;
    float minimum = -0.0f;
};

// Of element k, and of the kRun from a multiple of it.
Line line_at(Scaling scaling, const std::uint8_t *s, int k, int n) {
    const auto half = [&](int bytes) { return Line{half_at(s + bytes, n)}; };
    const auto single = [&](int elements) { return Line{float_at(s + k / elements * kFloatBytes, n)}; };
    switch (scaling) {
        case Scaling::kNone: return {};
        case Scaling::kHalf: return half(k / kGroup * kHalfBytes);
        case Scaling::kHalfMin:
            s += k / kGroup * 2 * kHalfBytes;
            return {half_at(s, n), half_at(s + kHalfBytes, n)};
        case Scaling::kSuperMin: {
            s += k / kSuper * kSuperMinBytes;
            const std::uint8_t *small = s + 2 * kHalfBytes + n + k % kSuper / kGroup * 2 * kTileRows;
            return {half_at(s, n) * static_cast<float>(small[0]),
                    -(half_at(s + kHalfBytes, n) * static_cast<float>(small[kTileRows]))};
        }
        case Scaling::kSuperSigned: {
            s += k / kSuper * kSuperSignedBytes;
            const std::uint8_t small = s[kHalfBytes + k % kSuper / 16 * kTileRows + n];
            return Line{half_at(s, n) * static_cast<float>(static_cast<std::int8_t>(small))};
        }
        case Scaling::kChannel: return Line{float_at(s, n)};
        case Scaling::kChannelMin: {
            const std::uint8_t *small = s + 2 * kFloatBytes + k / kGroup * 2 * kTileRows + n;
            return {float_at(s, n) * static_cast<float>(small[0]),
                    -(float_at(s + kFloatBytes, n) * static_cast<float>(small[kTileRows]))};
        }
        case Scaling::kZero32:
        case Scaling::kZero128: {
            s += k / (scaling == Scaling::kZero32 ? kGroup : 4 * kGroup) * kZeroBytes;
            const float scale = float_at(s, n);
            return {scale, -(scale * half_at(s + kFloatBytes, n))};
        }
        case Scaling::kRow16: {
            const bool is_whole = s[kRow16Whole] != 0;
            const int of_group = k % kGroup / 16;
            const std::uint8_t *group = s + kRow16Bytes + k / kGroup * 2 * kHalfBytes;
            const float number = is_whole ? word_at(group, 2 * n + 1 - of_group)
                                          : half_at(group + of_group * kHalfBytes, n);
            return Line{number * float_at(s + kFloatBytes, n) / float_at(s + 2 * kFloatBytes, n)};
        }
        case Scaling::kSingle32: return single(kGroup);
        case Scaling::kSingle64: return single(64);
        case Scaling::kSingle128: return single(128);
    }
    return {};
}

}  // namespace

void unpack_row(const PackedWeight &weight, int row, float *out) {
    if (weight.elements == Elements::kCompactBF16) return unpack_compact(weight, row, out);
    const int tile = row / kTileRows, n = row % kTileRows;
    const std::uint8_t *quants = weight.quants(tile);
    if (weight.scaling == Scaling::kNone) {  // a NaN's bits too
        for (int k = 0; k < weight.num_columns; ++k) out[k] = number_at(weight, quants, k, n);
        return;
    }
    for (int k0 = 0; k0 < weight.num_columns; k0 += kRun) {
        const Line line = line_at(weight.scaling, weight.scales(tile), k0, n);
        const int end = std::min(k0 + kRun, weight.num_columns);
        for (int k = k0; k < end; ++k)
            out[k] = line.scale * number_at(weight, quants, k, n) + line.minimum;
    }
}

}  // namespace engineroom
