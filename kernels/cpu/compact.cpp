// Packs bf16 in 12 bits (kCompactBF16 of kernels.hpp), losing nothing.
#include "compact.hpp"

#include <algorithm>
#include <cstring>

namespace engineroom {
namespace {

constexpr std::uint64_t kLowBytes = 0x00ff00ff00ff00ffu;
constexpr int kVectorBytes = kCompactBytes / 3;  // of 16 outputs
constexpr std::uint8_t kMissing = 16;            // a place behind the table's

// Four bf16 of a row.
std::uint64_t load8(const std::uint8_t *p) {
    std::uint64_t x;
    std::memcpy(&x, p, 8);
    return x;
}

// The low bytes of four 16-bit words, side by side.
std::uint32_t low_bytes(std::uint64_t words) {
    words &= kLowBytes;
    words = (words | words >> 8) & 0x0000ffff0000ffffu;
    return static_cast<std::uint32_t>(words | words >> 16);
}

std::uint32_t high_bytes(std::uint64_t words) { return low_bytes(words >> 8); }

std::uint32_t places_of(const std::uint8_t (&places)[256], std::uint32_t bytes) {
    std::uint32_t found = 0;
    for (int i = 0; i < 4; ++i)
        found |= static_cast<std::uint32_t>(places[bytes >> (8 * i) & 255]) << (8 * i);
    return found;
}

// Four bytes of output n, columns 0 to 3 or 4 to 7, among a vector's 64.
void put(std::uint8_t *to, int n, std::uint32_t bytes) {
    to += n / 4 * 16 + n % 4 * 2;
    std::memcpy(to, &bytes, 2);
    bytes >>= 16;
    std::memcpy(to + 8, &bytes, 2);
}

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
    std::uint8_t places[256];
    std::memset(places, kMissing, sizeof places);
    for (int i = 0; i < kTableBytes; ++i) places[how.table[i]] = static_cast<std::uint8_t>(i);
    std::memcpy(to, how.table, kTableBytes);
    Exception *const exceptions = reinterpret_cast<Exception *>(to + kTableBytes), *end = exceptions;
    std::uint8_t *unit = to + layout.scales_bytes;
    for (int k = 0; k < layout.num_columns; k += kCompactColumns, unit += kCompactBytes)
        for (int n = 0; n < kTileRows; ++n) {
            std::uint64_t words[2] = {};
            const std::size_t at = static_cast<std::size_t>(n) *
                                       static_cast<std::size_t>(layout.num_columns) +
                                   static_cast<std::size_t>(k);
            if (n < rows) std::memcpy(words, from + 2 * at, sizeof words);
            std::uint8_t *vector = unit + n / 16 * kVectorBytes;
            put(vector, n % 16, low_bytes(words[0]));
            put(vector + 64, n % 16, low_bytes(words[1]));
            const std::uint32_t first = places_of(places, high_bytes(words[0]));
            const std::uint32_t second = places_of(places, high_bytes(words[1]));
            constexpr std::uint32_t kPlaces = 0x0f0f0f0fu, kAnyMissing = 0x01010101u * kMissing;
            put(vector + 128, n % 16, (first & kPlaces) | (second & kPlaces) << 4);
            if (((first | second) & kAnyMissing) == 0) continue;
            for (int i = 0; i < kCompactColumns; ++i) {
                const std::uint64_t bits = words[i / 4] >> (i % 4 * 16) & 0xffff;
                if (places[bits >> 8] == kMissing)
                    *end++ = {place_in_bf16(k + i, n), static_cast<std::uint16_t>(bits), 0};
            }
        }
    std::sort(exceptions, end, [](Exception a, Exception b) { return a.at < b.at; });
    *end = {kNoException, 0, 0};
}

std::uint16_t compact_bits(const PackedWeight &weight, int tile, int k, int n) {
    const std::uint8_t *scales = weight.scales(tile);
    const Exception *exception = reinterpret_cast<const Exception *>(scales + kTableBytes);
    const std::uint32_t at = place_in_bf16(k, n);
    while (exception->at < at) ++exception;
    if (exception->at == at) return exception->bits;
    const int half = k % kCompactColumns / 4, lane = n % 16;
    const std::uint8_t *vector = weight.quants(tile) +
                                 static_cast<std::ptrdiff_t>(k / kCompactColumns) * kCompactBytes +
                                 n / 16 * kVectorBytes + lane / 4 * 16 + k % 4 / 2 * 8 +
                                 lane % 4 * 2 + k % 2;
    const int place = vector[128] >> (4 * half) & 15;
    return static_cast<std::uint16_t>(scales[place] << 8 | vector[64 * half]);
}

}  // namespace engineroom
