// How a group's integers are read: word(group, k4, v) is its word k4, vector v of the tile.
//
// Up to kDirectRows rows they are unpacked in registers, for more rows once beforehand (measured).
// Plain nibbles always, where a register tile is as wide as a weight tile: their unpacking runs beside
// the dot products, and fewer bytes pass the L1.
namespace engineroom {
namespace ER_ISA {

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
    static constexpr int kBytes = kNibbleBytes + kPlanes * kPlaneBytes;
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
        const std::uint8_t *bits = group + kNibbleBytes + k4 * (kWordBytes / 8) + 8 * v;
        if (kPlanes > 0) x = i_add_bits(x, bits, 16);
        if (kPlanes > 1) x = i_add_bits(x, bits + kPlaneBytes, 32);
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

}  // namespace ER_ISA
}  // namespace engineroom
