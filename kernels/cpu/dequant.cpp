// Turns quantised blocks into float32, bit for bit as quant/values.py does.
//
// The block layouts are facts of the GGUF file format (llama.cpp, ggml-common.h, MIT) and stand as
// data in kernels/weights.py. Every element takes the same IEEE operations in the same order as
// the numpy specification: a block's scale is widened to float32, multiplied, and the minimum is
// added or subtracted. The build forbids contraction to fused multiply-add, so vector width does
// not show in the result and the compiler may vectorise these loops as it likes.
#include "dequant.hpp"

#include <cstring>

#include "kernels.hpp"
#include "versions.hpp"

namespace engineroom {
namespace {

ER_INLINE std::uint16_t load_u16(const std::uint8_t *p) {
    return static_cast<std::uint16_t>(p[0] | (p[1] << 8));
}

ER_INLINE std::uint32_t load_u32(const std::uint8_t *p) {
    return static_cast<std::uint32_t>(p[0]) | (static_cast<std::uint32_t>(p[1]) << 8) |
           (static_cast<std::uint32_t>(p[2]) << 16) | (static_cast<std::uint32_t>(p[3]) << 24);
}

ER_INLINE float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ER_INLINE std::uint32_t bits_of_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// IEEE half to single, exact, without table, branch (a loop of it vectorises), half-precision
// instructions, or subnormal floats on the way (a flush-to-zero mode would lose them).
ER_INLINE float float_of_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::int32_t magnitude = half & 0x7fff;
    const std::uint32_t shifted = static_cast<std::uint32_t>(magnitude) << 13;
    const std::uint32_t normal = shifted + (112u << 23);  // exponent bias 15 -> 127
    const std::uint32_t tiny = bits_of_float(static_cast<float>(magnitude) * 0x1p-24f);
    const std::uint32_t is_tiny = 0u - static_cast<std::uint32_t>(magnitude < 0x0400);
    const std::uint32_t is_special = 0u - static_cast<std::uint32_t>(magnitude >= 0x7c00);
    const std::uint32_t finite = (tiny & is_tiny) | (normal & ~is_tiny);
    return float_of_bits(finite | (is_special & 0x7f800000u) | sign);  // infinity, NaN
}

ER_INLINE float half_at(const std::uint8_t *p) { return float_of_half(load_u16(p)); }

ER_VERSIONS void run_f32(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    std::memcpy(out, in, blocks * sizeof(float));
}

ER_VERSIONS void run_f16(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t i = 0; i < blocks; ++i) {
        std::uint16_t half;
        std::memcpy(&half, in + 2 * i, sizeof half);
        out[i] = float_of_half(half);
    }
}

ER_VERSIONS void run_bf16(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t i = 0; i < blocks; ++i) {
        std::uint16_t upper;
        std::memcpy(&upper, in + 2 * i, sizeof upper);
        out[i] = float_of_bits(static_cast<std::uint32_t>(upper) << 16);
    }
}

// Q4_0, Q4_1, Q5_0, Q5_1: byte j of the nibbles holds element j (low half) and j + 16 (high half).

ER_VERSIONS void run_q4_0(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 18, out += 32) {
        const float d = half_at(in);
        const std::uint8_t *q = in + 2;
        ER_KEEP_LOOP
        for (int j = 0; j < 16; ++j) {
            out[j] = d * static_cast<float>((q[j] & 15) - 8);
            out[j + 16] = d * static_cast<float>((q[j] >> 4) - 8);
        }
    }
}

ER_VERSIONS void run_q4_1(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 20, out += 32) {
        const float d = half_at(in), m = half_at(in + 2);
        const std::uint8_t *q = in + 4;
        ER_KEEP_LOOP
        for (int j = 0; j < 16; ++j) {
            out[j] = d * static_cast<float>(q[j] & 15) + m;
            out[j + 16] = d * static_cast<float>(q[j] >> 4) + m;
        }
    }
}

// The fifth bit of element j is bit j of one 32-bit word.

ER_VERSIONS void run_q5_0(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 22, out += 32) {
        const float d = half_at(in);
        const std::uint32_t high = load_u32(in + 2);
        const std::uint8_t *q = in + 6;
        for (int j = 0; j < 16; ++j) {
            const int low = (q[j] & 15) | static_cast<int>(((high >> j) & 1) << 4);
            const int up = (q[j] >> 4) | static_cast<int>(((high >> (j + 16)) & 1) << 4);
            out[j] = d * static_cast<float>(low - 16);
            out[j + 16] = d * static_cast<float>(up - 16);
        }
    }
}

