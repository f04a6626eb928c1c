"""What a quantised layer takes in place of its input, or beside it: sums over groups, or 8 bits.

A weight with minimums takes sums of x over its groups (`sums_kernel`). Activations in 8 bits,
integers or floats with one scale for each token (`activations_kernel`), come with sums of their
codes where the weight has minimums: integers, so exact. Either may take rms_norm(x) in the same
launch, and x in the order of an act-order weight's columns. Of few tokens, a layer's own programs
make all of this, to the same bits.

They lie in a scratch of fp32 columns: sums from the first column on, or a token's scale, the sums
behind it, and its codes from a column of their own.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from . import rms_norm
from .numerics import OPTIONS, TL
from .products import group_sums, largest, rows_of
from .quantised import LAYOUTS, FloatMatrix, Layout, Matrix, QuantisedMatrix
from .rms_norm import Norm
from .rounding import coded, factor_and_scale

SUMS_BLOCK = 16  # groups of one program of sums_kernel
SUMS_TOKENS = 16  # as of a layer's tile of few tokens, which makes its own sums
SUMS_TILE = {"BLOCK": SUMS_BLOCK, "TOKENS": SUMS_TOKENS, "ROWS": 64}  # rows: of an instruction
ACTIVATIONS_BLOCK = 1024  # elements of a token at a time in activations_kernel
_ALIGNED = 32  # fp32 columns of scratch


@triton.jit(do_not_specialize=["num_tokens"])
def sums_kernel(
    x_ptr,
    sums_ptr,
    normed_ptr,
    columns_ptr,
    norm_ptr,
    num_tokens,
    K,
    num_groups,
    x_stride,
    sums_stride,
    normed_stride,
    eps,
    offset,
    PRODUCT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ORDERED: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Sums of x over groups of GROUP, fp32, 0 past K; BLOCK groups of TOKENS tokens. NORM: of
    rms_norm(x), whose elements are stored as well, in the order of the groups."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    x_at = x_ptr + token[:, None] * x_stride
    root = tl.zeros((TOKENS,), tl.float32)
    if NORM:
        root = rms_norm.roots(x_ptr, token, x_stride, K, eps, TOKENS, CHUNK, LEVELS, 0)
    first = tl.arange(0, ROWS) == 0  # of rows that are all alike
    for j in range(BLOCK):
        group = tl.program_id(1) * BLOCK + j
        k = group * GROUP + tl.arange(0, GROUP)
        x = rows_of(x_at, k, K, columns_ptr, norm_ptr, root, offset, ORDERED, NORM, False)
        if NORM:
            at = normed_ptr + token[:, None] * normed_stride + k[None, :]
            tl.store(at, x, mask=(k < K)[None, :] & there[:, None])
        sums = group_sums(tl.trans(x.to(PRODUCT)), PRODUCT, ROWS, GROUP)
        at = sums_ptr + token[None, :] * sums_stride + group + tl.zeros((ROWS, 1), tl.int32)
        tl.store(at, sums, mask=first[:, None] & there[None, :] & (group < num_groups))


@triton.jit
def activations_kernel(
    x_ptr,
    codes_ptr,
    scratch_ptr,
    columns_ptr,
    norm_ptr,
    K,
    width,
    x_stride,
    codes_stride,
    scratch_stride,
    eps,
    offset,
    TO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ORDERED: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One token of x in 8 bits (rounding.py), 0 from K to width, and its scale. HAS_SUMS: of codes
    over groups of GROUP, behind the scale."""
    token = tl.program_id(0).to(tl.int64)
    x_at = x_ptr + token * x_stride + tl.zeros((1, 1), tl.int64)
    scratch_ptr += token * scratch_stride
    root = tl.zeros((1,), tl.float32)
    if NORM:
        first = tl.zeros((1,), tl.int64)
        root = rms_norm.roots(x_ptr + token * x_stride, first, 0, K, eps, 1, CHUNK, LEVELS, 0)
    most = largest(x_at, K, norm_ptr, root, offset, 1, BLOCK, NORM)
    factor, scale = factor_and_scale(most, TO)
    tl.store(scratch_ptr + tl.zeros((1,), tl.int32), scale)
    at = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        k = start + at
        x = rows_of(x_at, k, K, columns_ptr, norm_ptr, root, offset, ORDERED, NORM, False)
        code = tl.reshape(coded(x, factor[:, None], TO), (BLOCK,))
        tl.store(codes_ptr + token * codes_stride + k, code, mask=k < width)
        if HAS_SUMS:
            sums = tl.sum(tl.reshape(code, (BLOCK // GROUP, GROUP)).to(tl.int32), 1)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(scratch_ptr + 1 + group, sums.to(tl.float32), mask=group * GROUP < width)


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Scratch:
    """Columns (fp32) of a token's scratch: sums of its groups; its codes, and with them a scale."""

    sums: int
    codes: int

    @classmethod
    def of(cls, layout: Layout, K: int, activations: str) -> Scratch:
        sums = layout.groups(K) if layout.minimum else 0
        return cls(sums, layout.width(K) // 4 if activations else 0)

    @property
    def code_column(self) -> int:
        return _aligned(1 + self.sums)

    @property
    def width(self) -> int:
        if self.codes:
            return self.code_column + _aligned(self.codes)
        return _aligned(self.sums)


def scratch_width(weight: Matrix) -> int:
    """Columns of scratch that a weight needs, 0 for none."""
    if isinstance(weight, FloatMatrix):
        return 0
    return Scratch.of(weight.layout, weight.shape[1], weight.activations).width


def most_scratch(K: int, activations: str) -> int:
    """The most that a quantised weight of rows of K may need."""
    return max(
        Scratch.of(layout, K, activations if layout.multiplies(activations) else "").width
        for layout in LAYOUTS.values()
    )


def prepare(
    x: torch.Tensor,
    weight: QuantisedMatrix,
    scratch: torch.Tensor,
    norm: Norm | None = None,
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, bool]:
    """What is multiplied in place of x [M, K], and whether it is in the order of the weight's
    columns; beside it in the scratch, scales or sums. norm: rms_norm(x) is what is multiplied;
    its elements go to `normed` [M, K] where they are needed."""
    num_tokens, K = x.shape
    layout, plan = weight.layout, Scratch.of(weight.layout, K, weight.activations)
    ordered = weight.columns is not None
    first = x if norm is None else norm.weight
    columns = x if weight.columns is None else weight.columns
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    shared = {"ORDERED": ordered, "NORM": norm is not None, **rms_norm.lanes(K), **OPTIONS}
    if not weight.activations:
        out = x if normed is None else normed
        sums_kernel[(triton.cdiv(num_tokens, SUMS_TOKENS), triton.cdiv(plan.sums, SUMS_BLOCK))](
            x,
            scratch,
            out,
            columns,
            first,
            num_tokens,
            K,
            plan.sums,
            x.stride(0),
            scratch.stride(0),
            out.stride(0),
            eps,
            offset,
            PRODUCT=TL[x.dtype],
            GROUP=layout.group,
            **SUMS_TILE,
            **shared,
        )
        return (x, False) if norm is None else (out, True)
    kind = torch.int8 if weight.activations == "int8" else torch.uint8
    codes = scratch.view(kind)[:num_tokens, 4 * plan.code_column :]
    activations_kernel[(num_tokens,)](
        x,
        codes,
        scratch,
        columns,
        first,
        K,
        4 * plan.codes,
        x.stride(0),
        codes.stride(0),
        scratch.stride(0),
        eps,
        offset,
        TO=weight.activations,
        GROUP=layout.group,
        BLOCK=ACTIVATIONS_BLOCK,
        HAS_SUMS=bool(plan.sums),
        **shared,
    )
    return codes, True
