// Packs plain floats: 32 and 16 bits an element, without scales.
#include <algorithm>

#include "pack_parts.hpp"

namespace engineroom {
namespace packing {
namespace {

// Rows of 4-byte units (a float, or a pair of 16-bit ones): unit u of row n goes to [u][n].
void pack_units(const TileJob &t) {
    const int units = static_cast<int>(t.row_bytes / 4), rest = static_cast<int>(t.row_bytes % 4);
    constexpr int kRun = 16;  // a cache line of a row
    for (int u0 = 0; u0 < units; u0 += kRun) {
        const int end = std::min(u0 + kRun, units);
        by_rows(t.rows, [&](int n, auto word) {
            const std::uint8_t *from = t.row(n);
            std::uint8_t *to = t.quants + 4 * (static_cast<std::size_t>(u0) * kTileRows + n);
            int u = u0;
            for (; u + 4 <= end; u += 4) {
                decltype(word) words[4];
                load_words(from + 4 * u, t.row_bytes, words);
                for (int i = 0; i < 4; ++i, to += 4 * kTileRows) store_words(to, words[i]);
            }
            for (; u < end; ++u, to += 4 * kTileRows)
                for (std::size_t i = 0; i < sizeof word / 4; ++i)
                    store4(to + 4 * i, load4(from + i * t.row_bytes + 4 * u));
        });
    }
    if (rest == 0) return;
    for (int n = 0; n < t.rows; ++n) {  // bf16, odd K: a pair with a zero
        std::uint32_t last = 0;
        std::memcpy(&last, t.from + n * t.row_bytes + 4 * units, static_cast<std::size_t>(rest));
        store4(t.quants + 4 * (static_cast<std::size_t>(units) * kTileRows + n), last);
    }
}

void pack_f16(const TileJob &t) {
    constexpr int kRun = 32;
    for (int k0 = 0; k0 < t.columns; k0 += kRun) {
        const int run = std::min(kRun, t.columns - k0);
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *from = t.from + n * t.row_bytes + 2 * k0;
            std::uint8_t *to = t.quants + 2 * (static_cast<std::size_t>(k0) * kTileRows + n);
            for (int k = 0; k < run; ++k) copy_half(to + 2 * kTileRows * k, from + 2 * k);
        }
    }
}

constexpr PackFormat kFormats[] = {
    {"F32", 1, Elements::kF32, Scaling::kNone, 0, pack_units},
    {"F16", 1, Elements::kF16, Scaling::kNone, 0, pack_f16},
    {"BF16", 1, Elements::kBF16, Scaling::kNone, 0, pack_units},
};

}  // namespace

PackFamily float_formats() { return family_of(kFormats); }

}  // namespace packing
}  // namespace engineroom
