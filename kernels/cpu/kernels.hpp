// What every instruction set provides, and the layouts that its functions share.
//
// One translation unit per instruction set (isa/avx512.cpp, isa/avx2.cpp, ...) compiles the same
// sources (isa/*.inl) over its own vectors (isa/vec_*.hpp) and fills one `Kernels` table;
// `best_kernels()` picks a table by CPUID. Nothing else of the module may use instructions beyond
// the compiler's default, and a unit of an instruction set may define nothing that the linker could
// share with another unit (no templates or inline functions outside its own namespace), or a machine
// without those instructions would meet them.
//
// Law 2: a result row depends on its own operands alone. Each output element is one vector lane, and
// its sum runs over K in ascending order, whatever the number of rows, tiles, threads or K-blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engineroom {

constexpr int kTileRows = 48;  // outputs (rows of the weight) of one weight tile: three vectors of 16
constexpr int kGroup = 32;     // activations that share one int8 scale
constexpr int kSuper = 256;    // elements of a k-quant's super-block; K-blocks are multiples of it

// ---------------------------------------------------------------------------------- weights

// How a tile's elements lie. uN: unsigned, the value's bias is subtracted by the kernel.
enum class Elements : std::uint8_t {
    kF32,   // [K][48] float
    kF16,   // [K][48] half
    kBF16,  // [K/2][48][2] bf16, K padded to even with a zero
    kU4,    // [K/8][48][4] bytes: byte i of unit u holds element 8u + i low, 8u + 4 + i high
    kU5,    // per group of 32: 768 bytes as kU4, then 8 x [48][4] bits of value 16, see below
    kU6,    // per group of 32: 768 bytes as kU4, then bits of value 16, then bits of value 32
    kU8,    // [K/4][48][4] bytes
    kE2M1,  // codes of 4-bit floats where kU4 has its elements; kE2M1Units says what u is
    kNF4,   // codes of a table where kU4 has its elements, as kFP4: table_of says what they are
    kFP4,
    kE4M3,  // [K/8][3][2][64] bytes of 8-bit floats, see below; K is a multiple of 32
    kCompactBF16,  // kBF16 in 12 bits an element, see below; K is a multiple of 8
};
// Bit planes of kU5 and kU6: 192 bytes a plane and group. Bit 4n + i of word k4 (48 * 4 = 192 bits,
// little-endian, 24 bytes) belongs to element 4 k4 + i of output n: the order of kU8's bytes.

// u of a 4-bit float (sign, 2 bits of exponent, 1 of significand): 12 and twice its value.
constexpr std::uint8_t kE2M1Units[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                         12, 11, 10, 9,  8,  6,  4,  0};

// What codes of 4 bits stand for where it is no integers. Form kF32 multiplies by `values`; kInt8 takes u
// of a code: 128 and its value in whole steps, to nearest.
struct CodeTable {
    float values[16];
    std::uint8_t units[16];
    float step;
};

// NF4_CODEBOOK of kernels/weights.py. Of all steps with 127 at most on either side this one moves the
// sixteen values least: by up to 0.0029.
constexpr CodeTable kNf4 = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
     0.7229568362236023f, 1.0f},
    {5, 42, 63, 79, 93, 105, 117, 128, 138, 148, 158, 170, 182, 197, 217, 251},
    static_cast<float>(1 / 123.26)};

// FP4_CODEBOOK. All values are whole steps but 1/192, which becomes 1/120: it moves by 0.0031.
constexpr CodeTable kFp4 = {
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
     -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
    {128, 129, 208, 248, 168, 188, 148, 158, 128, 127, 48, 8, 88, 68, 108, 98},
    1.0f / 120};

static inline const CodeTable &table_of(Elements elements) {
    return elements == Elements::kFP4 ? kFp4 : kNf4;
}

