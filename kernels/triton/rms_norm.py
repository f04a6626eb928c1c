"""rms_norm: one program for each group of a row, so that its sum never depends on other rows.

The addition of a residual is not fused here: it is the epilogue of the linear layer before.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS, next_power_of_two


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    size,
    eps,
    offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < size
    start = tl.program_id(1) * size
    x = tl.load(x_ptr + row * x_stride + start + at, mask=mask, other=0.0).to(tl.float32)
    root = tl.sqrt_rn(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0) + offset
    out = x / root * weight
    tl.store(out_ptr + row * out_stride + start + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, offset: float
) -> None:
    """See ops.rms_norm.  x, out [rows, G*D], weight fp32 [D]."""
    size = weight.shape[0]
    rows, width = out.shape
    if rows:
        rms_norm_kernel[(rows, width // size)](
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            size,
            eps,
            offset,
            BLOCK=next_power_of_two(size),
            **OPTIONS,
        )