ER_VERSIONS void run_q5_1(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 24, out += 32) {
        const float d = half_at(in), m = half_at(in + 2);
        const std::uint32_t high = load_u32(in + 4);
        const std::uint8_t *q = in + 8;
        for (int j = 0; j < 16; ++j) {
            const int low = (q[j] & 15) | static_cast<int>(((high >> j) & 1) << 4);
            const int up = (q[j] >> 4) | static_cast<int>(((high >> (j + 16)) & 1) << 4);
            out[j] = d * static_cast<float>(low) + m;
            out[j + 16] = d * static_cast<float>(up) + m;
        }
    }
}

ER_VERSIONS void run_q8_0(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 34, out += 32) {
        const float d = half_at(in);
        for (int j = 0; j < 32; ++j) {
            out[j] = d * static_cast<float>(static_cast<std::int8_t>(in[2 + j]));
        }
    }
}

// Q4_K and Q5_K: 8 groups of 32. Twelve bytes hold eight 6-bit scales and eight 6-bit minima: the
// first four of each in the low six bits of bytes 0-3 and 4-7; of the last four, the low nibbles
// in bytes 8-11 (scale low half, minimum high half) and the top two bits in bits 6-7 of bytes 0-7.
struct GroupScales {
    float scale[8];
    float minimum[8];
};

ER_INLINE GroupScales unpack_scales(const std::uint8_t *p, float d, float dmin) {
    GroupScales s;
    for (int g = 0; g < 4; ++g) {
        s.scale[g] = d * static_cast<float>(p[g] & 63);
        s.minimum[g] = dmin * static_cast<float>(p[g + 4] & 63);
        s.scale[g + 4] = d * static_cast<float>((p[g + 8] & 15) | ((p[g] >> 6) << 4));
        s.minimum[g + 4] = dmin * static_cast<float>((p[g + 8] >> 4) | ((p[g + 4] >> 6) << 4));
    }
    return s;
}

ER_VERSIONS void run_q4_k(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 144) {
        const GroupScales s = unpack_scales(in + 4, half_at(in), half_at(in + 2));
        const std::uint8_t *q = in + 16;
        for (int pair = 0; pair < 4; ++pair, q += 32, out += 64) {
            const float d0 = s.scale[2 * pair], m0 = s.minimum[2 * pair];
            const float d1 = s.scale[2 * pair + 1], m1 = s.minimum[2 * pair + 1];
            for (int j = 0; j < 32; ++j) {
                out[j] = d0 * static_cast<float>(q[j] & 15) - m0;
                out[j + 32] = d1 * static_cast<float>(q[j] >> 4) - m1;
            }
        }
    }
}

ER_VERSIONS void run_q5_k(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 176) {
        const GroupScales s = unpack_scales(in + 4, half_at(in), half_at(in + 2));
        const std::uint8_t *high = in + 16;
        const std::uint8_t *q = in + 48;
        for (int pair = 0; pair < 4; ++pair, q += 32, out += 64) {
            const float d0 = s.scale[2 * pair], m0 = s.minimum[2 * pair];
            const float d1 = s.scale[2 * pair + 1], m1 = s.minimum[2 * pair + 1];
            for (int j = 0; j < 32; ++j) {
                const int low = (q[j] & 15) | (((high[j] >> (2 * pair)) & 1) << 4);
                const int up = (q[j] >> 4) | (((high[j] >> (2 * pair + 1)) & 1) << 4);
                out[j] = d0 * static_cast<float>(low) - m0;
                out[j + 32] = d1 * static_cast<float>(up) - m1;
            }
        }
    }
}

