namespace engineroom {
namespace ER_ISA {
static void tile(const PackedWeight &, int, int, int, const Activations &, int, int, bool, float *,
                 std::uint8_t *) {}
}  // namespace ER_ISA
}  // namespace engineroom
