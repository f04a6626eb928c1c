// Products of one weight tile with prepared rows, over the unit's vectors.
//
// Every output is one lane and its operations are fixed: per group of 32 (or 16: kParts) in
// ascending order, c is the exact integer product of quants and activations, t = d * scale,
// f = fma(c, t, f), and where the format has minima f = fma(m, scaled_sum, f); for floats,
// f = fma(w, x, f) in ascending K. The activations' second digits are added behind all of K, in the
// same way. What varies with the number of rows (unpacking first or on the
// way, how many rows share registers, blocks of K) leaves them as they are. A scale that all of K
// shares (kChannel) is left out of t: finish multiplies by it.
#include <type_traits>

namespace engineroom {
namespace ER_ISA {

constexpr int kTileVectors = kTileRows / 16;
constexpr int kWordBytes = 4 * kTileRows;             // one 4-byte unit of every output
constexpr int kNibbles = kGroup / 2 * kTileRows;      // a group's bytes of nibbles
constexpr int kPlane = kGroup * kTileRows / 8;        // a group's bytes of one bit plane
// Bytes between what is multiplied and what is fetched into the L2 meanwhile. Measured: 10 KB let
// formats of few bits overlap arithmetic and memory; the others gain most with 4 KB.
constexpr int kAhead = 4096;
constexpr int kAheadNibbles = 10240;
constexpr int kChunk = 640;          // most columns of bytes that pass the rows at a time, from the L1
constexpr int kChunkF32 = 128;       // and of fp32

static_assert(kTileVectors % kVectors == 0, "register tiles cover a weight tile");

static constexpr int least(int a, int b) { return a < b ? a : b; }

// Memory to fetch while something else is multiplied: `lines` cache lines a step.
struct Fetch {
    const std::uint8_t *next;
    int lines;
};

ER_INLINE void fetch_step(Fetch &fetch) {
    for (int i = 0; i < fetch.lines; ++i) prefetch_far(fetch.next + 64 * i);
    fetch.next += 64 * fetch.lines;
}

// ----------------------------------------------------------------------------------- quants
// How a group's integers are read: word(group, k4, v) is its word k4, vector v of the tile.
// Up to kDirectRows rows they are unpacked in registers, for more rows once beforehand (measured).
// Plain nibbles always, where a register tile is as wide as a weight tile: their unpacking runs beside
// the dot products, and fewer bytes pass the L1.

struct QuantsU8 {
    static constexpr int kBytes = kGroup * kTileRows;
    static constexpr bool kIsBytes = true;
    static constexpr bool kSmall = false;
    static constexpr const float *kValues = nullptr;
    static constexpr int kDirectRows = 8;
    static constexpr int kDistance = kAhead;
    static constexpr int kRows = kInt8Rows;
    ER_INLINE I word(const std::uint8_t *group, int k4, int v) {
        return i_load(group + k4 * kWordBytes + 64 * v);
    }
};

// kU8 that this unit unpacked itself, below 64.
struct QuantsUnpacked : QuantsU8 {
    static constexpr bool kSmall = true;
};

template <int kPlanes>
struct QuantsNibbles {
    static constexpr int kBytes = kNibbles + kPlanes * kPlane;
    static constexpr bool kIsBytes = false;
    static constexpr bool kSmall = true;
    static constexpr const float *kValues = nullptr;  // of codes, for the kF32 form
    static constexpr int kDirectRows =
        kPlanes == 0 && kVectors == kTileVectors ? INT32_MAX : 32 >> kPlanes;
    static constexpr int kDistance = kAheadNibbles;
    static constexpr int kRows = least(kInt8Rows, 5 - kPlanes);  // more would not fit the registers
    ER_INLINE I word(const std::uint8_t *group, int k4, int v) {
        const I pair = i_load(group + k4 / 2 * kWordBytes + 64 * v);
        I x = k4 % 2 ? i_high_nibbles(pair) : i_and(pair, i_set_bytes(15));
        const std::uint8_t *bits = group + kNibbles + k4 * (kWordBytes / 8) + 8 * v;
        if (kPlanes > 0) x = i_add_bits(x, bits, 16);
        if (kPlanes > 1) x = i_add_bits(x, bits + kPlane, 32);
        return x;
    }
};

// Nibbles that are places in a table, which takes a register of its own.
struct QuantsE2M1 : QuantsNibbles<0> {
    static constexpr int kDirectRows = 8;
    static constexpr int kRows = least(kInt8Rows, 3);
    ER_INLINE I word(const std::uint8_t *group, int k4, int v) {
        return i_lookup(i_bcast16(kE2M1Units), QuantsNibbles<0>::word(group, k4, v));
    }
};

// With one scaling for both halves of a group (ScaleWhole16) there is a register more.
struct QuantsE2M1Whole : QuantsE2M1 {
    static constexpr int kRows = least(kInt8Rows, 4);
};

template <const CodeTable &kTable>
struct QuantsTable : QuantsE2M1 {
    static constexpr bool kSmall = false;
    static constexpr const float *kValues = kTable.values;
    ER_INLINE I word(const std::uint8_t *group, int k4, int v) {
        return i_lookup(i_bcast16(kTable.units), QuantsNibbles<0>::word(group, k4, v));
    }
};

// ----------------------------------------------------------------------------------- scales
// scale(s, part, v): of part `part` of a tile's columns, kParts parts a group of 32; minimum(s,
// group, v): what is added per unit of the activations' sum. `s`: the tile's scales, kBytes a group.
// kLast: the scale belongs to all of K and the int8 products leave it out.

ER_INLINE const std::uint16_t *halves(const std::uint8_t *s) {
    return reinterpret_cast<const std::uint16_t *>(s);
}

ER_INLINE const float *floats(const std::uint8_t *s) {
    return reinterpret_cast<const float *>(s);
}

struct ScaleHalf {
    static constexpr int kBytes = 2 * kTileRows;
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = false;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_load_f16(halves(s) + group * kTileRows + 16 * v);
    }
};

struct ScaleHalfMin {
    static constexpr int kBytes = 4 * kTileRows;
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = true;
    static constexpr bool kLast = false;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_load_f16(halves(s) + 2 * group * kTileRows + 16 * v);
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        return f_load_f16(halves(s) + (2 * group + 1) * kTileRows + 16 * v);
    }
};

