// How a group's scales are read: scale(s, part, v), of part `part` of a tile's columns, kParts parts a
// group of 32; minimum(s, group, v): what is added per unit of the activations' sum.
//
// `s`: the tile's scales, kBytes a group. kLast: the scale belongs to all of K and the int8 products
// leave it out.
#include <type_traits>

namespace engineroom {
namespace ER_ISA {

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
    static constexpr int kBytes = kSuperMinBytes / 8;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        s += group / 8 * kSuperMinBytes;
        return f_mul(f_load_f16(halves(s) + 16 * v),
                     f_load_u8(s + (4 + 2 * (group % 8)) * kTileRows + 16 * v));
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        s += group / 8 * kSuperMinBytes;
        return f_sub(f_zero(), f_mul(f_load_f16(halves(s) + kTileRows + 16 * v),
                                     f_load_u8(s + (5 + 2 * (group % 8)) * kTileRows + 16 * v)));
    }
};

struct ScaleSuperSigned {
    static constexpr int kParts = 2;
    static constexpr bool kHasMinimum = false;
    static constexpr bool kLast = false;
    static constexpr int kBytes = kSuperSignedBytes / 8;
    ER_INLINE F scale(const std::uint8_t *s, int part, int v) {
        s += part / 16 * kSuperSignedBytes;
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
    static constexpr int kBytes = kZeroBytes / kGroups;
    ER_INLINE F scale(const std::uint8_t *s, int group, int v) {
        return f_load(floats(s + group / kGroups * kZeroBytes) + 16 * v);
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        const std::uint8_t *zero = s + group / kGroups * kZeroBytes + kFloatBytes;
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

// What scales times an activations' scale are, without multiplying (which takes pipes that dot products
// need): their products with all significands that such a scale may have, less the significand's own
// bits, to which the scale's bits are added. Exactly so for magnitudes from kLeastStepped to kMostStepped.
template <class Scale>
struct ScaleSteps {
    static constexpr int kParts = 1;
    static constexpr bool kHasMinimum = Scale::kHasMinimum;
    static constexpr bool kLast = false;
    static constexpr int kFloats = (kScaleSteps + kHasMinimum) * kTileRows;  // of a group
    static constexpr int kRows = kHasMinimum ? 64 : 32;  // from how many on tables are worth making (measured)
    // Where the products with such a scale's significand are.
    ER_INLINE const float *of(const std::uint8_t *s, int group, const float *scale) {
        std::uint32_t bits;
        std::memcpy(&bits, scale, 4);
        const std::uint32_t step = (bits >> kScaleZeros) % kScaleSteps;
        return floats(s) + group * kFloats + static_cast<std::ptrdiff_t>(step) * kTileRows;
    }
    ER_INLINE F product(const float *products, const float *scale) {
        std::int32_t bits;
        std::memcpy(&bits, scale, 4);
        return f_of_bits(i_add(i_load(products), i_set(bits)));
    }
    ER_INLINE F minimum(const std::uint8_t *s, int group, int v) {
        return f_load(floats(s) + group * kFloats + kScaleSteps * kTileRows + 16 * v);
    }
};

template <class Scale>
static constexpr bool kIsSteps = false;
template <class Scale>
static constexpr bool kIsSteps<ScaleSteps<Scale>> = true;

// Whether many rows make use of ScaleSteps: in a unit whose dot products are so fast that it matters.
template <class Scale>
static constexpr bool kTakesSteps = Scale::kParts == 1 && !Scale::kLast && kVectors == kTileVectors;

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

}  // namespace ER_ISA
}  // namespace engineroom
