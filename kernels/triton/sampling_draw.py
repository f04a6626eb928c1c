"""The largest logit, the draw from a whole vocabulary, and the token that a row ends with."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampling as spec
from .sampling_numerics import (
    NEG_INF,
    STREAM_GUMBEL,
    gumbel_f32,
    id_of,
    packed,
    philox4x32,
    uniform_of_word,
    usable,
)
from .sampling_rows import (
    BEST,
    EDITED,
    FIELDS,
    FILTERED,
    POSITION,
    RAW,
    SAMPLE_INDEX,
    SCORE,
    SEED,
    TARGET,
    TEMPERATURE,
    adjusted,
    highest_adjusted,
    largest,
    number,
    place_in_found,
    tempered,
    word,
)

FAILED = tl.constexpr(spec.FAILED)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def drawn_words(row_ptr, blocks, STREAM: tl.constexpr):
    """The four words of each block of the row's random numbers."""
    blocks = blocks.to(tl.uint32)
    sample, position = word(row_ptr, SAMPLE_INDEX), word(row_ptr, POSITION)
    stream = tl.full((), STREAM, tl.uint32)
    return philox4x32(
        blocks, sample, position, stream, word(row_ptr, SEED), word(row_ptr, SEED + 1)
    )


@triton.jit
def largest_kernel(
    x_ptr, rows_ptr, work_ptr, found_ptr, x_stride, vocab, chunks, CHUNK: tl.constexpr
):
    """RAW and BEST of a chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=NEG_INF)
    best = tl.max(packed(x, at), 0)
    tl.store(place_in_found(found_ptr, row, RAW, chunks) + chunk, best)
    edited = tl.load(rows_ptr + row * FIELDS + EDITED)
    if edited >= 0:
        x = adjusted(x_ptr, work_ptr, edited, at, inside, vocab)
        best = tl.max(packed(x, at), 0)
    tl.store(place_in_found(found_ptr, row, BEST, chunks) + chunk, best)


@triton.jit
def draw_kernel(
    x_ptr,
    rows_ptr,
    work_ptr,
    found_ptr,
    x_stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """SCORE of a chunk, in rows that draw from all their tokens."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    temperature = number(row_ptr, TEMPERATURE)
    if (temperature != 0) & (tl.load(row_ptr + TARGET) < 0) & (tl.load(row_ptr + FILTERED) < 0):
        chunk = tl.program_id(1)
        x_row, edited = x_ptr + row * x_stride, tl.load(row_ptr + EDITED)
        highest = highest_adjusted(x_row, work_ptr, edited, found_ptr, row, vocab, chunks, CHUNKS)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = adjusted(x_row, work_ptr, edited, at, at < vocab, vocab)
        z = tempered(x, highest, NEG_INF, temperature)
        blocks = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
        w0, w1, w2, w3 = drawn_words(row_ptr, blocks, STREAM_GUMBEL)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (CHUNK,))
        score = z + gumbel_f32(uniform_of_word(words))
        best = tl.max(packed(score, at), 0)
        tl.store(place_in_found(found_ptr, row, SCORE, chunks) + chunk, best)


@triton.jit
def finish_kernel(
    rows_ptr, found_ptr, tokens_ptr, logprobs_ptr, ranks_ptr, chunks, CHUNKS: tl.constexpr
):
    """The token of a row, which the filters have written where they ran; no logprob as yet."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    target = tl.load(row_ptr + TARGET)
    best = largest(found_ptr, row, BEST, chunks, CHUNKS)
    token = id_of(best)
    if (target < 0) & (number(row_ptr, TEMPERATURE) != 0):
        if tl.load(row_ptr + FILTERED) >= 0:
            token = tl.load(tokens_ptr + row)
        else:
            token = id_of(largest(found_ptr, row, SCORE, chunks, CHUNKS))
    token = tl.where(usable(best), token, FAILED)
    token = tl.where(target >= 0, target, token)
    token = tl.where(usable(largest(found_ptr, row, RAW, chunks, CHUNKS)), token, FAILED)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, NAN_BITS)
    tl.store(ranks_ptr + row, 0)
