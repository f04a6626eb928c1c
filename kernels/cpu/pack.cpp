// Repacks a checkpoint's blocks into tiles (kernels.hpp): moves bits, computes nothing.
//
// The block layouts stand as data in kernels/weights.py; what they mean is said in quant/. A tile is
// filled block by block with its rows interleaved, so that what is read and what is written both stay
// within the first-level cache.
#include "pack.hpp"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "compact.hpp"
#include "dequant.hpp"
#include "isa/vec_generic.hpp"
#include "packed_matrix.hpp"

namespace engineroom {
namespace {

constexpr int kNibbleBytes = kGroup / 2 * kTileRows;     // a group's nibbles in a tile
constexpr int kPlaneBytes = kGroup * kTileRows / 8;      // a group's bits of one plane
constexpr int kHalfBytes = 2 * kTileRows;                // one half per output
constexpr int kSuperMinBytes = 2 * kHalfBytes + 16 * kTileRows;
constexpr int kSuperSignedBytes = kHalfBytes + 16 * kTileRows;
constexpr int kFloatBytes = 4 * kTileRows;               // one float per output
constexpr std::uint32_t kLow = 0x0f0f0f0fu;

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::uint32_t load4(const std::uint8_t *p) {
    std::uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

void store4(std::uint8_t *p, std::uint32_t x) { std::memcpy(p, &x, 4); }

void copy_half(std::uint8_t *to, const std::uint8_t *from) { std::memcpy(to, from, 2); }

// One tile to be filled: `rows` rows (up to 48) of the checkpoint, `row_bytes` apart.
struct TileJob {
    const std::uint8_t *from;
    std::size_t row_bytes;
    int rows;
    int columns;
    std::uint8_t *scales;
    std::uint8_t *quants;
};

// ------------------------------------------------------------------------------ plain floats

// Rows of 4-byte units (a float, or a pair of 16-bit ones): unit u of row n goes to [u][n].
void pack_units(const TileJob &t) {
    const int units = static_cast<int>(t.row_bytes / 4), rest = static_cast<int>(t.row_bytes % 4);
    constexpr int kRun = 16;  // a cache line of a row
    for (int u0 = 0; u0 < units; u0 += kRun) {
        const int run = std::min(kRun, units - u0);
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *from = t.from + n * t.row_bytes + 4 * u0;
            std::uint8_t *to = t.quants + 4 * (static_cast<std::size_t>(u0) * kTileRows + n);
            for (int u = 0; u < run; ++u) store4(to + 4 * kTileRows * u, load4(from + 4 * u));
        }
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

// ------------------------------------------------------------------------- pieces of a group

// Eight 4-bit elements in the low halves of two words -> one unit of kU4.
std::uint32_t join(std::uint32_t first, std::uint32_t second) {
    return (first & kLow) | ((second & kLow) << 4);
}

// 16 bytes: byte j holds element j (low half) and element j + 16 (high half).
void put_nibbles16(std::uint8_t *to, const std::uint8_t *q) {
    constexpr int kUnit = 4 * kTileRows;
    for (int half = 0; half < 2; ++half) {
        const std::uint32_t a = load4(q + 8 * half), b = load4(q + 8 * half + 4);
        store4(to + half * kUnit, join(a, b));
        store4(to + (half + 2) * kUnit, join(a >> 4, b >> 4));
    }
}

// 32 bytes, one element in the half of each that `shift` names.
void put_nibbles32(std::uint8_t *to, const std::uint8_t *q, int shift) {
    for (int u = 0; u < 4; ++u)
        store4(to + u * 4 * kTileRows,
               join(load4(q + 8 * u) >> shift, load4(q + 8 * u + 4) >> shift));
}

// 32 bytes s8 -> eight words of kU8, u8 = s8 + 128.
void put_signed32(std::uint8_t *to, const std::uint8_t *q) {
    for (int word = 0; word < 8; ++word)
        store4(to + word * 4 * kTileRows, load4(q + 4 * word) ^ 0x80808080u);
}

// 32 bits of one row of a plane, element 0 lowest. The plane was zeroed.
void put_bits(std::uint8_t *plane, int n, std::uint32_t bits) {
    const int shift = 4 * (n % 2);
    plane += n / 2;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t four = (bits >> 4 * word) & 15;
        plane[word * (kTileRows / 2)] |= static_cast<std::uint8_t>(four << shift);
    }
}

// Bit `shift` of each of 32 bytes, byte 0's lowest.
std::uint32_t gather_bits(const std::uint8_t *bytes, int shift) {
    std::uint32_t bits = 0;
    for (int word = 0; word < 8; ++word) {
        const std::uint32_t ones = (load4(bytes + 4 * word) >> shift) & 0x01010101u;
        bits |= ((ones * 0x01020408u) >> 24 & 15) << 4 * word;
    }
    return bits;
}

// ---------------------------------------------------------------------------- blocks of 32

template <bool kMinimum>
void put_halves(const TileJob &t, int group, int n, const std::uint8_t *block) {
    std::uint8_t *to = t.scales + static_cast<std::size_t>(group) * (1 + kMinimum) * kHalfBytes;
    copy_half(to + 2 * n, block);
    if (kMinimum) copy_half(to + kHalfBytes + 2 * n, block + 2);
}

template <bool kMinimum>
void pack_q4(const TileJob &t) {
    constexpr int kHeader = kMinimum ? 4 : 2;
    for (int g = 0; g < t.columns / kGroup; ++g)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + g * (kHeader + 16);
            put_halves<kMinimum>(t, g, n, block);
            put_nibbles16(t.quants + static_cast<std::size_t>(g) * kNibbleBytes + 4 * n,
                          block + kHeader);
        }
}

template <bool kMinimum>
void pack_q5(const TileJob &t) {
    constexpr int kHeader = kMinimum ? 4 : 2;
    for (int g = 0; g < t.columns / kGroup; ++g)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + g * (kHeader + 20);
            std::uint8_t *to = t.quants;
            to += static_cast<std::size_t>(g) * (kNibbleBytes + kPlaneBytes);
            put_halves<kMinimum>(t, g, n, block);
            put_nibbles16(to + 4 * n, block + kHeader + 4);
            put_bits(to + kNibbleBytes, n, load4(block + kHeader));
        }
}

void pack_q8_0(const TileJob &t) {
    for (int g = 0; g < t.columns / kGroup; ++g)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + g * 34;
            std::uint8_t *to = t.quants + static_cast<std::size_t>(g) * kGroup * kTileRows + 4 * n;
            put_halves<false>(t, g, n, block);
            put_signed32(to, block + 2);
        }
}