struct ScaleSuperMin {
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = true;
    static constexpr bool kLast = false;
    static constexpr int kSuperBytes = 20 * kTileRows;
    static constexpr int kBytes = kSuperBytes / 8;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        s += group / 8 * kSuperBytes;
        return f_mul(f_load_f16(halves(s) + 16 * v),
                     f_load_u8(s + (4 + 2 * (group % 8)) * kTileRows + 16 * v));
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        s += group / 8 * kSuperBytes;
        return f_sub(f_zero(), f_mul(f_load_f16(halves(s) + kTileRows + 16 * v),
                                     f_load_u8(s + (5 + 2 * (group % 8)) * kTileRows + 16 * v)));
    }
};

struct ScaleSuperSigned {
    static constexpr int kParts = 2;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = false;
    static constexpr int kSuperBytes = 18 * kTileRows;
    static constexpr int kBytes = kSuperBytes / 8;
    ER_INLINE F scale(const std::uint8_t *s, int part, int v) {
        s += part / 16 * kSuperBytes;
        return f_mul(f_load_f16(halves(s) + 16 * v),
                     f_load_s8(reinterpret_cast<const std::int8_t *>(s) +
                               (2 + part % 16) * kTileRows + 16 * v));
    }
};

struct ScaleChannel {
    static constexpr int kBytes = 0;
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = true;
    ER_INLINE F scale(const std::uint8_t *s, int, int v) { return f_load(floats(s) + 16 * v); }
};

struct ScaleChannelMin {
    static constexpr int kBytes = 2 * kTileRows;
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = true;
    static constexpr bool kLast = false;
    // Loaded anew for each group: kept, they would take registers that the products need.
    ER_INLINE const float *of_row(const std::uint8_t *s) {
        __asm__ volatile("" : "+r"(s));
        return floats(s);
    }
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_mul(f_load(of_row(s) + 16 * v),
                     f_load_u8(s + (8 + 2 * group) * kTileRows + 16 * v));
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        return f_sub(f_zero(), f_mul(f_load(of_row(s) + kTileRows + 16 * v),
                                     f_load_u8(s + (9 + 2 * group) * kTileRows + 16 * v)));
    }
};

struct ScaleSingle {
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = false;
    static constexpr int kBytes = 4 * kTileRows;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_load(floats(s) + group * kTileRows + 16 * v);
    }
};

// Two scales a group that the row's multiplies: the kInt8 form leaves that out, of_values does not.
struct ScaleRow16 {
    static constexpr int kParts = 2;
    static constexpr bool kHasMinimum = false;
    static constexpr int kBytes = 4 * kTileRows;
    ER_INLINE F times_row(F x, const std::uint8_t *s, int v) {
        const float *factor = floats(s) + kTileRows + 16 * v, *divisor = factor + kTileRows;
        return f_div(f_mul(x, f_load(factor)), f_load(divisor));
    }
};

