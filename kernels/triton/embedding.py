"""embedding and select_rows: rows of a table, or of a value, copied by index; and token ids that
the step before left on the device."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS
from .products import e4m3_to_float
from .quantised import GROUPS, FloatMatrix, Matrix, QuantisedMatrix, codebook

BLOCK = 512  # elements of a row in one program


@triton.jit
def rows_kernel(x_ptr, index_ptr, out_ptr, x_stride, out_stride, width, BLOCK: tl.constexpr):
    """out[i] = x[index[i]]."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + i).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0)
    tl.store(out_ptr + i * out_stride + at, x.to(out_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def quantised_rows_kernel(
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    index_ptr,
    out_ptr,
    num_rows,
    words,
    out_stride,
    width,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same from a weight in codes, each value dequantised as quant/ says."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    row = tl.load(index_ptr + i).to(tl.int64)
    if BITS == 4:
        step = at // (GROUPS * GROUP)
        word = step * GROUP + at % GROUP
        code = tl.load(codes_ptr + row * words + word, mask=mask, other=0).to(tl.int32)
        code = (code >> (4 * (at // GROUP % GROUPS))) & 0xF
    else:
        code = tl.load(codes_ptr + row * words + at, mask=mask, other=0)
    if KIND == "table":
        value = tl.load(table_ptr + code)
    elif KIND == "e4m3":
        value = e4m3_to_float(code, tl.float32)
    else:
        value = (code.to(tl.int32) - ZERO).to(tl.float32)
    if PER_ROW:
        place = row + at * 0
    else:
        place = (at // GROUP).to(tl.int64) * num_rows + row
    out = value * tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_MINIMUM:
        out += tl.load(minimum_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * out_stride + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def constants(table: QuantisedMatrix) -> dict[str, Any]:
    """Constants of quantised_rows_kernel that follow from the table."""
    layout = table.layout
    return {
        "KIND": layout.kind,
        "BITS": layout.bits,
        "ZERO": layout.zero,
        "GROUP": layout.group,
        "GROUPS": GROUPS,
        "PER_ROW": layout.per_row,
        "HAS_MINIMUM": layout.minimum,
        "BLOCK": BLOCK,
    }


@triton.jit(do_not_specialize=["num_tokens"])
def fill_in_kernel(id_ptr, sampled_ptr, num_tokens, BLOCK: tl.constexpr):
    """Id -1 - r becomes sampled[r], or 0 where that row failed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(id_ptr + at, mask=at < num_tokens, other=0)
    late = token < 0
    sampled = tl.load(sampled_ptr + tl.where(late, -1 - token, 0), mask=late, other=0)
    tl.store(id_ptr + at, tl.maximum(sampled, 0), mask=late)


def fill_in(token_ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """See StepInputs.sampled.  token_ids int32 [T], changed in place; sampled int32 [rows]."""
    num_tokens = len(token_ids)
    if num_tokens:
        fill_in_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            token_ids, sampled, num_tokens, BLOCK=BLOCK, **OPTIONS
        )


def select_rows(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = x[index[i]], rounded to out's dtype.  index int32 [rows of out]."""
    rows, width = out.shape
    if rows:
        rows_kernel[(rows, triton.cdiv(width, BLOCK))](
            x, index, out, x.stride(0), out.stride(0), width, BLOCK=BLOCK, **OPTIONS
        )


def embedding(table: Matrix, index: torch.Tensor, out: torch.Tensor) -> None:
    """See ops.embedding."""
    if isinstance(table, FloatMatrix):
        select_rows(table.data, index, out)
        return
    rows, width = out.shape
    if rows:
        quantised_rows_kernel[(rows, triton.cdiv(width, BLOCK))](
            table.codes,
            table.scale,
            table.scale if table.minimum is None else table.minimum,
            codebook(table.layout.table, torch.float32, out.device),
            index,
            out,
            table.shape[0],
            table.codes.shape[1],
            out.stride(0),
            width,
            **constants(table),
            **OPTIONS,
        )