// --------------------------------------------------------------------------- blocks of 256

// Q4_K and Q5_K: d, dmin and the twelve bytes of 6-bit scales and minima.
void put_super_min(const TileJob &t, int super, int n, const std::uint8_t *block) {
    std::uint8_t *to = t.scales + static_cast<std::size_t>(super) * kSuperMinBytes;
    copy_half(to + 2 * n, block);
    copy_half(to + kHalfBytes + 2 * n, block + 2);
    const std::uint8_t *p = block + 4;
    std::uint8_t *scale = to + 2 * kHalfBytes + n, *minimum = scale + kTileRows;
    for (int g = 0; g < 4; ++g) {
        scale[2 * kTileRows * g] = p[g] & 63;
        minimum[2 * kTileRows * g] = p[g + 4] & 63;
        scale[2 * kTileRows * (g + 4)] =
            static_cast<std::uint8_t>((p[g + 8] & 15) | ((p[g] >> 6) << 4));
        minimum[2 * kTileRows * (g + 4)] =
            static_cast<std::uint8_t>((p[g + 8] >> 4) | ((p[g + 4] >> 6) << 4));
    }
}

void pack_q4_k(const TileJob &t) {
    for (int s = 0; s < t.columns / kSuper; ++s)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + s * 144;
            std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kNibbleBytes + 4 * n;
            put_super_min(t, s, n, block);
            for (int g = 0; g < 8; ++g)
                put_nibbles32(to + g * kNibbleBytes, block + 16 + 32 * (g / 2), 4 * (g % 2));
        }
}

void pack_q5_k(const TileJob &t) {
    constexpr int kBytes = kNibbleBytes + kPlaneBytes;
    for (int s = 0; s < t.columns / kSuper; ++s)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + s * 176;
            std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kBytes;
            put_super_min(t, s, n, block);
            for (int g = 0; g < 8; ++g, to += kBytes) {
                put_nibbles32(to + 4 * n, block + 48 + 32 * (g / 2), 4 * (g % 2));
                put_bits(to + kNibbleBytes, n, gather_bits(block + 16, g));
            }
        }
}

