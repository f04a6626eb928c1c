"""What several kernels compute in fp32, and the options that every launch shares.

Law 2 needs one order of operations whatever tile a kernel was compiled for, so no launch lets the
compiler contract a*b + c by itself: where a fused multiply-add is wanted it is written, `tl.fma`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl

# num_warps is 4 in every kernel unless its file says otherwise: a reduction's order follows it.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
AMD = {"matrix_instr_nonkdim": 16}  # one instruction for every width of a tile
if torch.version.hip is not None:
    OPTIONS |= AMD

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

LOG2_E = tl.constexpr(1.4426950408889634)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def tanh(x):
    """tanh by exp, and by its series where 1 - exp(-2|x|) would cancel; within 2e-7."""
    square = x * x
    series = square * 0.021869488536155203 - 0.05396825396825397
    series = square * series + 0.13333333333333333
    series = square * series - 0.3333333333333333
    near = x + x * square * series
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """silu_mul, gelu_tanh_mul or clamped_silu_mul of kernels/ops.py, elementwise."""
    if GATE == "silu_mul":
        return gate / (1.0 + tl.exp(-gate)) * up
    elif GATE == "clamped_silu_mul":
        gate = tl.where(gate > 7.0, 7.0, gate)  # tl.minimum would lose a NaN
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        u = (gate * gate * gate * 0.044715 + gate) * 0.7978845608028654
        return gate / (1.0 + tl.exp(-2.0 * u)) * up
