// int8 products: exact sums of a group's integers and activations, scaled and added in ascending K.
namespace engineroom {
namespace ER_ISA {

// Rows of activations from their group `0` on, row r at r times the strides.
struct Int8Rows {
    const std::int8_t *q;
    const float *scale;
    const std::int32_t *sum16;
    const float *scaled_sum;
    std::ptrdiff_t stride;        // of q; groups of 32 and 16 follow from it
};

// What the sums of a part should begin at; `sums` are its group's of activations.
template <class Scale>
ER_INLINE std::int32_t start_of_part(std::int32_t correction, const std::int32_t *sums, int part) {
    if (kIsWhole<Scale>) return start_of(0);
    return start_of(correction * (Scale::kParts == 1 ? sums[0] + sums[1] : sums[part]));
}

// A part's sums before its products, where start[r] is start_of(what row r's begin at).
template <int R>
ER_INLINE void begin_sums(I (&c)[R][kVectors], const std::int32_t (&start)[R]) {
    c[0][0] = i_begin(start);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            if (r + v > 0) c[r][v] = i_begin_like(c[0][0], start + r);
}

// Of ScaleWhole16. A lane's upper 16 bits sum a group's first half, its lower ones the second, from
// zeros on: of 4-bit floats neither sum passes 12 * 127 * 16 < 2^15. halves_at is what both should
// have begun at, and 2^15 with which the second is not negative, so that it borrows nothing.
static const std::int32_t sign_bit = 1 << 15;  // of a word
ER_INLINE std::int32_t halves_at(std::int32_t correction, const std::int32_t *sums) {
    return correction * (65536 * sums[0] + sums[1]) + sign_bit;
}

template <int R>
ER_INLINE void begin_second_half(I (&c)[R][kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) c[r][v] = i_shift16(c[r][v]);
}

// Both halves times their scales, exactly, then one rounding.
ER_INLINE F f_of_halves(I sums, std::int32_t at, I scales) {
    return f_of_i(i_dot_words(i_xor_all(i_add(sums, i_set(at)), &sign_bit), scales));
}

// out [R][48] from `groups` groups: `quants` begins with the first of them, `scales` has it at g0.
template <class Quants, class Scale, int R, bool kFetchesAhead>
static __attribute__((noinline)) void int8_rows(const std::uint8_t *quants,
                                                const std::uint8_t *scales, int g0, int groups,
                                                int bias, const Int8Rows &a, bool first,
                                                float *out, Fetch fetch) {
    constexpr int kWords = 8 / Scale::kParts;  // of 4 columns, in a part
    const std::int32_t correction = (Quants::kSmall ? 0 : kBias8) - bias;
    const std::ptrdiff_t groups32 = a.stride / 32, groups16 = a.stride / 16;
    for (int v0 = 0; v0 < kTileVectors; v0 += kVectors) {
        F f[R][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f[r][v] = first ? f_zero() : f_load(out + r * kTileRows + 16 * (v0 + v));
        const std::uint8_t *group = quants;
        for (int g = 0; g < groups; ++g, group += Quants::kBytes) {
            if (!kFetchesAhead && v0 == 0) fetch_step(fetch);
            [[maybe_unused]] const std::uint8_t *ahead = fetch.next;
            if constexpr (kFetchesAhead) fetch.next += Quants::kBytes + Scale::kBytes;
            I c[R][kVectors];
            std::int32_t start[R];
#pragma GCC unroll 2
            for (int part = 0; part < Scale::kParts; ++part) {
                if (kIsWhole<Scale> && part == 1) {
                    begin_second_half(c);
                } else {
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r)
                        start[r] = start_of_part<Scale>(correction, a.sum16 + r * groups16 + 2 * g, part);
                    begin_sums(c, start);
                }
#pragma GCC unroll 8
                for (int word = 0; word < kWords; ++word) {
                    const int k4 = part * kWords + word;
                    if constexpr (kFetchesAhead) {
                        constexpr int kLines = (Quants::kBytes + Scale::kBytes + 63) / 64;
                        if (v0 == 0)
#pragma GCC unroll 4
                            for (int i = k4 * kLines / 8; i < (k4 + 1) * kLines / 8; ++i)
                                prefetch_far(ahead + 64 * i);
                    }
                    I w[kVectors];
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v) w[v] = Quants::word(group, k4, v0 + v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const I x = i_bcast4(a.q + r * a.stride + g * kGroup + 4 * k4);
#pragma GCC unroll 3
                        for (int v = 0; v < kVectors; ++v)
                            c[r][v] = Quants::kSmall ? i_dot_small(c[r][v], w[v], x)
                                                     : i_dot8(c[r][v], w[v], x);
                    }
                }
                if constexpr (kIsSteps<Scale>) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const float *scale = a.scale + r * groups32 + g;
                        const float *d = Scale::of(scales, g0 + g, scale);
#pragma GCC unroll 3
                        for (int v = 0; v < kVectors; ++v)
                            f[r][v] = f_fma(f_of_sum(c[r][v], start + r),
                                            Scale::product(d + 16 * v, scale), f[r][v]);
                    }
                } else if constexpr (!kIsWhole<Scale>) {
                    F d[kVectors];
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v)
                        d[v] = Scale::scale(scales, (g0 + g) * Scale::kParts + part, v0 + v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const F scale = f_set(a.scale[r * groups32 + g]);
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
                for (int v = 0; v < kVectors; ++v) d[v] = Scale::both(scales, g0 + g, v0 + v);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const F scale = f_set(a.scale[r * groups32 + g]);
                    const std::int32_t at = halves_at(correction, a.sum16 + r * groups16 + 2 * g);
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v)
                        f[r][v] = f_fma(f_of_halves(c[r][v], at, d[v]), scale, f[r][v]);
                }
            }
            if constexpr (Scale::kHasMinimum) {
                F m[kVectors];
#pragma GCC unroll 3
                for (int v = 0; v < kVectors; ++v) m[v] = Scale::minimum(scales, g0 + g, v0 + v);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const F sum = f_set(a.scaled_sum[r * groups32 + g]);
#pragma GCC unroll 3
                    for (int v = 0; v < kVectors; ++v) f[r][v] = f_fma(m[v], sum, f[r][v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f_store(out + r * kTileRows + 16 * (v0 + v), f[r][v]);
    }
}

template <class Quants, class Scale, bool kFetchesAhead, int R>
ER_INLINE void int8_some(int rows, const std::uint8_t *quants, const std::uint8_t *scales,
                         int g0, int groups, int bias, const Int8Rows &a, bool first, float *out,
                         const Fetch &fetch) {
    if (R == 1 || rows == R) {
        int8_rows<Quants, Scale, R, kFetchesAhead>(quants, scales, g0, groups, bias, a, first, out,
                                                   fetch);
    } else if constexpr (R > 1) {
        int8_some<Quants, Scale, kFetchesAhead, R - 1>(rows, quants, scales, g0, groups, bias, a,
                                                       first, out, fetch);
    }
}

// All rows, in blocks of nearly equal size. `ahead`: what is fetched meanwhile.
template <class Quants, class Scale, bool kFetchesAhead>
static void int8_blocks(const std::uint8_t *quants, const std::uint8_t *scales, int g0, int k0,
                        int k1, int bias, const Activations &a, int row0, int rows, bool first,
                        float *out, Fetch ahead) {
    const int groups = (k1 - k0) / kGroup;
    const int blocks = (rows + Quants::kRows - 1) / Quants::kRows;
    const int steps = blocks * groups;
    ahead.lines = (ahead.lines + steps - 1) / steps;
    int begin = 0;
    for (int block = 0; block < blocks; ++block) {
        const int end = static_cast<int>(static_cast<std::int64_t>(rows) * (block + 1) / blocks);
        const std::ptrdiff_t row = row0 + begin;
        const std::ptrdiff_t at = row * a.stride + k0;
        const Int8Rows from{a.q + at, a.scale + at / 32, a.sum16 + at / 16, a.scaled_sum + at / 32,
                            a.stride};
        int8_some<Quants, Scale, kFetchesAhead, Quants::kRows>(end - begin, quants, scales, g0,
                                                           groups, bias, from, first,
                                                           out + begin * kTileRows, ahead);
        ahead.next += static_cast<std::ptrdiff_t>(64) * ahead.lines * groups;
        begin = end;
    }
}

// The scales of groups [g0, g1) of a tile as ScaleReady.
template <class Scale>
static __attribute__((noinline)) void unpack_scales(const std::uint8_t *scales, int g0, int g1,
                                                    float *ready) {
    for (int g = g0; g < g1; ++g) {
        for (int part = 0; part < Scale::kParts; ++part, ready += kTileRows)
            for (int v = 0; v < kTileVectors; ++v)
                f_store(ready + 16 * v, Scale::scale(scales, g * Scale::kParts + part, v));
        if constexpr (Scale::kHasMinimum) {
            for (int v = 0; v < kTileVectors; ++v)
                f_store(ready + 16 * v, Scale::minimum(scales, g, v));
            ready += kTileRows;
        }
    }
}

// The same as ScaleSteps; false where one is out of their range, as 0 is.
template <class Scale>
static __attribute__((noinline)) bool unpack_steps(const std::uint8_t *scales, int g0, int g1,
                                                   float *ready) {
    F most = f_zero(), least_below_0 = f_set(-__builtin_inff());
    for (int g = g0; g < g1; ++g) {
        for (int v = 0; v < kTileVectors; ++v) {
            const F d = Scale::scale(scales, g, v);
            const F size = f_min(f_abs(d), f_set(__builtin_inff()));  // the second where one is NaN
            most = f_max(most, size);
            least_below_0 = f_max(least_below_0, f_sub(f_zero(), size));
            float *to = ready + 16 * v;
#pragma GCC unroll 8
            for (int step = 0; step < kScaleSteps; ++step, to += kTileRows) {
                const float significand = 1 + static_cast<float>(step) / kScaleSteps;
                std::int32_t bits;
                std::memcpy(&bits, &significand, 4);
                i_store(to, i_add(bits_of_f(f_mul(d, f_set(significand))), i_set(-bits)));
            }
            if constexpr (Scale::kHasMinimum) f_store(to, Scale::minimum(scales, g, v));
        }
        ready += ScaleSteps<Scale>::kFloats;
    }
    return f_max_all(most) <= kMostStepped && f_max_all(least_below_0) <= -kLeastStepped;
}

// The quants of groups [g0, g1) of a tile as kU8.
template <class Quants>
static __attribute__((noinline)) void unpack_quants(const std::uint8_t *quants, int g0, int g1,
                                                    std::uint8_t *to) {
    for (int g = g0; g < g1; ++g) {
        const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g) * Quants::kBytes;
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4, to += kWordBytes)
            for (int v = 0; v < kTileVectors; ++v) i_store(to + 64 * v, Quants::word(group, k4, v));
    }
}