void pack_q6_k(const TileJob &t) {
    constexpr int kBytes = kNibbleBytes + 2 * kPlaneBytes;
    for (int s = 0; s < t.columns / kSuper; ++s)
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + s * 210;
            std::uint8_t *scale = t.scales + static_cast<std::size_t>(s) * kSuperSignedBytes;
            copy_half(scale + 2 * n, block + 208);
            for (int i = 0; i < 16; ++i) scale[kHalfBytes + kTileRows * i + n] = block[192 + i];
            std::uint8_t *to = t.quants + static_cast<std::size_t>(s) * 8 * kBytes;
            for (int g = 0; g < 8; ++g, to += kBytes) {
                const int half = g / 4, quarter = g % 4;  // of 128 elements, of 32
                const std::uint8_t *low = block + 64 * half + 32 * (quarter % 2);
                put_nibbles32(to + 4 * n, low, 4 * (quarter / 2));
                const std::uint8_t *high = block + 128 + 32 * half;
                put_bits(to + kNibbleBytes, n, gather_bits(high, 2 * quarter));
                put_bits(to + kNibbleBytes + kPlaneBytes, n, gather_bits(high, 2 * quarter + 1));
            }
        }
}

// ----------------------------------------------------------------------- scales of a whole row

void pack_int8(const TileJob &t) {
    for (int n = 0; n < t.rows; ++n) store4(t.scales + 4 * n, load4(t.from + n * t.row_bytes));
    for (int g = 0; g < t.columns / kGroup; ++g)
        for (int n = 0; n < t.rows; ++n)
            put_signed32(t.quants + static_cast<std::size_t>(g) * kGroup * kTileRows + 4 * n,
                         t.from + n * t.row_bytes + 4 + g * kGroup);
}

void pack_int4(const TileJob &t) {
    for (int n = 0; n < t.rows; ++n) {
        const std::uint8_t *row = t.from + n * t.row_bytes;
        store4(t.scales + 4 * n, load4(row));
        store4(t.scales + kFloatBytes + 4 * n, load4(row + 4));
    }
    for (int g = 0; g < t.columns / kGroup; ++g) {
        std::uint8_t *small = t.scales + 2 * kFloatBytes + g * 2 * kTileRows;
        for (int n = 0; n < t.rows; ++n) {
            const std::uint8_t *block = t.from + n * t.row_bytes + 8 + g * 18;
            small[n] = block[0];
            small[kTileRows + n] = block[1];
            put_nibbles16(t.quants + static_cast<std::size_t>(g) * kNibbleBytes + 4 * n, block + 2);
        }
    }
}

// ---------------------------------------------------------------------------- the formats

struct PackFormat {
    const char *name;
    int block_elements;
    Elements elements;
    Scaling scaling;
    int bias;
    void (*pack)(const TileJob &);
};

const PackFormat kFormats[] = {
    {"F32", 1, Elements::kF32, Scaling::kNone, 0, pack_units},
    {"F16", 1, Elements::kF16, Scaling::kNone, 0, pack_f16},
    {"BF16", 1, Elements::kBF16, Scaling::kNone, 0, pack_units},
    {"Q4_0", 32, Elements::kU4, Scaling::kHalf, 8, pack_q4<false>},
    {"Q4_1", 32, Elements::kU4, Scaling::kHalfMin, 0, pack_q4<true>},
    {"Q5_0", 32, Elements::kU5, Scaling::kHalf, 16, pack_q5<false>},
    {"Q5_1", 32, Elements::kU5, Scaling::kHalfMin, 0, pack_q5<true>},
    {"Q8_0", 32, Elements::kU8, Scaling::kHalf, 128, pack_q8_0},
    {"Q4_K", 256, Elements::kU4, Scaling::kSuperMin, 0, pack_q4_k},
    {"Q5_K", 256, Elements::kU5, Scaling::kSuperMin, 0, pack_q5_k},
    {"Q6_K", 256, Elements::kU6, Scaling::kSuperSigned, 32, pack_q6_k},
    {"INT8", 32, Elements::kU8, Scaling::kChannel, 128, pack_int8},
    {"INT4", 32, Elements::kU4, Scaling::kChannelMin, 0, pack_int4},
};