struct ScaleHalf16 : ScaleRow16 {
    static constexpr bool kLast = false;
    ER_INLINE F scale(const std::uint8_t *s, int part, int v) {
        return f_load_f16(halves(s + kRow16Bytes) + part * kTileRows + 16 * v);
    }
    ER_INLINE F of_values(const std::uint8_t *s, int part, int v) {
        return times_row(scale(s, part, v), s, v);
    }
};

// Whole numbers: a group's two sums become one before they are floats (f_of_halves).
struct ScaleWhole16 : ScaleRow16 {
    static constexpr bool kLast = true;
    static constexpr int kFloats = 0;
    ER_INLINE I both(const std::uint8_t *s, int group, int v) {
        return i_load(s + kRow16Bytes + group * kBytes + 64 * v);
    }
    ER_INLINE F of_values(const std::uint8_t *s, int part, int v) {
        const I one = i_set(part % 2 ? 1 : 1 << 16);
        return times_row(f_of_i(i_dot_words(both(s, part / 2, v), one)), s, v);
    }
};

// For the kInt8 form in steps of the table, for the kF32 form as it is.
template <const CodeTable &kTable>
struct ScaleTable {
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = false;
    static constexpr int kBytes = 2 * kTileRows;
    ER_INLINE F of_values(const std::uint8_t *s, int group, int v) {
        return f_load(floats(s) + group / 2 * kTileRows + 16 * v);
    }
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_mul(of_values(s, group, v), f_set(kTable.step));
    }
};

// A float scale and a zero point that kGroups groups share.
template <int kGroups>
struct ScaleZero {
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = true;
    static constexpr bool kLast = false;
    static constexpr int kBlockBytes = 6 * kTileRows;
    static constexpr int kBytes = kBlockBytes / kGroups;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_load(floats(s + group / kGroups * kBlockBytes) + 16 * v);
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        const std::uint8_t *zero = s + group / kGroups * kBlockBytes + 4 * kTileRows;
        return f_sub(f_zero(), f_mul(scale(s, group, v), f_load_f16(halves(zero) + 16 * v)));
    }
};

// fp32 that this unit computed once for many rows: per group its scales, then its minima.
template <class Scale>
struct ScaleReady {
    static constexpr int kParts = Scale::kParts;
    static constexpr bool kHasMinimum = Scale::kHasMinimum;
    static constexpr bool kLast = Scale::kLast;
    static constexpr int kFloats = (kParts + kHasMinimum) * kTileRows;  // of a group
    ER_INLINE F scale(const std::uint8_t *s, int part, int v) {
        return f_load(reinterpret_cast<const float *>(s) + part / kParts * kFloats +
                      part % kParts * kTileRows + 16 * v);
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        return f_load(reinterpret_cast<const float *>(s) + group * kFloats + kParts * kTileRows +
                      16 * v);
    }
};

template <class Scale>
static constexpr bool kIsWhole = std::is_same_v<Scale, ScaleWhole16>;
// As many rows make use of scales: ScaleReady, or what they are in the tile.
template <class Scale>
using Prepared = std::conditional_t<kIsWhole<Scale>, Scale, ScaleReady<Scale>>;

// Those of groups from `group` on, where `ready` has them if they are ScaleReady.
template <class Scale>
ER_INLINE const std::uint8_t *prepared(const std::uint8_t *s, int group, const float *ready) {
    if constexpr (kIsWhole<Scale>) return s + group * Scale::kBytes;
    return reinterpret_cast<const std::uint8_t *>(ready);
}

// What an exact product is multiplied by: the weight's scale d and the activations'.
template <class Scale>
ER_INLINE F product_scale(F d, F activations) {
    if constexpr (Scale::kLast)
        return activations;
    else
        return f_mul(d, activations);
}

