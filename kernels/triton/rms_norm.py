"""rms_norm: a launch of its own, or the first part of the launch that reads it.

Both take a row's sum of squares in one order, so a row has the same bits by either: CHUNK lanes
each add every CHUNK-th element in ascending order, and a tree of pairs written out adds the lanes,
whatever the layout among threads. No sum depends on other rows.

A residual is added where the norm stands behind a layer (Gemma); else that addition is the epilogue
of the linear layer before.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS, TL, next_power_of_two

_CHUNK = 512  # lanes at most


@dataclass(frozen=True, eq=False)
class Norm:
    """ops.rms_norm over whole rows of what it stands before; weight fp32 [K]."""

    weight: torch.Tensor
    eps: float
    offset: float


@triton.jit
def roots(
    x_ptr,
    row,
    x_stride,
    size,
    eps,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """sqrt(mean(x^2) + eps) [ROWS] of rows [ROWS] (int64). CHUNK = 2^LEVELS; CHUNKS of them, known
    to the compiler, are read at once; 0: one after the other."""
    at = tl.arange(0, CHUNK)
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    x_at = x_ptr + row[:, None] * x_stride + at[None, :]
    if CHUNKS > 0:
        for i in tl.static_range(CHUNKS):
            x = tl.load(x_at + i * CHUNK, mask=(at < size - i * CHUNK)[None, :], other=0.0)
            x = x.to(tl.float32)
            squares += x * x
    else:
        for start in range(0, size, CHUNK):
            x = tl.load(x_at + start, mask=(at < size - start)[None, :], other=0.0)
            x = x.to(tl.float32)
            squares += x * x
    for level in tl.static_range(LEVELS):
        one, other = tl.split(tl.reshape(squares, (ROWS, CHUNK >> (level + 1), 2)))
        squares = one + other
    return tl.sqrt_rn(tl.reshape(squares, (ROWS,)) / size + eps)


@triton.jit
def normed(x, root, weight, offset, DTYPE):
    """x / root * (weight + offset), rounded to DTYPE; all broadcast."""
    return (x.to(tl.float32) / root * (weight + offset)).to(DTYPE)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    other_ptr,
    out_ptr,
    x_stride,
    other_stride,
    out_stride,
    size,
    eps,
    offset,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One group of one row. ADD: other + the norm rounded to ROUND."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride + tl.program_id(1) * size
    other_ptr += row * other_stride + tl.program_id(1) * size
    out_ptr += row * out_stride + tl.program_id(1) * size
    first = tl.zeros((1,), tl.int64)
    root = tl.sum(roots(x_ptr, first, 0, size, eps, 1, CHUNK, LEVELS, CHUNKS), 0)
    at = tl.arange(0, CHUNK)
    for i in tl.static_range(CHUNKS):
        mask = at < size - i * CHUNK
        x = tl.load(x_ptr + i * CHUNK + at, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + i * CHUNK + at, mask=mask, other=0.0)
        out = normed(x, root, weight, offset, ROUND)
        if ADD:
            other = tl.load(other_ptr + i * CHUNK + at, mask=mask, other=0.0).to(tl.float32)
            out = other + out.to(tl.float32)
        tl.store(out_ptr + i * CHUNK + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def lanes(size: int) -> dict[str, int]:
    """CHUNK and LEVELS for rows of `size`: the order of their sum."""
    chunk = min(_CHUNK, next_power_of_two(size))
    return {"CHUNK": chunk, "LEVELS": chunk.bit_length() - 1}


def tile(size: int) -> dict[str, int]:
    """Constants of rms_norm_kernel for groups of `size`."""
    order = lanes(size)
    return order | {"CHUNKS": triton.cdiv(size, order["CHUNK"])}


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    offset: float,
    other: torch.Tensor | None = None,
) -> None:
    """See ops.rms_norm.  x, out [rows, G*D], weight fp32 [D]. other [rows, G*D]: is added to the
    norm, which is rounded to its dtype before."""
    size = weight.shape[0]
    rows, width = out.shape
    if rows:
        rms_norm_kernel[(rows, width // size)](
            x,
            weight,
            out if other is None else other,
            out,
            x.stride(0),
            0 if other is None else other.stride(0),
            out.stride(0),
            size,
            eps,
            offset,
            ADD=other is not None,
            ROUND=TL[out.dtype if other is None else other.dtype],
            **tile(size),
            **OPTIONS,
        )
