// The table of this unit's functions; included last.
namespace engineroom {
namespace ER_ISA {

const Kernels table = {
    ER_NAME,  kBias8, rms_norm, add,     scale,   softcap, silu_mul,
    gelu_tanh_mul, clamped_silu_mul, rope, round_to, to_bf16, to_int8,
    tile, tile_fine, finish, kv_write, attend,
};

}  // namespace ER_ISA
}  // namespace engineroom
