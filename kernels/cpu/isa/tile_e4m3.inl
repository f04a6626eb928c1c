// kE4M3: 8-bit floats, unpacked in registers to the bf16 numbers that they are (tile_float.inl).
namespace engineroom {
namespace ER_ISA {

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
    static constexpr int kColumns = kE4M3Columns;
    static constexpr int kStepBytes = kE4M3Bytes;
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

}  // namespace ER_ISA
}  // namespace engineroom
