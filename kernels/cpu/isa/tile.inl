// Products of one weight tile with prepared rows, over the unit's vectors.
//
// Every output is one lane and its operations are fixed: per group of 32 (or 16: kParts) in
// ascending order, c is the exact integer product of quants and activations, t = d * scale,
// f = fma(c, t, f), and where the format has minima f = fma(m, scaled_sum, f); for floats,
// f = fma(w, x, f) in ascending K. The activations' second digits are added behind all of K, in the
// same way. What varies with the number of rows (unpacking first or on the way, how many rows share
// registers, blocks of K) leaves them as they are. A scale that all of K shares (kChannel) is left out
// of t: finish multiplies by it.
//
// Here a weight's elements and scaling choose the types; a product is in a file of its own.
#include "tile_sizes.inl"
#include "tile_quants.inl"
#include "tile_scales.inl"
#include "tile_int8.inl"
#include "tile_fine.inl"
#include "tile_float.inl"
#include "tile_compact.inl"
#include "tile_e4m3.inl"
#include "tile_dequantised.inl"

namespace engineroom {
namespace ER_ISA {

// Calls use(Quants{}, Scale{}) with the types of a quantised weight's tile.
template <class Use>
ER_INLINE void with_types(const PackedWeight &w, int tile, Use use) {
    const auto with_scale = [&](auto quants) {
        switch (w.scaling) {
            case Scaling::kHalf: use(quants, ScaleHalf{}); break;
            case Scaling::kHalfMin: use(quants, ScaleHalfMin{}); break;
            case Scaling::kSuperMin: use(quants, ScaleSuperMin{}); break;
            default: break;
        }
    };
    switch (w.elements) {
        case Elements::kU4:
            if (w.scaling == Scaling::kChannelMin)
                use(QuantsNibbles<0>{}, ScaleChannelMin{});
            else if (w.scaling == Scaling::kZero32)
                use(QuantsNibbles<0>{}, ScaleZero<1>{});
            else if (w.scaling == Scaling::kZero128)
                use(QuantsNibbles<0>{}, ScaleZero<4>{});
            else
                with_scale(QuantsNibbles<0>{});
            break;
        case Elements::kU5: with_scale(QuantsNibbles<1>{}); break;
        case Elements::kU6: use(QuantsNibbles<2>{}, ScaleSuperSigned{}); break;
        case Elements::kU8:
            if (w.scaling == Scaling::kChannel)
                use(QuantsU8{}, ScaleChannel{});
            else if (w.scaling == Scaling::kZero32)
                use(QuantsU8{}, ScaleZero<1>{});
            else
                use(QuantsU8{}, ScaleHalf{});
            break;
        case Elements::kE2M1:
            if (w.scaling == Scaling::kSingle32)
                use(QuantsE2M1{}, ScaleSingle{});
            else if (w.is_whole(tile))
                use(QuantsE2M1Whole{}, ScaleWhole16{});
            else
                use(QuantsE2M1{}, ScaleHalf16{});
            break;
        case Elements::kNF4: use(QuantsTable<kNf4>{}, ScaleTable<kNf4>{}); break;
        case Elements::kFP4: use(QuantsTable<kFp4>{}, ScaleTable<kFp4>{}); break;
        default: break;
    }
}

static void quantised_tile(const PackedWeight &w, int tile, int k0, int k1, const Activations &a,
                           int row0, int rows, bool first, float *out, std::uint8_t *scratch) {
    with_types(w, tile, [&](auto quants, auto scale) {
        using Quants = decltype(quants);
        using Scale = decltype(scale);
        if (a.form == Form::kInt8)
            int8_tile<Quants, Scale>(w, tile, k0, k1, a, row0, rows, first, out, scratch);
        else
            dequantised_tile<Quants, Scale>(w, tile, k0, k1, a, row0, rows, first, out, scratch);
    });
}

static void tile_fine(const PackedWeight &w, int tile, const Activations &a, int row0,
                      const FineDigits *digits, int count, float *out) {
    const std::ptrdiff_t first = row0 * (a.stride / kGroup);
    with_types(w, tile, [&](auto quants, auto scale) {
        using Quants = decltype(quants);
        using Scale = decltype(scale);
        constexpr int kMost = kIsWhole<Scale> ? least(Quants::kRows, 3) : Quants::kRows;  // 4 spill
        while (count > 0) {
            const int rows = least(digits->of_group, kMost);
            int used = rows;
            while (goes_on(digits + used - rows, count - used + rows, rows, kMost)) used += rows;
            fine_some<Quants, Scale, kMost>(rows, w.quants(tile), w.scales(tile), w.bias, a, first,
                                            digits, used / rows, out);
            digits += used;
            count -= used;
        }
    });
}

static void tile(const PackedWeight &w, int tile, int k0, int k1, const Activations &a, int row0,
                 int rows, bool first, float *out, std::uint8_t *scratch) {
    switch (w.elements) {
        case Elements::kF32:
            float_tile<StepF32, kF32Rows>(StepF32{}, w, tile, k0, k1, a.f32, a.stride, row0, rows,
                                          first, out);
            break;
        case Elements::kF16:
            float_tile<StepF16, kF32Rows>(StepF16{}, w, tile, k0, k1, a.f32, a.stride, row0, rows,
                                          first, out);
            break;
        case Elements::kBF16:
            if (a.form == Form::kBF16)
                float_tile<StepBF16, kBF16Rows>(StepBF16{}, w, tile, k0, k1, a.bf16, a.stride, row0,
                                                rows, first, out);
            else
                float_tile<StepWideBF16, kF32Rows>(StepWideBF16{}, w, tile, k0, k1, a.f32, a.stride,
                                                   row0, rows, first, out);
            break;
        case Elements::kCompactBF16: {
            const std::uint8_t *scales = w.data + tile * w.tile_bytes;
            if (a.form == Form::kBF16)
                unpacked_tile<StepCompact, StepBF16, kBF16Rows, kBF16Rows>(
                    w, scales, tile, k0, k1, a.bf16, a.stride, row0, rows, first, out, scratch);
            else
                unpacked_tile<StepCompact, StepWideBF16, least(kF32Rows, 4), kF32Rows>(
                    w, scales, tile, k0, k1, a.f32, a.stride, row0, rows, first, out, scratch);
            break;
        }
        case Elements::kE4M3:
            if (a.form == Form::kBF16)
                e4m3_tile<StepBF16, least(kBF16Rows, 6), kBF16Rows>(  // more would spill
                    w, tile, k0, k1, a.bf16, a.stride, row0, rows, first, out, scratch);
            else
                e4m3_tile<StepWideBF16, least(kF32Rows, 4), kF32Rows>(
                    w, tile, k0, k1, a.f32, a.stride, row0, rows, first, out, scratch);
            break;
        default: quantised_tile(w, tile, k0, k1, a, row0, rows, first, out, scratch); break;
    }
}

}  // namespace ER_ISA
}  // namespace engineroom