// ------------------------------------------------------------------------------ int8 products

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
                if constexpr (!kIsWhole<Scale>) {
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

// Groups [g0, g1) of a tile: their scales as Prepared, and as kU8 the quants that are not.
template <class Quants, class Scale>
static __attribute__((noinline)) void unpack_groups(const std::uint8_t *quants,
                                                    const std::uint8_t *scales, int g0, int g1,
                                                    std::uint8_t *to, float *ready) {
    for (int g = g0; g < g1; ++g) {
        if constexpr (!kIsWhole<Scale>)
            for (int part = 0; part < Scale::kParts; ++part, ready += kTileRows)
                for (int v = 0; v < kTileVectors; ++v)
                    f_store(ready + 16 * v, Scale::scale(scales, g * Scale::kParts + part, v));
        if constexpr (Scale::kHasMinimum) {
            for (int v = 0; v < kTileVectors; ++v)
                f_store(ready + 16 * v, Scale::minimum(scales, g, v));
            ready += kTileRows;
        }
        if constexpr (!Quants::kIsBytes) {
            const std::uint8_t *group = quants + static_cast<std::ptrdiff_t>(g) * Quants::kBytes;
#pragma GCC unroll 8
            for (int k4 = 0; k4 < 8; ++k4, to += kWordBytes)
                for (int v = 0; v < kTileVectors; ++v)
                    i_store(to + 64 * v, Quants::word(group, k4, v));
        }
    }
}

template <class Quants, class Scale>
static void int8_tile(const PackedWeight &w, int tile, int k0, int k1, const Activations &a,
                      int row0, int rows, bool first, float *out, std::uint8_t *scratch) {
    const std::uint8_t *quants = w.data + tile * w.tile_bytes + w.scales_bytes;
    const std::uint8_t *scales = w.data + tile * w.tile_bytes;
    if (rows <= Quants::kDirectRows) {
        int8_blocks<Quants, Scale, true>(
            quants + static_cast<std::ptrdiff_t>(k0 / kGroup) * Quants::kBytes,
            scales, k0 / kGroup, k0, k1, w.bias, a, row0, rows, first, out,
            Fetch{scales + Quants::kDistance + k0 / kGroup * (Quants::kBytes + Scale::kBytes), 0});
        return;
    }
    using Ready = Prepared<Scale>;
    const int chunks = (k1 - k0 + kChunk - 1) / kChunk;  // of nearly equal size
    const int chunk = ((k1 - k0 + chunks - 1) / chunks + kGroup - 1) / kGroup * kGroup;
    float *ready = reinterpret_cast<float *>(scratch);
    std::uint8_t *unpacked = reinterpret_cast<std::uint8_t *>(ready + Ready::kFloats * chunk / kGroup);
    for (int c0 = k0; c0 < k1; c0 += chunk) {
        const int c1 = least(c0 + chunk, k1);
        const std::uint8_t *group =
            quants + static_cast<std::ptrdiff_t>(c0 / kGroup) * Quants::kBytes;
        if constexpr (!Quants::kIsBytes || !Scale::kLast)
            unpack_groups<Quants, Scale>(quants, scales, c0 / kGroup, c1 / kGroup, unpacked, ready);
        // The next chunk follows this one in memory; behind the last lies the next tile.
        const std::uint8_t *next = group + (c1 - c0) / kGroup * Quants::kBytes;
        const Fetch fetch{c1 < k1 ? next : next + w.scales_bytes,
                          (c1 - c0) / kGroup * Quants::kBytes / 64};
        const std::uint8_t *from = prepared<Scale>(scales, c0 / kGroup, ready);
        const bool sets = first && c0 == k0;
        if constexpr (!Quants::kIsBytes)
            int8_blocks<std::conditional_t<Quants::kSmall, QuantsUnpacked, QuantsU8>, Ready, false>(
                unpacked, from, 0, c0, c1, w.bias, a, row0, rows, sets, out, fetch);
        else if constexpr (Scale::kLast)
            int8_blocks<QuantsU8, Scale, false>(group, scales, 0, c0, c1, w.bias, a, row0, rows,
                                                sets, out, fetch);
        else
            int8_blocks<QuantsU8, Ready, false>(group, from, 0, c0, c1, w.bias, a, row0, rows,
                                                sets, out, fetch);
    }
}

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

// --------------------------------------------------------------------------- float products
// How the weights of a step are multiplied: kColumns columns of kStepBytes bytes; add(f, w, x, ...)
// adds to f [R][kVectors] the products of rows x, `stride` elements apart. Up to kUnaidedRows rows the
// processor fetches a straight stream by itself, and our prefetches only take its slots; with more
// rows its view ahead is too short for the arithmetic (measured).

struct StepBF16 {  // pairs of bf16 with pairs of bf16
    using X = std::uint16_t;
    static constexpr int kColumns = 2;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 8;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        P p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = p_load(halves(w) + 32 * (v0 + v));
        add_pairs<R>(f, p, x, stride);
    }
    template <int R>
    ER_INLINE void add_pairs(F (&f)[R][kVectors], const P (&w)[kVectors], const X *x,
                             std::ptrdiff_t stride) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const P pair = p_bcast(x + r * stride);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) f[r][v] = p_dot(f[r][v], w[v], pair);
        }
    }
};

