namespace engineroom {
namespace ER_ISA {
static void rms_norm(const float *, const float *, float *, int, float, float) {}
static void add(const float *, const float *, float *, int) {}
static void scale(const float *, float, float *, int) {}
static void softcap(const float *, float, float *, int) {}
static void silu_mul(const float *, const float *, float *, int) {}
static void gelu_tanh_mul(const float *, const float *, float *, int) {}
static void rope(const float *, const float *, const float *, float *, int, int, int, bool) {}
static void round_to(float *, int, Dtype) {}
static void to_bf16(const float *, int, int, std::uint16_t *) {}
static void to_int8(const float *, int, int, std::int8_t *, float *, float *, std::int32_t *) {}
}  // namespace ER_ISA
}  // namespace engineroom
