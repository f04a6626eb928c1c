// kCompactBF16: bf16 in 12 bits, unpacked in registers and multiplied as bf16 (tile_float.inl).
namespace engineroom {
namespace ER_ISA {

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

}  // namespace ER_ISA
}  // namespace engineroom