template <int R>
ER_INLINE void add_column(F (&f)[R][kVectors], const F (&w)[kVectors], const float *x,
                          std::ptrdiff_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const F one = f_set(x[r * stride]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) f[r][v] = f_fma(w[v], one, f[r][v]);
    }
}

struct StepF32 {
    using X = float;
    static constexpr int kColumns = 1;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 8;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        F p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            p[v] = f_load(reinterpret_cast<const float *>(w) + 16 * (v0 + v));
        add_column<R>(f, p, x, stride);
    }
};

struct StepF16 {
    using X = float;
    static constexpr int kColumns = 1;
    static constexpr int kStepBytes = 2 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 4;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        F p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = f_load_f16(halves(w) + 16 * (v0 + v));
        add_column<R>(f, p, x, stride);
    }
};

struct StepWideBF16 {  // bf16 weights, fp32 activations
    using X = float;
    static constexpr int kColumns = 2;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 4;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        P p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = p_load(halves(w) + 32 * (v0 + v));
        add_pairs<R>(f, p, x, stride);
    }
    template <int R>
    ER_INLINE void add_pairs(F (&f)[R][kVectors], const P (&w)[kVectors], const X *x,
                             std::ptrdiff_t stride) {
        F column[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) column[v] = f_even(w[v]);
        add_column<R>(f, column, x, stride);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) column[v] = f_odd(w[v]);
        add_column<R>(f, column, x + 1, stride);
    }
};

// One vector's bytes of 8 columns of kCompactBF16.
struct CompactVector {
    I low[2], places;
};

ER_INLINE CompactVector compact_load(const std::uint8_t *w) {
    return {{i_load(w), i_load(w + 64)}, i_load(w + 128)};
}

// Columns 2 q and 2 q + 1 of the 8.
ER_INLINE P compact_pairs(const CompactVector &c, int q, I table) {
    const I places = q / 2 ? i_high_nibbles(c.places) : i_and(c.places, i_set_bytes(15));
    const I low = c.low[q / 2], high = i_lookup(table, places);
    return q % 2 ? p_zip_high(low, high) : p_zip_low(low, high);
}

// kCompactBF16 unpacked in registers, then multiplied as `Plain` multiplies kBF16. Where kKeeps, what
// was unpacked stays at `unpacked` as kBF16; else there is room for one step, of which exceptions
// make use.
template <class Plain, bool kKeeps>
struct StepCompact {
    using X = typename Plain::X;
    static constexpr int kColumns = kCompactColumns;
    static constexpr int kStepBytes = kCompactBytes;
    static constexpr int kDistance = kAheadNibbles;
    static constexpr int kUnaidedRows = 2;
    I table;
    const Exception *next;  // the first that was not reached
    std::uint32_t begin;    // the step's first word in a kBF16 tile
    std::uint8_t *unpacked;

    // From column k0 on of a tile, whose scales these are.
    StepCompact(const std::uint8_t *scales, int k0, std::uint8_t *to)
        : table(i_bcast16(scales)),
          next(reinterpret_cast<const Exception *>(scales + kTableBytes)),
          begin(static_cast<std::uint32_t>(k0) * kTileRows),
          unpacked(to) {
        while (next->at < begin) ++next;
    }