const PackFormat &find_format(const char *name) {
    std::string known;
    for (const PackFormat &format : kFormats) {
        if (std::strcmp(format.name, name) == 0) return format;
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    throw std::invalid_argument("no tile layout for format '" + std::string(name) +
                                "'; known: " + known);
}

std::size_t quants_bytes(Elements elements, std::size_t columns) {
    const std::size_t groups = columns / kGroup;
    switch (elements) {
        case Elements::kF32: return columns * kTileRows * 4;
        case Elements::kF16: return columns * kTileRows * 2;
        case Elements::kBF16: return (columns + 1) / 2 * kTileRows * 4;
        case Elements::kU4: return groups * kNibbleBytes;
        case Elements::kU5: return groups * (kNibbleBytes + kPlaneBytes);
        case Elements::kU6: return groups * (kNibbleBytes + 2 * kPlaneBytes);
        case Elements::kU8: return groups * kGroup * kTileRows;
        case Elements::kCompactBF16: break;  // of no format: make_compact knows
    }
    return 0;
}

std::size_t scales_bytes(Scaling scaling, std::size_t columns) {
    switch (scaling) {
        case Scaling::kNone: return 0;
        case Scaling::kHalf: return columns / kGroup * kHalfBytes;
        case Scaling::kHalfMin: return columns / kGroup * 2 * kHalfBytes;
        case Scaling::kSuperMin: return columns / kSuper * kSuperMinBytes;
        case Scaling::kSuperSigned: return columns / kSuper * kSuperSignedBytes;
        case Scaling::kChannel: return kFloatBytes;
        case Scaling::kChannelMin: return 2 * kFloatBytes + columns / kGroup * 2 * kTileRows;
    }
    return 0;
}

float half_at(const std::uint8_t *p, int i) {
    std::uint16_t half;
    std::memcpy(&half, p + 2 * i, 2);
    return generic::float_of_half(half);
}

float float_at(const std::uint8_t *p, int i) {
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
}

// The integer of element k of output n.
int quant_at(Elements elements, const std::uint8_t *quants, int k, int n) {
    if (elements == Elements::kU8)
        return quants[(static_cast<std::size_t>(k / 4) * kTileRows + n) * 4 + k % 4];
    const int planes = elements == Elements::kU4 ? 0 : elements == Elements::kU5 ? 1 : 2;
    const std::uint8_t *group =
        quants + static_cast<std::size_t>(k / kGroup) * (kNibbleBytes + planes * kPlaneBytes);
    const int in_group = k % kGroup;
    const std::uint8_t byte = group[(in_group / 8 * kTileRows + n) * 4 + k % 4];
    int value = in_group / 4 % 2 ? byte >> 4 : byte & 15;
    for (int p = 0; p < planes; ++p) {
        const int bit = in_group / 4 * 4 * kTileRows + 4 * n + k % 4;
        const std::uint8_t *plane = group + kNibbleBytes + p * kPlaneBytes;
        value |= ((plane[bit / 8] >> (bit % 8)) & 1) << (4 + p);
    }
    return value;
}

float value_at(const PackedWeight &w, int tile, int k, int n) {
    const std::uint8_t *q = w.quants(tile), *s = w.scales(tile);
    const std::size_t at = static_cast<std::size_t>(k) * kTileRows + n;
    switch (w.elements) {
        case Elements::kF32: return float_at(q + 4 * at, 0);
        case Elements::kF16: return half_at(q + 2 * at, 0);
        case Elements::kBF16: {
            std::uint16_t x;
            q += 4 * (static_cast<std::size_t>(k / 2) * kTileRows + n);
            std::memcpy(&x, q + k % 2 * 2, 2);
            return generic::float_of_bits(static_cast<std::uint32_t>(x) << 16);
        }
        case Elements::kCompactBF16:
            return generic::float_of_bits(
                static_cast<std::uint32_t>(compact_bits(w, tile, k, n)) << 16);
        default: break;
    }
    const float value = static_cast<float>(quant_at(w.elements, q, k, n) - w.bias);
    switch (w.scaling) {
        case Scaling::kNone: break;
        case Scaling::kHalf: return half_at(s + k / kGroup * kHalfBytes, n) * value;
        case Scaling::kHalfMin:
            s += k / kGroup * 2 * kHalfBytes;
            return half_at(s, n) * value + half_at(s + kHalfBytes, n);
        case Scaling::kSuperMin: {
            s += k / kSuper * kSuperMinBytes;
            const std::uint8_t *small = s + 2 * kHalfBytes + n;
            small += k % kSuper / kGroup * 2 * kTileRows;
            const float scale = half_at(s, n) * static_cast<float>(small[0]);
            return scale * value -
                   half_at(s + kHalfBytes, n) * static_cast<float>(small[kTileRows]);
        }
        case Scaling::kSuperSigned: {
            s += k / kSuper * kSuperSignedBytes;
            const std::uint8_t small = s[kHalfBytes + k % kSuper / 16 * kTileRows + n];
            return half_at(s, n) * static_cast<float>(static_cast<std::int8_t>(small)) * value;
        }
        case Scaling::kChannel: return float_at(s, n) * value;
        case Scaling::kChannelMin: {
            const std::uint8_t *small = s + 2 * kFloatBytes + k / kGroup * 2 * kTileRows + n;
            const float scale = float_at(s, n) * static_cast<float>(small[0]);
            return scale * value -
                   float_at(s + kFloatBytes, n) * static_cast<float>(small[kTileRows]);
        }
    }
    return value;
}

// A thread's share of the tiles.
struct Tiles {
    int begin;
    int end;
};

Tiles tiles_of(const PackedWeight &layout, int thread, int threads) {
    const std::int64_t tiles = layout.num_tiles();
    return {static_cast<int>(tiles * thread / threads),
            static_cast<int>(tiles * (thread + 1) / threads)};
}

int rows_of(const PackedWeight &layout, int tile) {
    return std::min(kTileRows, layout.num_rows - tile * kTileRows);
}

// A tile's rows among those of a bf16 checkpoint.
const std::uint8_t *bf16_tile(const std::uint8_t *from, const PackedWeight &layout, int tile) {
    return from + static_cast<std::size_t>(tile) * kTileRows * 2 *
                      static_cast<std::size_t>(layout.num_columns);
}

// Memory of matrices that are packed one after another: the mapping in use and how much of it is
// taken. It belongs to the matrices in it; this only remembers where the next one may lie.
struct Shelf {
    std::mutex mutex;
    std::weak_ptr<Pages> pages;
    std::size_t used = 0;
};

constexpr std::size_t kShelfBytes = std::size_t{64} << 20;

std::shared_ptr<Pages> take_memory(std::size_t bytes, std::uint8_t **data) {
    static Shelf shelf;
    const std::lock_guard<std::mutex> lock(shelf.mutex);
    std::shared_ptr<Pages> pages = shelf.pages.lock();
    if (!pages || pages->size() - shelf.used < bytes) {
        pages = std::make_shared<Pages>(std::max(bytes, kShelfBytes));
        shelf.pages = pages;
        shelf.used = 0;
    }
    *data = pages->data() + shelf.used;
    shelf.used += padded(bytes);
    return pages;
}

}  // namespace