// kE4M3: a step of 8 columns is, per vector of 16 outputs, 64 bytes of columns 0 to 3 and 64 of columns
// 4 to 7, in the order of kCompactBF16's. A byte's low half is a float's sign and the upper three bits of
// its exponent, by which a table knows the high byte of the bf16 that it is; its high half, the
// exponent's last bit and the significand, are the low byte's upper half. That is so of normal numbers:
// behind a tile's scales a byte for each step is 1 where the step has others, else 0.

// kCompactBF16: the high byte of a bf16 (sign, seven bits of the exponent) is one of few in a trained
// weight. A tile's scales are a table of its sixteen commonest high bytes, then its exceptions. Its
// elements, per 8 columns and vector of 16 outputs: 64 low bytes of columns 0 to 3, 64 of columns 4
// to 7, 64 bytes of which the low half is the place in the table of the first's high byte, the high
// half of the second's. Byte 16 q + 8 p + 2 j + i of 64 belongs to output 4 q + j, column 2 p + i: a
// quarter's low and high bytes, interleaved, are pairs of columns as kBF16 has them.
constexpr int kCompactColumns = 8;
constexpr int kCompactBytes = kCompactColumns * kTileRows * 3 / 2;

// An element whose high byte the table lacks. `at` is its place among a kBF16 tile's 16-bit words; a
// tile's exceptions lie by rising `at`, and one of kNoException ends them.
struct Exception {
    std::uint32_t at;
    std::uint16_t bits;
    std::uint16_t unused;
};
constexpr std::uint32_t kNoException = 0xffffffffu;
constexpr int kTableBytes = 16;

// How elements become values: value = scale * (u - bias) + minimum.
enum class Scaling : std::uint8_t {
    kNone,
    kHalf,         // [K/32][48] half d.                             Q4_0 Q5_0 Q8_0
    kHalfMin,      // [K/32][2][48] half d, half m: d u + m.         Q4_1 Q5_1
    kSuperMin,     // [K/256] { half d[48], half dmin[48], 8 x { u8 sc[48], u8 mn[48] } }:
                   //   (d sc) u - (dmin mn) per 32.                 Q4_K Q5_K
    kSuperSigned,  // [K/256] { half d[48], 16 x { s8 sc[48] } }: (d sc)(u - 32) per 16.   Q6_K
    kChannel,      // float d[48]. FinishedTile multiplies by it (channel_scale).     INT8 FP8
    kChannelMin,   // float d[48], float dmin[48], [K/32] { u8 sc[48], u8 mn[48] }:
                   //   (d sc) u - (dmin mn) per 32.                 INT4
    kZero32,       // [K/32] { float d[48], half zero[48] }: d (u - bias) - (d zero).   I4G32 I8G32
    kZero128,      // the same for each 128.                         I4G128
    kSingle32,     // [K/32][48] float d.                            MXFP4
    kRow16,        // a head, then [K/32][48][2] int16 s or [K/32][2][48] half s, see below:
                   //   s factor / divisor (u - bias) per 16.        NVFP4
    kSingle64,     // [K/64][48] float d, times the value of a code. NF4 FP4
    kSingle128,    // [K/128][48] float d.                           FP8_128
};

// kRow16's head: float whole[48], factor[48], divisor[48], then 64 bytes of which the first is 1 where
// the tile's scales are int16 (a group's second scale, then its first), 0 where they are half (a
// group's first). They are int16 where a power of two of the row's own, by which factor is multiplied,
// makes them whole numbers of 16 bits. whole = factor / divisor; FinishedTile multiplies the kInt8
// form's products by it (channel_scale).
constexpr int kRow16Whole = 3 * 4 * kTileRows;  // where that byte is
constexpr int kRow16Bytes = kRow16Whole + 64;

// A weight [N, K] in tiles of 48 outputs; outputs past N are zeros. A tile is its scales, padded to
// 64 bytes, then its elements, padded to 64 bytes; `data` is 64-byte aligned.
struct PackedWeight {
    Elements elements = Elements::kF32;
    Scaling scaling = Scaling::kNone;
    int bias = 0;  // 8, 12, 16, 32, 128 where a format's integers are signed, else 0
    int num_rows = 0;
    int num_columns = 0;
    std::size_t scales_bytes = 0;  // of a tile, padded
    std::size_t tile_bytes = 0;
    const std::uint8_t *data = nullptr;