    template <int R>
    inline __attribute__((always_inline)) void add(F (&f)[R][kVectors], const std::uint8_t *w,
                                                   int v0, const X *x, std::ptrdiff_t stride) {
        const std::uint32_t end = begin + kColumns * kTileRows;
        if (__builtin_expect(next->at < end, 0)) {
            for (int v = 0; v < kTileVectors; ++v)
#pragma GCC unroll 4
                for (int q = 0; q < kColumns / 2; ++q)
                    i_store(unpacked + q * kWordBytes + 64 * v,
                            compact_pairs(compact_load(w + 192 * v), q, table));
            std::uint16_t *words = reinterpret_cast<std::uint16_t *>(unpacked);
            for (; next->at < end; ++next) words[next->at - begin] = next->bits;
            for (int q = 0; q < kColumns / 2; ++q)
                Plain::template add<R>(f, unpacked + q * kWordBytes, v0, x + 2 * q, stride);
        } else {
            // Few rows read all of a step before they use it, in rising order: more of memory is
            // under way at a time.
            constexpr bool kReadsFirst = kVectors == kTileVectors && R <= kUnaidedRows;
            CompactVector c[kVectors];
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) c[v] = compact_load(w + 192 * (v0 + v));
            if (kReadsFirst) __asm__ volatile("" ::: "memory");
#pragma GCC unroll 4
            for (int q = 0; q < kColumns / 2; ++q) {
                // With so many sums no register is free to hold what two q share.
                if (R * kVectors > 21) __asm__("" : "+r"(w));
                P p[kVectors];
#pragma GCC unroll 3
                for (int v = 0; v < kVectors; ++v) {
                    if (!kReadsFirst) c[v] = compact_load(w + 192 * (v0 + v));
                    p[v] = compact_pairs(c[v], q, table);
                    if (kKeeps) i_store(unpacked + q * kWordBytes + 64 * (v0 + v), p[v]);
                }
                Plain::template add_pairs<R>(f, p, x + 2 * q, stride);
            }
        }
        begin = end;
        if (kKeeps) unpacked += kColumns / 2 * kWordBytes;
    }
};

// What a nibble of kE4M3 stands for. By place, the low half: the high byte of a normal bf16, and which
// bits of the low one are in the other half; of numbers below 2^-5 the sign alone, and they are to be
// looked up by the high half. NaN is exponent and significand of ones.
struct TablesE4M3 {
    std::uint8_t normal[16] = {60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195};
    std::uint8_t high[16] = {0, 61, 62, 63, 64, 65, 66, 67, 128, 189, 190, 191, 192, 193, 194, 195};
    std::uint8_t is_least[16] = {255, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0};
    std::uint8_t is_most[16] = {0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 255};
    std::uint8_t keeps[16] = {0,   240, 240, 240, 240, 240, 240, 240,
                              0,   240, 240, 240, 240, 240, 240, 240};
    std::uint8_t least_high[16] = {0,  59, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60};
    std::uint8_t least_low[16] = {0,   0,   128, 192, 0,   32,  64,  96,
                                  128, 144, 160, 176, 192, 208, 224, 240};
    std::uint8_t most_high[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 127};
};
static constexpr TablesE4M3 kE4M3;

// kE4M3 as the bf16 numbers that they are, unpacked in registers and multiplied as StepCompact does it.
template <class Plain, bool kKeeps>
struct StepE4M3 {
    using X = typename Plain::X;
    static constexpr int kColumns = 8;
    static constexpr int kStepBytes = kColumns * kTileRows;
    static constexpr int kDistance = kAheadNibbles;
    static constexpr int kUnaidedRows = 2;
    I table;
    const std::uint8_t *is_odd;  // of the steps to come
    std::uint8_t *unpacked;

    // From column k0 on of a tile that has these marks of steps.
    StepE4M3(const std::uint8_t *marks, int k0, std::uint8_t *to)
        : table(i_bcast16(kE4M3.normal)), is_odd(marks + k0 / kColumns), unpacked(to) {}

    // Columns 2 q and 2 q + 1 of a step of normal numbers.
    static inline __attribute__((always_inline)) P normal_pairs(const std::uint8_t *w, int q, I table) {
        const I codes = i_load(w + q / 2 * 64);
        const I high = i_lookup(table, i_and(codes, i_set_bytes(15)));
        const I low = i_and(codes, i_set_bytes(240));
        return q % 2 ? p_zip_high(low, high) : p_zip_low(low, high);
    }
    // Of any. Tables are loaded anew each time: kept, they would take registers that sums need.
    static inline __attribute__((always_inline)) I of(const std::uint8_t *bytes, I places) {
        __asm__ volatile("" : "+r"(bytes));
        return i_lookup(i_bcast16(bytes), places);
    }
    static inline __attribute__((always_inline)) P pairs(const std::uint8_t *w, int q) {
        const I codes = i_load(w + q / 2 * 64);
        const I place = i_and(codes, i_set_bytes(15)), rest = i_high_nibbles(codes);
        const I is_least = of(kE4M3.is_least, place);
        const I low = i_or(i_and(codes, of(kE4M3.keeps, place)),
                           i_and(of(kE4M3.least_low, rest), is_least));
        const I high = i_or(of(kE4M3.high, place), i_and(of(kE4M3.least_high, rest), is_least));
        const I any = i_or(high, i_and(of(kE4M3.most_high, rest), of(kE4M3.is_most, place)));
        return q % 2 ? p_zip_high(low, any) : p_zip_low(low, any);
    }

