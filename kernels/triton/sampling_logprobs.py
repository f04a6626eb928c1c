"""Logprobs, ranks and most likely tokens, all of the raw logits."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .sampling_draw import FAILED, NAN_BITS
from .sampling_numerics import LOWEST, NEG_INF, id_of, log_sum, packed, usable, weights
from .sampling_rows import (
    FIELDS,
    NUM_LOGPROBS,
    RAW,
    WEIGHT,
    highest_raw,
    largest,
    place_in_found,
    summed,
)


@triton.jit
def weigh_kernel(
    x_ptr, rows_ptr, found_ptr, x_stride, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """WEIGHT of a chunk, in rows that report logprobs."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(rows_ptr + row * FIELDS + NUM_LOGPROBS) >= 0:
        chunk = tl.program_id(1)
        x_row = x_ptr + row * x_stride
        highest = highest_raw(x_row, found_ptr, row, chunks, CHUNKS)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_row + at, mask=at < vocab, other=NEG_INF)
        weight = tl.sum(weights(x - highest), 0)
        tl.store(place_in_found(found_ptr, row, WEIGHT, chunks) + chunk, weight)


@triton.jit(do_not_specialize=["width"])
def top_kernel(x_ptr, rows_ptr, tops_ptr, x_stride, vocab, chunks, width, CHUNK: tl.constexpr):
    """The largest logits of a chunk, packed and descending; LOWEST behind the last."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(rows_ptr + row * FIELDS + NUM_LOGPROBS)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < vocab, other=NEG_INF)
    score = tl.where(at < vocab, packed(x, at), LOWEST)
    there = tops_ptr + (row * chunks + chunk) * width
    for i in range(wanted):
        best = tl.max(score, 0)
        tl.store(there + i, best)
        score = tl.where(score == best, LOWEST, score)


@triton.jit(do_not_specialize=["width"])
def logprobs_kernel(
    x_ptr,
    rows_ptr,
    found_ptr,
    tops_ptr,
    tokens_ptr,
    logprobs_ptr,
    ranks_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    x_stride,
    vocab,
    chunks,
    width,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """logprob and rank of the token, and `width` places of the most likely, of which the row's
    number is filled."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(rows_ptr + row * FIELDS + NUM_LOGPROBS)
    filled = 0
    if (wanted >= 0) & usable(largest(found_ptr, row, RAW, chunks, CHUNKS)):
        x_row = x_ptr + row * x_stride
        highest = highest_raw(x_row, found_ptr, row, chunks, CHUNKS)
        lse = log_sum(summed(found_ptr, row, WEIGHT, chunks, chunks, CHUNKS))
        token = tl.load(tokens_ptr + row)
        if token != FAILED:
            mine = tl.load(x_row + token)
            higher = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(x_row + at, mask=at < vocab, other=NEG_INF)
                higher += (x > mine).to(tl.int32)
            logprob = (mine - highest) - lse
            tl.store(logprobs_ptr + row, logprob.to(tl.int32, bitcast=True))
            tl.store(ranks_ptr + row, 1 + tl.sum(higher, 0))
        filled = tl.minimum(wanted, vocab)
        before = tl.full((), (1 << 63) - 1, tl.int64)
        for i in range(filled):
            best = tl.full((BLOCK,), LOWEST, tl.int64)
            for start in range(0, chunks * wanted, BLOCK):
                at = start + tl.arange(0, BLOCK)
                there = row * chunks * width + at // wanted * width + at % wanted
                score = tl.load(tops_ptr + there, mask=at < chunks * wanted, other=LOWEST)
                best = tl.maximum(best, tl.where(score < before, score, LOWEST))
            before = tl.max(best, 0)
            top = id_of(before)
            logprob = (tl.load(x_row + top) - highest) - lse
            tl.store(top_ids_ptr + row * width + i, top)
            tl.store(top_logprobs_ptr + row * width + i, logprob.to(tl.int32, bitcast=True))
    for i in range(filled, width):
        tl.store(top_ids_ptr + row * width + i, -1)
        tl.store(top_logprobs_ptr + row * width + i, NAN_BITS)


@triton.jit
def log_softmax_kernel(
    x_ptr, found_ptr, out_ptr, x_stride, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Logprobs of a chunk's tokens; NaN in rows that fail."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_row + at, mask=at < vocab, other=NEG_INF)
    highest = highest_raw(x_row, found_ptr, row, chunks, CHUNKS)
    lse = log_sum(summed(found_ptr, row, WEIGHT, chunks, chunks, CHUNKS))
    fine = usable(largest(found_ptr, row, RAW, chunks, CHUNKS))
    out = tl.where(fine, (x - highest) - lse, float("nan"))
    tl.store(out_ptr + row * vocab + at, out, mask=at < vocab)
