"""add, scale, softcap, sigmoid_scale and the gates: one kernel over [rows, width]."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS, gated, tanh

BLOCK = 1024


@triton.jit(do_not_specialize=["parameter"])
def map_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_stride,
    b_stride,
    out_stride,
    width,
    parameter,
    OP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    a = tl.load(a_ptr + row * a_stride + at, mask=mask, other=0.0).to(tl.float32)
    if OP == "scale":
        out = a * parameter
    elif OP == "softcap":
        out = tanh(a / parameter) * parameter
    elif OP == "sigmoid_scale":
        out = a * (1.0 / (1.0 + tl.exp(-tl.load(b_ptr + row * b_stride).to(tl.float32))))
    else:
        b = tl.load(b_ptr + row * b_stride + at, mask=mask, other=0.0).to(tl.float32)
        if OP == "add":
            out = a + b
        else:
            out = gated(a, b, OP)
    tl.store(out_ptr + row * out_stride + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, parameter: float = 0.0
) -> None:
    """out = name(a, b) or name(a, parameter); each [rows, width] with its own row stride, but that
    sigmoid_scale's b is [rows, 1]."""
    rows, width = out.shape
    if rows:
        map_kernel[(rows, triton.cdiv(width, BLOCK))](
            a,
            b,
            out,
            a.stride(0),
            b.stride(0),
            out.stride(0),
            width,
            parameter,
            OP=name,
            BLOCK=BLOCK,
            **OPTIONS,
        )