// ---------------------------------------------------------------------------------- memory

Pages::Pages(std::size_t bytes) : size_(padded(std::max<std::size_t>(bytes, 1))) {
#if defined(__linux__)
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    mapped_ = size_ + kHuge;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(mapping_);
    data_ = reinterpret_cast<std::uint8_t *>((start + kHuge - 1) / kHuge * kHuge);
    madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without it all works, slower
#else
    mapping_ = std::aligned_alloc(64, size_);
    if (mapping_ == nullptr) throw std::bad_alloc();
    data_ = static_cast<std::uint8_t *>(mapping_);
    std::memset(data_, 0, size_);
#endif
}

Pages::~Pages() {
#if defined(__linux__)
    munmap(mapping_, mapped_);
#else
    std::free(mapping_);
#endif
}

// --------------------------------------------------------------------------------- packing

PackedWeight packed_layout(const char *format_name, int num_rows, int num_columns) {
    const PackFormat &format = find_format(format_name);
    if (num_rows < 1 || num_columns < 1)
        throw std::invalid_argument("a packed weight needs rows and columns, not [" +
                                    std::to_string(num_rows) + ", " + std::to_string(num_columns) +
                                    "]");
    if (num_columns % format.block_elements != 0)
        throw std::invalid_argument(std::string(format.name) + " stores blocks of " +
                                    std::to_string(format.block_elements) + " elements; a row of " +
                                    std::to_string(num_columns) +
                                    " is not a whole number of them");
    PackedWeight layout;
    layout.elements = format.elements;
    layout.scaling = format.scaling;
    layout.bias = format.bias;
    layout.num_rows = num_rows;
    layout.num_columns = num_columns;
    const std::size_t columns = static_cast<std::size_t>(num_columns);
    layout.scales_bytes = padded(scales_bytes(format.scaling, columns));
    layout.tile_bytes = layout.scales_bytes + padded(quants_bytes(format.elements, columns));
    return layout;
}