    int num_tiles() const { return (num_rows + kTileRows - 1) / kTileRows; }
    const std::uint8_t *scales(int tile) const { return data + tile * tile_bytes; }
    const std::uint8_t *quants(int tile) const { return scales(tile) + scales_bytes; }
    bool is_whole(int tile) const { return scales(tile)[kRow16Whole] != 0; }  // of kRow16
    bool is_bf16() const {  // what it holds are bf16 numbers, maybe with a scale
        return elements == Elements::kBF16 || elements == Elements::kCompactBF16 ||
               elements == Elements::kE4M3;
    }
    bool has_integers() const { return scaling != Scaling::kNone && elements != Elements::kE4M3; }
};

// ------------------------------------------------------------------------------ activations

enum class Form : std::uint8_t {
    kF32,   // multiplies any weight, dequantised to fp32
    kBF16,  // multiplies weights that are bf16 numbers: products of pairs, fp32 sums
    kInt8,  // multiplies weights of integers: int8 dot products per group of 32 (or 16: Scaling)
};

// Rows ready to be multiplied. `stride` (elements, a multiple of 32, >= K) separates rows; elements
// from K to stride are zeros. Only the members of the form in use are set.
struct Activations {
    Form form = Form::kF32;
    std::ptrdiff_t stride = 0;
    const float *f32 = nullptr;          // [rows][stride]
    const std::uint16_t *bf16 = nullptr; // [rows][stride]
    // x ~ scale * q, per group of 32: scale = max|x| / 127, raised to kScaleSteps steps from one power
    // of two to the next, and q = round-to-even(x * (1 / scale)).
    const std::int8_t *q = nullptr;           // [rows][stride]
    const float *scale = nullptr;             // [rows][stride / 32]
    const std::int32_t *sum16 = nullptr;      // [rows][stride / 16]  sum of q over 16
    // scale * float(sum of q), plus the same of the second digit
    const float *scaled_sum = nullptr;        // [rows][stride / 32]
    // A group with an outlier (max^2 > kOutlier * the row's mean square) has a second digit:
    // x ~ scale * q + fine_scale * fine_q, what the first left over: fine_scale is its max / 127,
    // not raised. One digit would round the other 31 values to a few steps. A row's second digits lie
    // one after another, the j-th of them for group fine_group[j]. A group whose scale would be below
    // kLeastScale or beyond kMostScale has scale 1 and zeros, and is all in its second digit; that of
    // one with a NaN or an infinity has the scale NaN, so that what is made of it is NaN.
    const std::int32_t *fine_count = nullptr;  // [rows]
    const std::int32_t *fine_group = nullptr;  // [rows][stride / 32]
    const std::int8_t *fine_q = nullptr;       // [rows][stride]
    const float *fine_scale = nullptr;         // [rows][stride / 32]
    const std::int32_t *fine_sum16 = nullptr;  // [rows][stride / 16]
};

// Beyond 5.7 times the row's root mean square: fewer than 12 groups in 100 of SmolLM2's activations.
// docs/performance.md has what other rules gave.
constexpr float kOutlier = 32.0f;

// A scale of activations has kScaleZeros bits of zeros, so that tables can hold what belongs to each of
// its kScaleSteps significands (ScaleSteps). Raising scales adds 10% to the square of what rounding
// loses; four steps would add 20%.
constexpr int kScaleSteps = 8, kScaleZeros = 20;
constexpr float kLeastScale = 0x1p-90f, kMostScale = 0x1p100f;
// Of such scales' products with these magnitudes none leaves the range of normal numbers.
constexpr float kLeastStepped = 0x1p-36f, kMostStepped = 0x1p26f;

// One of several rows' second digits, the rows counted from their first. A row's lie by rising group.
// Those of a group lie together where they can, so that its weights are read for several rows at once.
struct FineDigits {
    std::int32_t group;
    std::int32_t row;
    std::int32_t at;  // its place behind the first row's in fine_group
    std::int32_t of_group;  // how many of its group lie from here on, itself included
};

