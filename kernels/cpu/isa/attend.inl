namespace engineroom {
namespace ER_ISA {
static void kv_write(const KVCacheView &, std::int32_t, const float *, const float *) {}
static void attend(const KVCacheView &, const AttentionRows &, int, int, float *, float *, float *,
                   std::uint8_t *) {}
}  // namespace ER_ISA
}  // namespace engineroom
