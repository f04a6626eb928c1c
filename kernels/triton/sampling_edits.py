"""Bias, bans, mask and penalties: stages 1 to 3 of kernels/sampling.py, on copies of the rows that
have any. One launch a stage, so that each sees what the stage before wrote."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS
from .sampling_numerics import NEG_INF
from .sampling_rows import (
    BAN,
    BIAS,
    CHUNK,
    EDITED,
    FIELDS,
    FREQUENCY,
    HISTORY,
    MASK_ROW,
    PRESENCE,
    REPETITION,
    Packed,
    number,
)

ENTRIES = 256  # of a row's list in one program


@triton.jit
def copy_kernel(
    x_ptr, rows_ptr, mask_ptr, work_ptr, x_stride, mask_words, vocab, CHUNK: tl.constexpr
):
    """work = x, -inf where the row's mask has no bit."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    edited = tl.load(row_ptr + EDITED).to(tl.int64)
    if edited >= 0:
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = at < vocab
        x = tl.load(x_ptr + row * x_stride + at, mask=inside)
        masked = tl.load(row_ptr + MASK_ROW).to(tl.int64)
        words = tl.load(
            mask_ptr + masked * mask_words + at // 32, mask=inside & (masked > 0), other=-1
        )
        allowed = (words >> (at % 32)) & 1
        tl.store(work_ptr + edited * vocab + at, tl.where(allowed != 0, x, NEG_INF), mask=inside)


@triton.jit
def edit_kernel(
    rows_ptr, ids_ptr, values_ptr, work_ptr, vocab, STAGE: tl.constexpr, ENTRIES: tl.constexpr
):
    """One stage of the rows' lists, whose ids are distinct within a row (bans may repeat)."""
    row_ptr = rows_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    edited = tl.load(row_ptr + EDITED).to(tl.int64)
    at = tl.load(row_ptr + STAGE) + tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < tl.load(row_ptr + STAGE + 1)
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    there = work_ptr + edited * vocab + ids
    if STAGE == BAN:
        tl.store(there, tl.full((ENTRIES,), NEG_INF, tl.float32), mask=inside)
    else:
        x = tl.load(there, mask=inside, other=0.0)
        value = tl.load(values_ptr + at, mask=inside, other=0)
        if STAGE == BIAS:
            x += value
        else:
            factor = number(row_ptr, REPETITION)
            x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
            x = x - number(row_ptr, FREQUENCY) * value.to(tl.float32)
            x = x - tl.where(value > 0, number(row_ptr, PRESENCE), 0.0)
        tl.store(there, x, mask=inside)


def launch(
    x: torch.Tensor,
    rows: Packed,
    table: torch.Tensor,
    lists: dict[str, tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor,
    work: torch.Tensor,
) -> None:
    """work [edited rows, V] = the logits after stages 1 to 3.

    x fp32 [R, V]; table: rows.table; lists: ids int32 and values of "bias", "ban" and "history";
    mask int32 [M, words].
    """
    count, vocab = x.shape
    grid = (count, triton.cdiv(vocab, CHUNK))
    copy_kernel[grid](
        x, table, mask, work, x.stride(0), mask.shape[1], vocab, CHUNK=CHUNK, **OPTIONS
    )
    for name, stage in (("bias", BIAS), ("ban", BAN), ("history", HISTORY)):
        if rows.entries[name]:
            ids, values = lists[name]
            edit_kernel[(count, triton.cdiv(rows.entries[name], ENTRIES))](
                table, ids, values, work, vocab, STAGE=stage.value, ENTRIES=ENTRIES, **OPTIONS
            )