// Where to_int8 writes one row; the members are those of Activations.
struct Int8Row {
    std::int8_t *q;
    float *scale;
    std::int32_t *sum16;
    float *scaled_sum;
    std::int32_t *fine_count;
    std::int32_t *fine_group;
    std::int8_t *fine_q;
    float *fine_scale;
    std::int32_t *fine_sum16;
};

// ------------------------------------------------------------------------------- activations' dtype

enum class Dtype : std::uint8_t { kF32, kBF16, kF16, kInt8, kInt4, kFp8 };  // codes: of a cache alone

// ------------------------------------------------------------------------- ends of products

// What is done to a finished tile. y is the product plus bias, rounded to `dtype`.
enum class Epilogue : std::uint8_t {
    kStore,        // out = y
    kAddResidual,  // out = round(residual + y); out may be the residual
    kSiluMul,      // parts in pairs (gate, up) of equal N: gate.out = round(silu(y_gate) * y_up)
    kGeluMul,      // the same with the tanh form of gelu
    kClampedSiluMul,  // the same with ops.clamped_silu_mul
};

constexpr bool is_paired(Epilogue epilogue) {
    return epilogue != Epilogue::kStore && epilogue != Epilogue::kAddResidual;
}

// Finished products of a tile and where they go; `outputs` of a row's 48 are there.
struct FinishedTile {
    const float *y = nullptr;         // [rows][48]
    const float *scale = nullptr;     // [48] or nullptr: what y is multiplied by first
    const float *bias = nullptr;      // [outputs] or nullptr
    const float *up = nullptr;        // [rows][48] of the paired tile, its scale and its bias
    const float *up_scale = nullptr;
    const float *up_bias = nullptr;
    const float *residual = nullptr;  // [rows][residual_stride]
    std::ptrdiff_t residual_stride = 0;
    float *out = nullptr;             // [rows][out_stride]
    std::ptrdiff_t out_stride = 0;
    int rows = 0;
    int outputs = 0;
    Epilogue epilogue = Epilogue::kStore;
    Dtype dtype = Dtype::kF32;  // rounding of every intermediate result; kF32 rounds nothing
};

// -------------------------------------------------------------------------------- attention

constexpr int kKVGroup = 32;  // dims that share a scale and an offset where codes have 4 bits
constexpr int kv_groups(int head_dim) { return (head_dim + kKVGroup - 1) / kKVGroup; }

// Elements of a slot of keys or of values of one kv head.
constexpr int kv_row(Dtype dtype, int head_dim) {
    return dtype == Dtype::kInt4 ? kKVGroup / 2 * kv_groups(head_dim) : head_dim;
}

// Bytes of one block's keys, or values, of one kv head: block_size rows of elements; behind those of
// kInt8 and kFp8 one fp32 scale a slot; behind those of kInt4 the bf16 scales [groups][slots] and then the
// offsets, as many.
constexpr std::size_t kv_bytes(Dtype dtype, int block_size, int head_dim) {
    const std::size_t row = static_cast<std::size_t>(kv_row(dtype, head_dim));
    const std::size_t groups = static_cast<std::size_t>(kv_groups(head_dim));
    const bool has_bytes = dtype == Dtype::kInt8 || dtype == Dtype::kFp8;
    return static_cast<std::size_t>(block_size) * (dtype == Dtype::kInt4  ? row + 4 * groups
                                                   : has_bytes            ? row + 4
                                                   : dtype == Dtype::kF32 ? 4 * row
                                                                          : 2 * row);
}