    template <int R>
    inline __attribute__((always_inline)) void add(F (&f)[R][kVectors], const std::uint8_t *w,
                                                   int v0, const X *x, std::ptrdiff_t stride) {
        if (__builtin_expect(*is_odd++, 0)) {
            for (int v = 0; v < kTileVectors; ++v)
                for (int q = 0; q < kColumns / 2; ++q)
                    i_store(unpacked + q * kWordBytes + 64 * v, pairs(w + 128 * v, q));
            for (int q = 0; q < kColumns / 2; ++q)
                Plain::template add<R>(f, unpacked + q * kWordBytes, v0, x + 2 * q, stride);
        } else {
#pragma GCC unroll 4
            for (int q = 0; q < kColumns / 2; ++q) {
                if (R * kVectors > 21) __asm__("" : "+r"(w));  // as in StepCompact
                P p[kVectors];
#pragma GCC unroll 3
                for (int v = 0; v < kVectors; ++v) {
                    p[v] = normal_pairs(w + 128 * (v0 + v), q, table);
                    if (kKeeps) i_store(unpacked + q * kWordBytes + 64 * (v0 + v), p[v]);
                }
                Plain::template add_pairs<R>(f, p, x + 2 * q, stride);
            }
        }
        if (kKeeps) unpacked += kColumns / 2 * kWordBytes;
    }
};