// Q6_K: two halves of 128 elements; within a half, quarter k of 32 takes its low nibble from byte
// j + 32 * (k % 2) (upper half of the byte for k >= 2) and its top bits from bits 2k of high[j].
// A scale covers 16 elements.
ER_VERSIONS void run_q6_k(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 210) {
        const float d = half_at(in + 208);
        for (int half = 0; half < 2; ++half, out += 128) {
            const std::uint8_t *low = in + 64 * half;
            const std::uint8_t *high = in + 128 + 32 * half;
            const std::uint8_t *scales = in + 192 + 8 * half;
            float scale[8];
            for (int g = 0; g < 8; ++g) {
                scale[g] = d * static_cast<float>(static_cast<std::int8_t>(scales[g]));
            }
            for (int part = 0; part < 2; ++part) {  // elements 0-15 and 16-31 of each quarter
                for (int i = 0; i < 16; ++i) {
                    const int j = 16 * part + i;
                    const int q0 = (low[j] & 15) | ((high[j] & 3) << 4);
                    const int q1 = (low[j + 32] & 15) | (((high[j] >> 2) & 3) << 4);
                    const int q2 = (low[j] >> 4) | (((high[j] >> 4) & 3) << 4);
                    const int q3 = (low[j + 32] >> 4) | ((high[j] >> 6) << 4);
                    out[j] = scale[part] * static_cast<float>(q0 - 32);
                    out[j + 32] = scale[part + 2] * static_cast<float>(q1 - 32);
                    out[j + 64] = scale[part + 4] * static_cast<float>(q2 - 32);
                    out[j + 96] = scale[part + 6] * static_cast<float>(q3 - 32);
                }
            }
        }
    }
}

// INT8: a float scale before the row's quants.
ER_VERSIONS void run_int8(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    const float d = float_of_bits(load_u32(in));
    in += 4;
    for (std::size_t i = 0; i < 32 * blocks; ++i)
        out[i] = d * static_cast<float>(static_cast<std::int8_t>(in[i]));
}

// INT4: two floats before the row's blocks scale every block's bytes of scale and minimum.
ER_VERSIONS void run_int4(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                          std::size_t blocks) {
    const float d = float_of_bits(load_u32(in)), dmin = float_of_bits(load_u32(in + 4));
    in += 8;
    for (std::size_t b = 0; b < blocks; ++b, in += 18, out += 32) {
        const float scale = d * static_cast<float>(in[0]);
        const float minimum = dmin * static_cast<float>(in[1]);
        const std::uint8_t *q = in + 2;
        ER_KEEP_LOOP
        for (int j = 0; j < 16; ++j) {
            out[j] = scale * static_cast<float>(q[j] & 15) - minimum;
            out[j + 16] = scale * static_cast<float>(q[j] >> 4) - minimum;
        }
    }
}

// I4G32, I4G128: a float scale and a half zero point, then nibbles; byte j of them holds elements 2j
// (low half) and 2j + 1.
template <int kElements>
ER_INLINE void int4_zero(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                         std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 6 + kElements / 2, out += kElements) {
        const float d = float_of_bits(load_u32(in));
        const float shift = d * half_at(in + 4);
        const std::uint8_t *q = in + 6;
        for (int j = 0; j < kElements / 2; ++j) {
            out[2 * j] = d * static_cast<float>((q[j] & 15) - 8) - shift;
            out[2 * j + 1] = d * static_cast<float>((q[j] >> 4) - 8) - shift;
        }
    }
}
ER_VERSIONS void run_i4g32(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                           std::size_t blocks) {
    int4_zero<32>(in, out, blocks);
}
ER_VERSIONS void run_i4g128(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                            std::size_t blocks) {
    int4_zero<128>(in, out, blocks);
}

ER_VERSIONS void run_i8g32(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                           std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 38, out += 32) {
        const float d = float_of_bits(load_u32(in));
        const float shift = d * half_at(in + 4);
        for (int j = 0; j < 32; ++j)
            out[j] = d * static_cast<float>(static_cast<std::int8_t>(in[6 + j])) - shift;
    }
}

// A float of 4 bits of exponent (bias 7) and 3 of significand: put where a float's are, it is 2^120
// too small. Subnormals are made from integers, as in float_of_half; 0x7f and 0xff are NaN.
ER_INLINE float float_of_e4m3(std::uint8_t code) {
    const std::int32_t magnitude = code & 0x7f;
    const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80) << 24;
    const std::uint32_t normal = (static_cast<std::uint32_t>(magnitude) << 20) + (120u << 23);
    const std::uint32_t tiny = bits_of_float(static_cast<float>(magnitude) * 0x1p-9f);
    const std::uint32_t is_tiny = 0u - static_cast<std::uint32_t>(magnitude < 8);
    const std::uint32_t is_nan = 0u - static_cast<std::uint32_t>(magnitude == 0x7f);
    const std::uint32_t finite = (tiny & is_tiny) | (normal & ~is_tiny);
    return float_of_bits(finite | (is_nan & 0x7fc00000u) | sign);
}