// One layer's cache. A block of one kv head is contiguous: its keys, then its values, each of its own
// dtype. Where they are tiled, with s = 2 elements of kBF16 and kFp8, 4 of kInt8 and kInt4, else 1:
//   keys    [slots/16][row/s][16][s]
//   values  [slots/s][row][s]
// else [slots][row]. An element of kInt8 is a byte q + 128, its value scale * q; one of
// kFp8 a number of E4M3, which the scale multiplies. Byte i of 16 of kInt4
// has the codes of dims i (its low half) and i + 16 of a group of 32, a value being
// scale * code + offset; of the four slots together in its values the second and third are exchanged.
struct KVCacheView {
    Dtype key_dtype = Dtype::kF32, value_dtype = Dtype::kF32;
    int num_kv_heads = 0;
    int head_dim = 0;  // even
    int block_size = 0;
    std::uint8_t *layer = nullptr;  // block 0, kv head 0 of this layer
    std::size_t block_stride = 0;   // bytes from a block to the next
    std::size_t key_bytes = 0;      // of a block's keys of one kv head
    std::size_t head_bytes = 0;     // and of its values as well
    bool is_tiled(Dtype dtype) const {
        return block_size % 16 == 0 && (dtype != Dtype::kInt8 || head_dim % 4 == 0);
    }
    std::uint8_t *keys(std::int32_t block, int head) const {
        return layer + static_cast<std::size_t>(block) * block_stride +
               static_cast<std::size_t>(head) * head_bytes;
    }
    std::uint8_t *values(std::int32_t block, int head) const {
        return keys(block, head) + key_bytes;
    }
    // Where codes have the scales of these keys or values; aligned where they are tiled.
    std::uint8_t *scales(std::uint8_t *elements, Dtype dtype) const {
        return elements +
               static_cast<std::size_t>(block_size) * static_cast<std::size_t>(kv_row(dtype, head_dim));
    }
};

// A view of one layer whose blocks lie end to end; `layer` is the caller's.
inline KVCacheView kv_cache_view(Dtype key_dtype, Dtype value_dtype, int num_kv_heads, int head_dim,
                                 int block_size) {
    KVCacheView view;
    view.key_dtype = key_dtype;
    view.value_dtype = value_dtype;
    view.num_kv_heads = num_kv_heads;
    view.head_dim = head_dim;
    view.block_size = block_size;
    view.key_bytes = kv_bytes(key_dtype, block_size, head_dim);
    view.head_bytes = view.key_bytes + kv_bytes(value_dtype, block_size, head_dim);
    view.block_stride = view.head_bytes * static_cast<std::size_t>(num_kv_heads);
    return view;
}
// Whether there are kernels for keys and values of these dtypes.
constexpr bool is_kv_pair(Dtype keys, Dtype values) {
    return keys == values || (keys == Dtype::kInt8 && values == Dtype::kInt4);
}

constexpr int kSplit = 256;  // keys, aligned to absolute positions, that share one softmax pass

// Rows of one sequence and one kv head: `num_tokens` tokens of `group` query heads each.
struct AttentionRows {
    const float *q = nullptr;      // first token's first query head of this kv head
    std::ptrdiff_t q_stride = 0;   // floats from token to token
    const std::int32_t *positions = nullptr;  // [num_tokens]
    int num_tokens = 0;
    int group = 0;                 // query heads of the kv head, head_dim floats apart
    int kv_head = 0;
    const std::int32_t *blocks = nullptr;  // the sequence's block table
    int seq_len = 0;
    float scale = 0;
    int window = 0;   // 0: none
    float softcap = 0;  // 0: none
    // The keys that the caller will have attended after these: fetched ahead. No result depends on it.
    const std::int32_t *next_blocks = nullptr;
    int next_kv_head = 0;
    int next_position = 0;
    int next_seq_len = 0;  // 0: nothing
};

// --------------------------------------------------------------------------------- the table

struct Kernels {
    const char *name;
    int bias8;  // what the unit's dot product of kU8 elements subtracts by itself: 0 or 128

