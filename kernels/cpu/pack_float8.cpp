// Packs 8-bit floats (E4M3), and marks the steps that hold more than normal numbers.
#include "pack_parts.hpp"

namespace engineroom {
namespace packing {
namespace {

bool is_odd_e4m3(std::uint8_t code) { return (code & 0x78) == 0 || (code & 0x7f) == 0x7f; }

// Four columns of one output or of four, of which the first is k of a step's and n; returns whether some
// are subnormal numbers, zeros or NaN.
bool put_e4m3(std::uint8_t *step, int k, int n, std::uint32_t word) {
    bool is_odd = false;
    for (int i = 0; i < 4; ++i) {
        const std::uint8_t code = static_cast<std::uint8_t>(word >> 8 * i);
        step[place_in_e4m3(k + i, n)] = static_cast<std::uint8_t>(code << 4 | code >> 4);
        is_odd |= is_odd_e4m3(code);
    }
    return is_odd;
}
bool put_e4m3(std::uint8_t *step, int k, int n, Quad words) {
    const Bytes16 codes = (Bytes16)words;
    const Bytes16 odd = (Bytes16)((codes & all_of(0x78)) == 0) |
                        (Bytes16)((codes & all_of(0x7f)) == all_of(0x7f));
    const Quad halves = swapped(words);
    store_words(step + place_in_e4m3(k, n),
                ENGINEROOM_SHUFFLE(Bytes16, (Bytes16)halves, (Bytes16)halves, 0, 1, 4, 5, 8, 9, 12,
                                   13, 2, 3, 6, 7, 10, 11, 14, 15));
    std::uint64_t any[2];
    std::memcpy(any, &odd, sizeof any);
    return (any[0] | any[1]) != 0;
}

// Rows of a float and codes, or of blocks of a float and 128 codes.
template <bool kBlocks>
void pack_fp8(const TileJob &t) {
    constexpr int kBlock = 128;
    const int scales = kBlocks ? t.columns / kBlock : 1;
    for (int i = 0; i < scales; ++i)
        for (int n = 0; n < t.rows; ++n)
            store4(t.scales + 4 * (static_cast<std::size_t>(i) * kTileRows + n),
                   load4(t.row(n) + i * (4 + kBlock)));
    std::uint8_t *odd = t.scales + static_cast<std::size_t>(scales) * kFloatBytes;
    for (int k0 = 0; k0 < t.columns; k0 += 2 * kE4M3Columns) {
        const int at = k0 + 4 * (kBlocks ? k0 / kBlock + 1 : 1);
        std::uint8_t *to = t.quants + static_cast<std::size_t>(k0) * kTileRows;
        bool is_odd[2] = {false, false};
        by_rows(t.rows, [&](int n, auto word) {
            decltype(word) words[4];
            load_words(t.row(n) + at, t.row_bytes, words);
            for (int i = 0; i < 4; ++i)
                is_odd[i / 2] |= put_e4m3(to + i / 2 * kE4M3Bytes, i % 2 * 4, n, words[i]);
        });
        odd[k0 / kE4M3Columns] = is_odd[0];
        odd[k0 / kE4M3Columns + 1] = is_odd[1];
    }
}

constexpr PackFormat kFormats[] = {
    {"FP8", 32, Elements::kE4M3, Scaling::kChannel, 0, pack_fp8<false>},
    {"FP8_128", 128, Elements::kE4M3, Scaling::kSingle128, 0, pack_fp8<true>},
};

}  // namespace

PackFamily float8_formats() { return family_of(kFormats); }

}  // namespace packing
}  // namespace engineroom