// out [R][48] from `steps` steps. Weights that come from memory are fetched ahead, but not where
// kUnaidedRows says so and one pass reads all of a tile; for later rows of the same weights `fetch`
// says what is fetched instead.
template <class Step, int R, bool kFromMemory>
static __attribute__((noinline)) void float_rows(const Step &start, const std::uint8_t *w,
                                                 int steps, const typename Step::X *x,
                                                 std::ptrdiff_t stride, bool first, float *out,
                                                 Fetch fetch) {
    for (int v0 = 0; v0 < kTileVectors; v0 += kVectors) {
        F f[R][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f[r][v] = first ? f_zero() : f_load(out + r * kTileRows + 16 * (v0 + v));
        Step step = start;
        const std::uint8_t *at = w;
        const typename Step::X *column = x;
        for (int s = 0; s < steps; ++s, at += Step::kStepBytes, column += Step::kColumns) {
            if (v0 == 0) {
                if constexpr (!kFromMemory)
                    fetch_step(fetch);
                else if constexpr (R > Step::kUnaidedRows || kVectors < kTileVectors)
#pragma GCC unroll 9
                    for (int i = 0; i < (Step::kStepBytes + 63) / 64; ++i)
                        prefetch_far(at + Step::kDistance + 64 * i);
            }
            step.template add<R>(f, at, v0, column, stride);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f_store(out + r * kTileRows + 16 * (v0 + v), f[r][v]);
    }
}

template <class Step, int R>
ER_INLINE void float_some(const Step &step, int rows, bool ahead, const std::uint8_t *w, int steps,
                          const typename Step::X *x, std::ptrdiff_t stride, bool first, float *out,
                          const Fetch &fetch) {
    if (R == 1 || rows == R) {
        if (ahead)
            float_rows<Step, R, true>(step, w, steps, x, stride, first, out, fetch);
        else
            float_rows<Step, R, false>(step, w, steps, x, stride, first, out, fetch);
    } else if constexpr (R > 1) {
        float_some<Step, R - 1>(step, rows, ahead, w, steps, x, stride, first, out, fetch);
    }
}

// All rows: x has row 0 at the first of `columns` columns. `ahead`: whether w comes from memory;
// then the first rows fetch it, and the later ones `fetch`. Else all rows do. Its lines: in all.
template <class Step, int kRows>
static void float_blocks(const Step &step, const std::uint8_t *w, int columns,
                         const typename Step::X *x, std::ptrdiff_t stride, int rows, bool ahead,
                         bool first, float *out, Fetch fetch) {
    const int steps = (columns + Step::kColumns - 1) / Step::kColumns;
    const int blocks = (rows + kRows - 1) / kRows;
    const int fetching = (ahead ? blocks - 1 : blocks) * steps;
    if (fetching > 0) fetch.lines = (fetch.lines + fetching - 1) / fetching;
    int begin = 0;
    for (int block = 0; block < blocks; ++block) {
        const int end = static_cast<int>(static_cast<std::int64_t>(rows) * (block + 1) / blocks);
        const bool from_memory = ahead && block == 0;
        float_some<Step, kRows>(step, end - begin, from_memory, w, steps, x + begin * stride, stride,
                                first, out + begin * kTileRows, fetch);
        if (!from_memory) fetch.next += static_cast<std::ptrdiff_t>(64) * fetch.lines * steps;
        begin = end;
    }
}

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

// --------------------------------------------------------------------------------- dispatch

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

template <class Step, int kRows>
static void float_tile(const Step &step, const PackedWeight &w, int tile, int k0, int k1,
                       const typename Step::X *x, std::ptrdiff_t stride, int row0, int rows,
                       bool first, float *out) {
    const std::uint8_t *from = w.data + tile * w.tile_bytes + w.scales_bytes;
    from += static_cast<std::ptrdiff_t>(k0 / Step::kColumns) * Step::kStepBytes;
    const int steps = (k1 - k0 + Step::kColumns - 1) / Step::kColumns;
    const std::ptrdiff_t bytes = static_cast<std::ptrdiff_t>(steps) * Step::kStepBytes;
    float_blocks<Step, kRows>(step, from, k1 - k0, x + row0 * stride + k0, stride, rows, true, first,
                              out, Fetch{from + bytes, static_cast<int>(bytes / 64)});
}

// Up to kFirst rows unpack in registers. Of more, the first do so too and leave what they unpacked to
// the others. head: what Step needs of the tile besides its elements.
template <template <class, bool> class Step, class Plain, int kFirst, int kRows>
static void unpacked_tile(const PackedWeight &w, const std::uint8_t *head, int tile, int k0, int k1,
                          const typename Plain::X *x, std::ptrdiff_t stride, int row0, int rows,
                          bool first, float *out, std::uint8_t *scratch) {
    using Keeping = Step<Plain, true>;
    if (rows <= kFirst) {
        float_tile<Step<Plain, false>, kFirst>({head, k0, scratch}, w, tile, k0, k1, x, stride, row0,
                                               rows, first, out);
        return;
    }
    const int some = rows / ((rows + kFirst - 1) / kFirst);
    float_tile<Keeping, kFirst>({head, k0, scratch}, w, tile, k0, k1, x, stride, row0, some, first,
                                out);
    const int bytes = (k1 - k0) / Keeping::kColumns * Keeping::kStepBytes;
    const std::uint8_t *next = w.data + tile * w.tile_bytes + w.scales_bytes +
                               k1 / Keeping::kColumns * Keeping::kStepBytes;
    float_blocks<Plain, kRows>(Plain{}, scratch, k1 - k0, x + (row0 + some) * stride + k0, stride,
                               rows - some, false, first, out + some * kTileRows,
                               Fetch{next, bytes / 64});
}

// kE4M3. A scale of 128 columns multiplies their sum; that of a channel is left to FinishedTile.
template <class Plain, int kFirst, int kRows>
static void e4m3_tile(const PackedWeight &w, int tile, int k0, int k1, const typename Plain::X *x,
                      std::ptrdiff_t stride, int row0, int rows, bool first, float *out,
                      std::uint8_t *scratch) {
    constexpr int kBlock = 128, kMost = 64;  // columns; rows whose sums stay in the L1
    const std::uint8_t *scales = w.data + tile * w.tile_bytes;
    if (w.scaling == Scaling::kChannel) {
        unpacked_tile<StepE4M3, Plain, kFirst, kRows>(w, scales + kWordBytes, tile, k0, k1, x, stride,
                                                      row0, rows, first, out, scratch);
        return;
    }
    const std::uint8_t *marks = scales + w.num_columns / kBlock * kWordBytes;
    float *sums = reinterpret_cast<float *>(scratch);
    std::uint8_t *rest = scratch + kMost * kTileRows * sizeof(float);
    for (int begin = 0; begin < rows; begin += kMost) {
        const int count = least(kMost, rows - begin);
        for (int c0 = k0; c0 < k1; c0 += kBlock) {
            unpacked_tile<StepE4M3, Plain, kFirst, kRows>(w, marks, tile, c0, c0 + kBlock, x, stride,
                                                          row0 + begin, count, true, sums, rest);
            F d[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v)
                d[v] = f_load(floats(scales + c0 / kBlock * kWordBytes) + 16 * v);
            for (int r = 0; r < count; ++r)
                for (int v = 0; v < kTileVectors; ++v) {
                    float *to = out + (begin + r) * kTileRows + 16 * v;
                    const F before = first && c0 == k0 ? f_zero() : f_load(to);
                    f_store(to, f_fma(f_load(sums + r * kTileRows + 16 * v), d[v], before));
                }
        }
    }
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
