// Pairs of E4M3 numbers times 2^-8 (bf16_of_e4m3), for units that have no short way to them.
namespace engineroom {
namespace ER_ISA {

ER_INLINE P p_load_e4m3(const std::uint8_t *p) {
    std::uint16_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = bf16_of_e4m3(p[i]);
    return p_load(words);
}
ER_INLINE P p_load_e4m3_n(const std::uint8_t *p, int pairs) {
    std::uint8_t all[32] = {};
    std::memcpy(all, p, static_cast<std::size_t>(pairs) * 2);
    return p_load_e4m3(all);
}

}  // namespace ER_ISA
}  // namespace engineroom