ER_VERSIONS void run_fp8(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                         std::size_t blocks) {
    const float scale = float_of_bits(load_u32(in));
    in += 4;
    for (std::size_t i = 0; i < 32 * blocks; ++i) out[i] = scale * float_of_e4m3(in[i]);
}

ER_VERSIONS void run_fp8_128(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                             std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 132, out += 128) {
        const float scale = float_of_bits(load_u32(in));
        for (int j = 0; j < 128; ++j) out[j] = scale * float_of_e4m3(in[4 + j]);
    }
}

// Byte j holds element 2 j in its high half.
ER_VERSIONS void run_codes(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                           std::size_t blocks, const float *ER_RESTRICT table) {
    for (std::size_t b = 0; b < blocks; ++b, in += 36, out += 64) {
        const float absmax = float_of_bits(load_u32(in));
        for (int j = 0; j < 32; ++j) {
            out[2 * j] = absmax * table[in[4 + j] >> 4];
            out[2 * j + 1] = absmax * table[in[4 + j] & 15];
        }
    }
}

template <const CodeTable &kTable>
void run_table(const std::uint8_t *in, float *out, std::size_t blocks) {
    run_codes(in, out, blocks, kTable.values);
}

// Twice the values of 4-bit floats; the scale or, of NVFP4, its factor is half of what it was.
ER_INLINE float doubled_e2m1(int code) { return static_cast<float>(kE2M1Units[code] - 12); }

ER_VERSIONS void run_mxfp4(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                           std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b, in += 17, out += 32) {
        const float d = float_of_bits(e8m0_half_bits(in[0]));
        for (int j = 0; j < 16; ++j) {
            out[j] = d * doubled_e2m1(in[1 + j] & 15);
            out[j + 16] = d * doubled_e2m1(in[1 + j] >> 4);
        }
    }
}

ER_VERSIONS void run_nvfp4(const std::uint8_t *ER_RESTRICT in, float *ER_RESTRICT out,
                           std::size_t blocks) {
    const float factor = float_of_bits(load_u32(in)), divisor = float_of_bits(load_u32(in + 4));
    in += 8;
    for (std::size_t b = 0; b < blocks; ++b, in += 20, out += 32) {
        for (int j = 0; j < 16; ++j) {
            const float d = float_of_half(load_u16(in + j / 8 * 2)) * factor / divisor;
            out[2 * j] = d * doubled_e2m1(in[4 + j] & 15);
            out[2 * j + 1] = d * doubled_e2m1(in[4 + j] >> 4);
        }
    }
}

const DequantFormat kFormats[] = {
    {"F32", 1, 4, 0, run_f32},       {"F16", 1, 2, 0, run_f16},
    {"BF16", 1, 2, 0, run_bf16},     {"Q4_0", 32, 18, 0, run_q4_0},
    {"Q4_1", 32, 20, 0, run_q4_1},   {"Q5_0", 32, 22, 0, run_q5_0},
    {"Q5_1", 32, 24, 0, run_q5_1},   {"Q8_0", 32, 34, 0, run_q8_0},
    {"Q4_K", 256, 144, 0, run_q4_k}, {"Q5_K", 256, 176, 0, run_q5_k},
    {"Q6_K", 256, 210, 0, run_q6_k}, {"INT8", 32, 32, 4, run_int8},
    {"INT4", 32, 18, 8, run_int4},   {"I4G32", 32, 22, 0, run_i4g32},
    {"I4G128", 128, 70, 0, run_i4g128}, {"I8G32", 32, 38, 0, run_i8g32},
    {"MXFP4", 32, 17, 0, run_mxfp4}, {"NVFP4", 32, 20, 8, run_nvfp4},
    {"FP8", 32, 32, 4, run_fp8},
    {"FP8_128", 128, 132, 0, run_fp8_128}, {"NF4", 64, 36, 0, run_table<kNf4>},
    {"FP4", 64, 36, 0, run_table<kFp4>},
};
constexpr std::size_t kNumFormats = sizeof kFormats / sizeof kFormats[0];

}  // namespace

float e4m3_value(std::uint8_t code) { return float_of_e4m3(code); }

const DequantFormat *find_dequant_format(const char *name) {
    for (const DequantFormat &format : kFormats) {
        if (std::strcmp(format.name, name) == 0) return &format;
    }
    return nullptr;
}

const char *dequant_format_name(std::size_t i) {
    return i < kNumFormats ? kFormats[i].name : nullptr;
}

}  // namespace engineroom
