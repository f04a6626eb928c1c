// Packs bf16 in 12 bits (kCompactBF16 of kernels.hpp), losing nothing.
#include "compact.hpp"

#include <algorithm>
#include <cstring>

#include "isa/vec_generic.hpp"
#include "quad.hpp"

namespace engineroom {
namespace {

constexpr int kVectorBytes = kCompactBytes / 3;  // of 16 outputs
constexpr std::uint8_t kMissing = 16;            // a place behind the table's

// Four bf16 of a row.
std::uint64_t load8(const std::uint8_t *p) {
    std::uint64_t x;
    std::memcpy(&x, p, 8);
    return x;
}

// Where a table has which byte.
struct Places {
    Bytes16 byte[kTableBytes], place[kTableBytes];

    explicit Places(const std::uint8_t *table) {
        for (int i = 0; i < kTableBytes; ++i) {
            byte[i] = all_of(table[i]);
            place[i] = all_of(i ^ kMissing);
        }
    }
    // kMissing for a byte that the table lacks.
    Bytes16 of(Bytes16 bytes) const {
        Bytes16 found = all_of(kMissing);
        for (int i = 0; i < kTableBytes; ++i) found ^= (Bytes16)(bytes == byte[i]) & place[i];
        return found;
    }
};

std::uint32_t place_in_bf16(int k, int n) {
    return static_cast<std::uint32_t>((k / 2 * kTileRows + n) * 2 + k % 2);
}

}  // namespace

CompactTile count_compact(const std::uint8_t *from, int rows, int columns) {
    // Four counts, so that equal neighbours do not wait for one another.
    std::uint32_t counts[4][256] = {};
    const std::size_t elements = static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
    for (std::size_t i = 0; i < elements; i += 4) {
        const std::uint64_t four = load8(from + 2 * i);
        for (int j = 0; j < 4; ++j) ++counts[j][four >> (16 * j + 8) & 255];
    }
    counts[0][0] += static_cast<std::uint32_t>((kTileRows - rows) * columns);
    for (int i = 0; i < 256; ++i) counts[0][i] += counts[1][i] + counts[2][i] + counts[3][i];
    std::uint8_t bytes[256];
    for (int i = 0; i < 256; ++i) bytes[i] = static_cast<std::uint8_t>(i);
    std::partial_sort(bytes, bytes + kTableBytes, bytes + 256, [&](std::uint8_t a, std::uint8_t b) {
        return counts[0][a] != counts[0][b] ? counts[0][a] > counts[0][b] : a < b;
    });
    CompactTile tile;
    std::memcpy(tile.table, bytes, kTableBytes);
    tile.exceptions = 0;
    for (int i = kTableBytes; i < 256; ++i) tile.exceptions += counts[0][bytes[i]];
    return tile;
}

bool make_compact(PackedWeight &layout, const std::vector<CompactTile> &tiles) {
    std::size_t most = 0;
    for (const CompactTile &tile : tiles) most = std::max<std::size_t>(most, tile.exceptions);
    const std::size_t scales = kTableBytes + (most + 1) * sizeof(Exception);
    const std::size_t scales_bytes = (scales + 63) / 64 * 64;
    const std::size_t bytes = scales_bytes + static_cast<std::size_t>(layout.num_columns) /
                                                 kCompactColumns * kCompactBytes;
    if (10 * bytes > 9 * layout.tile_bytes) return false;
    layout.elements = Elements::kCompactBF16;
    layout.scales_bytes = scales_bytes;
    layout.tile_bytes = bytes;
    return true;
}

void pack_compact(const std::uint8_t *from, int rows, const PackedWeight &layout,
                  const CompactTile &how, std::uint8_t *to) {
    const Places places(how.table);
    std::memcpy(to, how.table, kTableBytes);
    Exception *const exceptions = reinterpret_cast<Exception *>(to + kTableBytes), *end = exceptions;
    std::uint8_t *unit = to + layout.scales_bytes;
    const std::size_t row_bytes = 2 * static_cast<std::size_t>(layout.num_columns);
    for (int k = 0; k < layout.num_columns; k += kCompactColumns, unit += kCompactBytes)
        for (int n = 0; n < kTileRows; n += 4) {
            const std::uint8_t *at = from + n * row_bytes + 2 * k;
            Quad words[4];  // columns k and k + 1, k + 2 and k + 3, ... of four rows
            if (n + 4 <= rows) {
                load_words(at, row_bytes, words);
            } else {
                std::uint8_t few[sizeof words] = {};
                for (int i = 0; i < rows - n; ++i) std::memcpy(few + 16 * i, at + i * row_bytes, 16);
                load_words(few, 16, words);
            }
            std::uint8_t *vector = unit + n / 16 * kVectorBytes + n % 16 * 4;
            const Bytes16 first = places.of(even_bytes(words[0] >> 8, words[1] >> 8));
            const Bytes16 second = places.of(even_bytes(words[2] >> 8, words[3] >> 8));
            store_words(vector, even_bytes(words[0], words[1]));
            store_words(vector + 64, even_bytes(words[2], words[3]));
            store_words(vector + 128, (first & all_of(15)) | (second & all_of(15)) * all_of(16));
            std::uint64_t missing[2];
            store_words(reinterpret_cast<std::uint8_t *>(missing), (first | second) & all_of(kMissing));
            if ((missing[0] | missing[1]) == 0) continue;
            for (int i = 0; i < 4 * kCompactColumns; ++i) {
                const int column = i % kCompactColumns, row = i / kCompactColumns;
                const std::uint32_t bits = words[column / 2][row] >> (column % 2 * 16) & 0xffff;
                const Bytes16 &place = column < 4 ? first : second;
                if (place[column % 4 / 2 * 8 + row * 2 + column % 2] == kMissing)
                    *end++ = {place_in_bf16(k + column, n + row), static_cast<std::uint16_t>(bits), 0};
            }
        }
    std::sort(exceptions, end, [](Exception a, Exception b) { return a.at < b.at; });
    *end = {kNoException, 0, 0};
}

void unpack_compact(const PackedWeight &weight, int row, float *out) {
    const int tile = row / kTileRows, n = row % kTileRows, lane = n % 16;
    const std::uint8_t *table = weight.scales(tile);
    const std::uint8_t *vector = weight.quants(tile) + n / 16 * kVectorBytes + lane / 4 * 16 + lane % 4 * 2;
    for (int k = 0; k < weight.num_columns; k += kCompactColumns, vector += kCompactBytes)
        for (int i = 0; i < kCompactColumns; ++i) {  // two halves of four columns
            const std::uint8_t *at = vector + i % 4 / 2 * 8 + i % 2;
            const std::uint32_t high = table[at[128] >> (i / 4 * 4) & 15];
            out[k + i] = generic::float_of_bits(high << 24 | static_cast<std::uint32_t>(at[i / 4 * 64]) << 16);
        }
    const Exception *exception = reinterpret_cast<const Exception *>(table + kTableBytes);
    for (; exception->at != kNoException; ++exception) {
        const int pair = static_cast<int>(exception->at) / 2;  // see place_in_bf16
        if (pair % kTileRows == n)
            out[pair / kTileRows * 2 + static_cast<int>(exception->at % 2)] =
                generic::float_of_bits(static_cast<std::uint32_t>(exception->bits) << 16);
    }
}

}  // namespace engineroom
