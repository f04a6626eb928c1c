// Sizes of a weight tile and of what passes the caches at a time, and prefetching.
#include "../tile_bytes.hpp"

namespace engineroom {
namespace ER_ISA {

constexpr int kTileVectors = kTileRows / 16;
constexpr int kWordBytes = 4 * kTileRows;  // one 4-byte unit of every output
// Bytes between what is multiplied and what is fetched into the L2 meanwhile. Measured: 10 KB let
// formats of few bits overlap arithmetic and memory; the others gain most with 4 KB.
constexpr int kAhead = 4096;
constexpr int kAheadNibbles = 10240;
constexpr int kChunk = 640;      // most columns of bytes that pass the rows at a time, from the L1
constexpr int kChunkF32 = 128;   // and of fp32

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

ER_INLINE const std::uint16_t *halves(const std::uint8_t *s) {
    return reinterpret_cast<const std::uint16_t *>(s);
}

ER_INLINE const float *floats(const std::uint8_t *s) {
    return reinterpret_cast<const float *>(s);
}

}  // namespace ER_ISA
}  // namespace engineroom