template <class Quants, class Scale>
static void int8_tile(const PackedWeight &w, int tile, int k0, int k1, const Activations &a,
                      int row0, int rows, bool first, float *out, std::uint8_t *scratch) {
    const std::uint8_t *quants = w.quants(tile), *scales = w.scales(tile);
    const bool wants_steps = kTakesSteps<Scale> && rows >= ScaleSteps<Scale>::kRows;
    if (rows <= Quants::kDirectRows && !wants_steps) {
        int8_blocks<Quants, Scale, true>(
            quants + static_cast<std::ptrdiff_t>(k0 / kGroup) * Quants::kBytes,
            scales, k0 / kGroup, k0, k1, w.bias, a, row0, rows, first, out,
            Fetch{scales + Quants::kDistance + k0 / kGroup * (Quants::kBytes + Scale::kBytes), 0});
        return;
    }
    using Unpacked = std::conditional_t<Quants::kSmall, QuantsUnpacked, QuantsU8>;
    const int chunks = (k1 - k0 + kChunk - 1) / kChunk;  // of nearly equal size
    const int chunk = ((k1 - k0 + chunks - 1) / chunks + kGroup - 1) / kGroup * kGroup;
    std::uint8_t *unpacked = scratch;
    float *ready = reinterpret_cast<float *>(unpacked + chunk * kTileRows);
    for (int c0 = k0; c0 < k1; c0 += chunk) {
        const int c1 = least(c0 + chunk, k1), g0 = c0 / kGroup, g1 = c1 / kGroup;
        const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g0) * Quants::kBytes;
        // The next chunk follows this one in memory; behind the last lies the next tile.
        const std::uint8_t *next = group + (g1 - g0) * Quants::kBytes;
        const Fetch fetch{c1 < k1 ? next : next + w.scales_bytes, (g1 - g0) * Quants::kBytes / 64};
        const auto multiply = [&](auto elements, auto scaling, const std::uint8_t *from,
                                  const void *by) {
            int8_blocks<decltype(elements), decltype(scaling), false>(
                from, static_cast<const std::uint8_t *>(by), 0, c0, c1, w.bias, a, row0, rows,
                first && c0 == k0, out, fetch);
        };
        const auto multiply_all = [&](auto scaling, const void *by) {
            if constexpr (Quants::kIsBytes) {
                multiply(QuantsU8{}, scaling, group, by);
            } else if (Quants::kDirectRows == INT32_MAX && kIsSteps<decltype(scaling)>) {
                multiply(Quants{}, scaling, group, by);
            } else {
                unpack_quants<Quants>(quants, g0, g1, unpacked);
                multiply(Unpacked{}, scaling, unpacked, by);
            }
        };
        if constexpr (kTakesSteps<Scale>)
            if (wants_steps && unpack_steps<Scale>(scales, g0, g1, ready)) {
                multiply_all(ScaleSteps<Scale>{}, ready);
                continue;
            }
        if constexpr (!Scale::kLast) unpack_scales<Scale>(scales, g0, g1, ready);
        multiply_all(Prepared<Scale>{}, prepared<Scale>(scales, g0, ready));
    }
}

}  // namespace ER_ISA
}  // namespace engineroom
