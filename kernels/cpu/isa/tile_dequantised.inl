// Integers and codes multiplied as the fp32 values that they stand for (Form::kF32).
namespace engineroom {
namespace ER_ISA {

// Four columns before they are scaled: integers less their bias, or the values of codes.
template <class Quants>
ER_INLINE void value_columns(const std::uint8_t *group, int k4, int v, F zero_point, F (&column)[4]) {
    if constexpr (Quants::kValues != nullptr) {
        const I codes = QuantsNibbles<0>::word(group, k4, v);
        column[0] = f_lookup(Quants::kValues, i_byte<0>(codes));
        column[1] = f_lookup(Quants::kValues, i_byte<1>(codes));
        column[2] = f_lookup(Quants::kValues, i_byte<2>(codes));
        column[3] = f_lookup(Quants::kValues, i_byte<3>(codes));
    } else {
        const I word = Quants::word(group, k4, v);
        column[0] = f_sub(f_of_i(i_byte<0>(word)), zero_point);
        column[1] = f_sub(f_of_i(i_byte<1>(word)), zero_point);
        column[2] = f_sub(f_of_i(i_byte<2>(word)), zero_point);
        column[3] = f_sub(f_of_i(i_byte<3>(word)), zero_point);
    }
}

template <class Quants, class Scale>
ER_INLINE F scale_of_values(const std::uint8_t *s, int part, int v) {
    if constexpr (Quants::kValues != nullptr || std::is_base_of_v<ScaleRow16, Scale>)
        return Scale::of_values(s, part, v);
    else
        return Scale::scale(s, part, v);
}

// Groups [g0, g1) of a quantised tile as fp32 [columns][48]: the values of unpack_row.
template <class Quants, class Scale>
static __attribute__((noinline)) void dequantise_groups(const std::uint8_t *quants,
                                                        const std::uint8_t *scales, int g0, int g1,
                                                        int bias, float *to) {
    const F zero_point = f_set(static_cast<float>(bias));
    for (int g = g0; g < g1; ++g) {
        const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g) * Quants::kBytes;
        for (int v = 0; v < kTileVectors; ++v) {
            F d[Scale::kParts];
            for (int part = 0; part < Scale::kParts; ++part)
                d[part] = scale_of_values<Quants, Scale>(scales, g * Scale::kParts + part, v);
            F m = f_zero();
            if constexpr (Scale::kHasMinimum) m = Scale::minimum(scales, g, v);
#pragma GCC unroll 8
            for (int k4 = 0; k4 < 8; ++k4) {
                F column[4];
                value_columns<Quants>(group, k4, v, zero_point, column);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    F x = f_mul(d[k4 * Scale::kParts / 8], column[i]);
                    if (Scale::kHasMinimum) x = f_add(x, m);
                    f_store(to + (4 * k4 + i) * kTileRows + 16 * v, x);
                }
            }
        }
        to += kGroup * kTileRows;
    }
}

template <class Quants, class Scale>
static void dequantised_tile(const PackedWeight &w, int tile, int k0, int k1, const Activations &a,
                             int row0, int rows, bool first, float *out, std::uint8_t *scratch) {
    const std::uint8_t *scales = w.data + tile * w.tile_bytes;
    float *values = reinterpret_cast<float *>(scratch);
    for (int c0 = k0; c0 < k1; c0 += kChunkF32) {
        const int c1 = least(c0 + kChunkF32, k1);
        dequantise_groups<Quants, Scale>(scales + w.scales_bytes, scales, c0 / kGroup, c1 / kGroup,
                                         w.bias, values);
        float_blocks<StepF32, kF32Rows>(StepF32{}, scratch, c1 - c0, a.f32 + row0 * a.stride + c0,
                                        a.stride, rows, false, first && c0 == k0, out,
                                        Fetch{scratch, 0});
    }
}

}  // namespace ER_ISA
}  // namespace engineroom
