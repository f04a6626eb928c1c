// Products of the second digits that groups of activations with an outlier have (kernels.hpp).
namespace engineroom {
namespace ER_ISA {

// Adds to out [rows][48] the products of R rows' second digits: of `groups` groups, R digits each, of
// the same rows. The tile was read just before: it comes from the L2.
template <class Quants, class Scale, int R>
static __attribute__((noinline)) void fine_rows(const std::uint8_t *quants,
                                                const std::uint8_t *scales, int bias,
                                                const Activations &a, std::ptrdiff_t first,
                                                const FineDigits *digits, int groups, float *out) {
    constexpr int kWords = 8 / Scale::kParts;
    const std::int32_t correction = (Quants::kSmall ? 0 : kBias8) - bias;
    float *to[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) to[r] = out + static_cast<std::ptrdiff_t>(digits[r].row) * kTileRows;
    for (int v0 = 0; v0 < kTileVectors; v0 += kVectors) {
        F f[R][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) f[r][v] = f_load(to[r] + 16 * (v0 + v));
        const FineDigits *of = digits;
        for (int i = 0; i < groups; ++i, of += R) {
            const int g = of->group;
            const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g) * Quants::kBytes;
            I c[R][kVectors];
            std::int32_t start[R];
#pragma GCC unroll 2
            for (int part = 0; part < Scale::kParts; ++part) {
                if (kIsWhole<Scale> && part == 1) {
                    begin_second_half(c);
                } else {
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r)
                        start[r] = start_of_part<Scale>(
                            correction, a.fine_sum16 + 2 * (first + of[r].at), part);
                    begin_sums(c, start);
                }
#pragma GCC unroll 8
                for (int word = 0; word < kWords; ++word) {
                    const int k4 = part * kWords + word;
                    I w[kVectors];
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v) w[v] = Quants::word(group, k4, v0 + v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const I x = i_bcast4(a.fine_q + kGroup * (first + of[r].at) + 4 * k4);
#pragma GCC unroll 3
                        for (int v = 0; v < kVectors; ++v)
                            c[r][v] = Quants::kSmall ? i_dot_small(c[r][v], w[v], x)
                                                     : i_dot8(c[r][v], w[v], x);
                    }
                }
                if constexpr (!kIsWhole<Scale>) {
                    F d[kVectors];
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v)
                        d[v] = Scale::scale(scales, g * Scale::kParts + part, v0 + v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const F scale = f_set(a.fine_scale[first + of[r].at]);
#pragma GCC unroll 3
                        for (int v = 0; v < kVectors; ++v)
                            f[r][v] = f_fma(f_of_sum(c[r][v], start + r),
                                            product_scale<Scale>(d[v], scale), f[r][v]);
                    }
                }
            }
            if constexpr (kIsWhole<Scale>) {
                I d[kVectors];
#pragma GCC unroll 3
                for (int v = 0; v < kVectors; ++v) d[v] = Scale::both(scales, g, v0 + v);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const F scale = f_set(a.fine_scale[first + of[r].at]);
                    const std::int32_t at =
                        halves_at(correction, a.fine_sum16 + 2 * (first + of[r].at));
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v)
                        f[r][v] = f_fma(f_of_halves(c[r][v], at, d[v]), scale, f[r][v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) f_store(to[r] + 16 * (v0 + v), f[r][v]);
    }
}

template <class Quants, class Scale, int R>
ER_INLINE void fine_some(int rows, const std::uint8_t *quants, const std::uint8_t *scales, int bias,
                         const Activations &a, std::ptrdiff_t first, const FineDigits *digits,
                         int groups, float *out) {
    if (R == 1 || rows == R)
        fine_rows<Quants, Scale, R>(quants, scales, bias, a, first, digits, groups, out);
    else if constexpr (R > 1)
        fine_some<Quants, Scale, R - 1>(rows, quants, scales, bias, a, first, digits, groups, out);
}

// Whether the digits behind `rows` digits are of the same rows, and of another group.
ER_INLINE bool goes_on(const FineDigits *digits, int count, int rows, int most) {
    if (count <= rows || least(digits[rows].of_group, most) != rows) return false;
    for (int r = 0; r < rows; ++r)
        if (digits[rows + r].row != digits[r].row) return false;
    return true;
}

}  // namespace ER_ISA
}  // namespace engineroom