std::size_t packed_bytes(const PackedWeight &layout) {
    return static_cast<std::size_t>(layout.num_tiles()) * layout.tile_bytes;
}

void pack_tiles(const char *format_name, const std::uint8_t *from, const PackedWeight &layout,
                std::uint8_t *to, int thread, int threads) {
    const PackFormat &format = find_format(format_name);
    const std::size_t row_bytes = find_dequant_format(format.name)
                                      ->row_bytes(static_cast<std::size_t>(layout.num_columns));
    const Tiles mine = tiles_of(layout, thread, threads);
    const bool adds_bits =
        format.elements == Elements::kU5 || format.elements == Elements::kU6;
    for (int tile = mine.begin; tile < mine.end; ++tile) {
        std::uint8_t *at = to + static_cast<std::size_t>(tile) * layout.tile_bytes;
        const int rows = rows_of(layout, tile);
        if (rows < kTileRows || adds_bits) std::memset(at, 0, layout.tile_bytes);
        format.pack(TileJob{from + static_cast<std::size_t>(tile) * kTileRows * row_bytes,
                            row_bytes, rows, layout.num_columns, at, at + layout.scales_bytes});
    }
}

void unpack_row(const PackedWeight &weight, int row, float *out) {
    for (int k = 0; k < weight.num_columns; ++k)
        out[k] = value_at(weight, row / kTileRows, k, row % kTileRows);
}

PackedMatrix pack_matrix(const char *format_name, const std::uint8_t *from, int num_rows,
                         int num_columns, int threads, bool compact) {
    const PackFormat &format = find_format(format_name);
    PackedWeight weight = packed_layout(format.name, num_rows, num_columns);
    // Starting a thread costs about as much as packing this many bytes.
    constexpr std::size_t kThreadBytes = std::size_t{128} << 10;
    const int useful = static_cast<int>(
        std::min<std::size_t>(packed_bytes(weight) / kThreadBytes + 1, INT_MAX));
    const int used = std::max(1, std::min({threads, useful, weight.num_tiles()}));
    std::vector<CompactTile> tables;
    if (compact && weight.elements == Elements::kBF16 && num_columns % kCompactColumns == 0) {
        tables.resize(static_cast<std::size_t>(weight.num_tiles()));
        on_threads(used, [&](int thread) {
            const Tiles mine = tiles_of(weight, thread, used);
            for (int tile = mine.begin; tile < mine.end; ++tile)
                tables[static_cast<std::size_t>(tile)] = count_compact(
                    bf16_tile(from, weight, tile), rows_of(weight, tile), num_columns);
        });
        make_compact(weight, tables);
    }
    std::uint8_t *to = nullptr;
    std::shared_ptr<Pages> pages = take_memory(packed_bytes(weight), &to);
    on_threads(used, [&](int thread) {
        if (weight.elements != Elements::kCompactBF16)
            return pack_tiles(format.name, from, weight, to, thread, used);
        const Tiles mine = tiles_of(weight, thread, used);
        for (int tile = mine.begin; tile < mine.end; ++tile)
            pack_compact(bf16_tile(from, weight, tile), rows_of(weight, tile), weight,
                         tables[static_cast<std::size_t>(tile)],
                         to + static_cast<std::size_t>(tile) * weight.tile_bytes);
    });
    weight.data = to;
    return PackedMatrix(format.name, weight, std::move(pages));
}

}  // namespace engineroom