    // -- rows; n elements, any n; out may be x unless said
    void (*rms_norm)(const float *x, const float *w, float *out, int n, float eps, float offset,
                     Dtype dtype);  // which the result is rounded to
    void (*add)(const float *a, const float *b, float *out, int n);
    void (*scale)(const float *x, float factor, float *out, int n);
    void (*softcap)(const float *x, float cap, float *out, int n);
    void (*silu_mul)(const float *gate, const float *up, float *out, int n);
    void (*gelu_tanh_mul)(const float *gate, const float *up, float *out, int n);
    void (*clamped_silu_mul)(const float *gate, const float *up, float *out, int n);
    // Rotates the first 2 * pairs dims of each of `heads` heads; cos, sin [pairs].
    void (*rope)(const float *x, const float *cos, const float *sin, float *out, int heads,
                 int head_dim, int pairs, bool interleaved);
    void (*round)(float *x, int n, Dtype dtype);  // in place, to nearest even
    // -- activations: n = K; writes `stride` elements, zeros from n on
    void (*to_bf16)(const float *x, int n, int stride, std::uint16_t *out);
    void (*to_int8)(const float *x, int n, int stride, const Int8Row &out);
    // -- one weight tile x rows, over columns [k0, k1); k0 and k1 are multiples of 256 or K's end.
    // Form kInt8 leaves kChannel's d and kRow16's whole out, here and in tile_fine.
    // out [rows][48] is set where `first`, else added to. `scratch`: tile_scratch_bytes(k1 - k0).
    void (*tile)(const PackedWeight &w, int tile, int k0, int k1, const Activations &a, int row0,
                 int rows, bool first, float *out, std::uint8_t *scratch);
    // Adds to out the products of `count` second digits of rows from row0 on: after every `tile` of
    // all columns.
    void (*tile_fine)(const PackedWeight &w, int tile, const Activations &a, int row0,
                      const FineDigits *digits, int count, float *out);
    void (*finish)(const FinishedTile &t);
    // -- attention: one token's K and V of every kv head, rounded to the cache's dtype
    void (*kv_write)(const KVCacheView &cache, std::int32_t slot, const float *k, const float *v);
    // Splits [split0, split1) of the rows' keys, each split s covering positions s*256 .. s*256+255.
    // max_ and sum [splits][rows], acc [splits][rows][head_dim], row = token * group + head: the
    // split's own maximum score in units of log 2, sum of 2^(score - maximum) and of that times v;
    // a row that sees no key of a split has maximum -inf, and its sum and acc are zeros.
    void (*attend)(const KVCacheView &cache, const AttentionRows &rows, int split0, int split1,
                   float *max_, float *sum, float *acc, std::uint8_t *scratch);
};

constexpr std::size_t tile_scratch_bytes(int columns) {
    return static_cast<std::size_t>(columns) * kTileRows * sizeof(float) + 4096;
}

// Scratch of `attend` for that many rows (num_tokens * group) and head_dim.
constexpr std::size_t attend_scratch_bytes(int rows, int head_dim) {
    return static_cast<std::size_t>(rows + 16) * (kSplit * 8 + head_dim * 5 + 160) +
           static_cast<std::size_t>(2 * kSplit) * (head_dim + kKVGroup) * sizeof(float) + 4096;
}

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;    // AVX2, FMA, F16C
extern const Kernels kernels_avx512;  // AVX-512 F BW VL DQ VNNI BF16
#if defined(ENGINEROOM_AMX)
namespace amx {
// `tile` of the table "amx", which else is kernels_avx512. AMX TILE INT8 BF16.
void product(const PackedWeight &w, int tile, int k0, int k1, const Activations &a, int row0,
             int rows, bool first, float *out, std::uint8_t *scratch);
}  // namespace amx
#endif
#endif
#if defined(__aarch64__)
extern const Kernels kernels_neon;  // with the dot product instructions
#endif

// The table named, or nullptr where this machine cannot run it. nullptr names the fastest.
const Kernels *find_kernels(const char *name);
// The i-th table that this machine can run, fastest first, or nullptr past the last.
const Kernels *usable_kernels(int i);
// The i-th table of this build that this machine cannot run, and which of cpu_features() it lacks,
// separated by commas; nullptr past the last.
const char *unusable_kernels(int i, const char **lacks);

}  // namespace engineroom
