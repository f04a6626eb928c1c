"""Top-n-sigma, top-k, typical-p, top-p, min-p and XTC without a sort: stages 5 to 13.

A first launch counts each chunk's tokens, and their weights, within a few distances of the most
likely. From these follows the shortest distance beyond which a row's filters drop everything; a
second launch lists the tokens within it, ids ascending, and one program a row filters the list.
What a filter keeps is all up to a place in its order, (score, id) as one integer, found two bits at
a time by the exact weight before it. So a row's state is a few places; nothing is written or moved.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampling as spec
from .sampling_draw import drawn_words
from .sampling_numerics import (
    ALL,
    ID_BITS,
    LOWEST,
    NEG_INF,
    STREAM_GUMBEL,
    STREAM_XTC,
    WEIGHT_ONE,
    exp_f32,
    gumbel_f32,
    id_of,
    packed,
    place_of,
    rint_f32,
    rint_i64,
    share,
    uniform_of_word,
    weights,
)
from .sampling_rows import (
    COUNT,
    EDITED,
    FIELDS,
    FILTERED,
    LEAST,
    LIMITS,
    MASS,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYPICAL_P,
    XTC_PROBABILITY,
    XTC_THRESHOLD,
    adjusted,
    highest_adjusted,
    number,
    place_in_found,
    summed,
    tempered,
)

SIGMA_BITS = tl.constexpr(spec.SIGMA_BITS)


@triton.jit
def sigma_kernel(
    x_ptr,
    rows_ptr,
    work_ptr,
    found_ptr,
    x_stride,
    vocab,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """LEAST: -n * sigma(d), the least distance d that top-n-sigma keeps."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    n = number(row_ptr, TOP_N_SIGMA)
    if (n > 0) & (tl.load(row_ptr + FILTERED) >= 0):
        x_row, edited = x_ptr + row * x_stride, tl.load(row_ptr + EDITED)
        highest = highest_adjusted(x_row, work_ptr, edited, found_ptr, row, vocab, chunks, CHUNKS)
        farthest = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = adjusted(x_row, work_ptr, edited, at, at < vocab, vocab) - highest
            bits = tl.abs(d).to(tl.int32, bitcast=True)
            farthest = tl.maximum(farthest, tl.where(d > NEG_INF, bits, 0))
        exponent = tl.maximum((tl.max(farthest, 0) >> 23) - 126, -100)
        scale = ((-exponent + (SIGMA_BITS + 127)) << 23).to(tl.float32, bitcast=True)
        count = tl.zeros((BLOCK,), tl.int64)
        first, second = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = adjusted(x_row, work_ptr, edited, at, at < vocab, vocab) - highest
            finite = d > NEG_INF
            q = rint_f32(tl.where(finite, d, 0.0) * scale).to(tl.int64)
            count += finite.to(tl.int64)
            first += q
            second += q * q
        number_of = tl.sum(count, 0).to(tl.float64)
        mean = tl.sum(first, 0).to(tl.float64) / number_of
        variance = tl.sum(second, 0).to(tl.float64) / number_of - mean * mean
        root = tl.sqrt(tl.maximum(variance, 0.0))
        unit = (exponent - SIGMA_BITS + 1023).to(tl.int64) << 52
        sigma = root * unit.to(tl.float64, bitcast=True)
        least = -(n.to(tl.float64) * sigma).to(tl.float32)
        least_bits = least.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(place_in_found(found_ptr, row, LEAST, chunks), least_bits)


@triton.jit
def tempered_tokens(
    x_ptr,
    row_ptr,
    work_ptr,
    found_ptr,
    row,
    x_stride,
    vocab,
    chunks,
    at,
    CHUNKS: tl.constexpr,
):
    """z of the tokens `at`, -inf where a token is out by now."""
    x_row, edited = x_ptr + row * x_stride, tl.load(row_ptr + EDITED)
    highest = highest_adjusted(x_row, work_ptr, edited, found_ptr, row, vocab, chunks, CHUNKS)
    least_bits = tl.load(
        place_in_found(found_ptr, row, LEAST, chunks), mask=number(row_ptr, TOP_N_SIGMA) > 0
    )
    least = least_bits.to(tl.int32).to(tl.float32, bitcast=True)
    least = tl.where(number(row_ptr, TOP_N_SIGMA) > 0, least, NEG_INF)
    x = adjusted(x_row, work_ptr, edited, at, at < vocab, vocab)
    return tempered(x, highest, least, number(row_ptr, TEMPERATURE))


@triton.jit
def distance(limit):
    """|z| of a limit: 2^(limit - 1), the last one infinite."""
    bits = tl.where(limit == LIMITS - 1, 255, 126 + limit) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def count_kernel(
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
    """COUNT and MASS of a chunk, in rows that filter."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    if tl.load(row_ptr + FILTERED) >= 0:
        chunk = tl.program_id(1)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        z = tempered_tokens(
            x_ptr, row_ptr, work_ptr, found_ptr, row, x_stride, vocab, chunks, at, CHUNKS
        )
        weight = weights(z)
        there = place_in_found(found_ptr, row, COUNT, chunks) + chunk
        for limit in range(LIMITS):
            within = (z > NEG_INF) & (-z <= distance(limit))
            tl.store(there + limit * chunks, tl.sum(within.to(tl.int64), 0))
            mass = tl.sum(tl.where(within, weight, 0), 0)
            tl.store(there + (LIMITS + limit) * chunks, mass)


@triton.jit
def reach(row_ptr, found_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The nearest limit beyond which the row's filters drop everything, and the weight of all."""
    top_k, top_p, min_p = tl.load(row_ptr + TOP_K), number(row_ptr, TOP_P), number(row_ptr, MIN_P)
    total = summed(found_ptr, row, MASS + LIMITS - 1, chunks, chunks, CHUNKS)
    needed = share(total, top_p)
    nearest = LIMITS - 1
    for i in range(1, LIMITS):
        limit = LIMITS - 1 - i
        if top_k > 0:
            enough = summed(found_ptr, row, COUNT + limit, chunks, chunks, CHUNKS) >= top_k
        elif number(row_ptr, TYPICAL_P) < 1:
            enough = top_k > 0  # never: it may keep the unlikely
        elif top_p < 1:
            enough = summed(found_ptr, row, MASS + limit, chunks, chunks, CHUNKS) >= needed
        else:  # exp_f32 errs by less than a thousandth
            enough = exp_f32(-distance(limit)) * 1.001 < min_p
        nearest = tl.where(enough, limit, nearest)
    return nearest, total


@triton.jit
def list_kernel(
    x_ptr,
    rows_ptr,
    work_ptr,
    found_ptr,
    ids_ptr,
    z_ptr,
    x_stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """ids and z of the tokens within reach, behind those of the chunks before."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    filtered = tl.load(row_ptr + FILTERED).to(tl.int64)
    if filtered >= 0:
        chunk = tl.program_id(1)
        limit, _ = reach(row_ptr, found_ptr, row, chunks, CHUNKS)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        z = tempered_tokens(
            x_ptr, row_ptr, work_ptr, found_ptr, row, x_stride, vocab, chunks, at, CHUNKS
        )
        within = (z > NEG_INF) & (-z <= distance(limit))
        before = summed(found_ptr, row, COUNT + limit, chunk, chunks, CHUNKS)
        there = filtered * vocab + before + tl.cumsum(within.to(tl.int32), 0) - 1
        tl.store(ids_ptr + there, at, mask=within)
        tl.store(z_ptr + there, z, mask=within)


@triton.jit
def listed(z_ptr, ids_ptr, start, n, first, shift, near, BLOCK: tl.constexpr):
    """z, ids and whether top-k (up to the place `first` by z) and typical-p (up to `near` by
    z + shift) kept them."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < n, other=NEG_INF)
    ids = tl.load(ids_ptr + at, mask=at < n, other=0)
    kept = (place_of(z, ids) <= first) & (place_of(z + shift, ids) <= near) & (at < n)
    return z, ids, kept


@triton.jit
def border(
    z_ptr,
    ids_ptr,
    n,
    first,
    shift,
    near,
    highest,
    offset,
    needed,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The place by z + offset of the token with which, among those kept, the number of tokens, or
    the weight measured from `highest`, reaches `needed`; where nothing is needed, of the first."""
    found = tl.full((), 0, tl.int64)
    for digit in range(27):
        unit = tl.full((), 1, tl.int64) << (52 - 2 * digit)
        below1 = tl.zeros((BLOCK,), tl.int64)
        below2 = tl.zeros((BLOCK,), tl.int64)
        below3 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, n, BLOCK):
            z, ids, kept = listed(z_ptr, ids_ptr, start, n, first, shift, near, BLOCK)
            weight = kept.to(tl.int64)
            if BY_WEIGHT:
                weight *= tl.where(needed > 0, weights(tl.minimum(z - highest, 0.0)), 1)
            place = place_of(z + offset, ids)
            below1 += tl.where(place < found + unit, weight, 0)
            below2 += tl.where(place < found + 2 * unit, weight, 0)
            below3 += tl.where(place < found + 3 * unit, weight, 0)
        least = tl.maximum(needed, 1)
        step = (tl.sum(below1, 0) < least).to(tl.int64)
        step += (tl.sum(below2, 0) < least).to(tl.int64)
        step += (tl.sum(below3, 0) < least).to(tl.int64)
        found += step * unit
    return found


@triton.jit
def typical(z_ptr, ids_ptr, n, first, p, BLOCK: tl.constexpr):
    """(shift, near, highest z kept) of typical-p, after top-k."""
    weight, moment = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        z, _, kept = listed(z_ptr, ids_ptr, start, n, first, 0.0, ALL, BLOCK)
        z = tl.where(kept, z, -100.0)  # weighs nothing
        e = exp_f32(z)
        weight += rint_i64(e * WEIGHT_ONE)
        moment += rint_i64((e * -z) * WEIGHT_ONE)
    total = tl.sum(weight, 0)
    shift = tl.div_rn(tl.sum(moment, 0).to(tl.float32), total.to(tl.float32))
    needed = share(total, p)
    near = border(z_ptr, ids_ptr, n, first, 0.0, ALL, 0.0, shift, needed, True, BLOCK)
    best = tl.full((BLOCK,), LOWEST, tl.int64)
    for start in range(0, n, BLOCK):
        z, ids, kept = listed(z_ptr, ids_ptr, start, n, first, shift, near, BLOCK)
        best = tl.maximum(best, tl.where(kept, -place_of(z, ids), LOWEST))
    key = (-tl.max(best, 0) >> ID_BITS).to(tl.int32)
    return shift, near, -key.to(tl.float32, bitcast=True)


@triton.jit
def survivors(
    z_ptr,
    ids_ptr,
    start,
    n,
    first,
    shift,
    near,
    highest,
    top,
    min_p,
    BLOCK: tl.constexpr,
):
    """z measured from the highest, -inf where any filter but XTC dropped the token, and ids."""
    z, ids, kept = listed(z_ptr, ids_ptr, start, n, first, shift, near, BLOCK)
    z = tl.where(kept, z - highest, NEG_INF)
    kept = kept & (place_of(z, ids) <= top) & (exp_f32(z) >= min_p)
    return tl.where(kept, z, NEG_INF), ids


@triton.jit
def filter_kernel(
    rows_ptr,
    found_ptr,
    ids_ptr,
    z_ptr,
    tokens_ptr,
    vocab,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The token of a row that filters, of its list."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + row * FIELDS
    filtered = tl.load(row_ptr + FILTERED).to(tl.int64)
    if filtered >= 0:
        ids_ptr += filtered * vocab
        z_ptr += filtered * vocab
        limit, total = reach(row_ptr, found_ptr, row, chunks, CHUNKS)
        n = summed(found_ptr, row, COUNT + limit, chunks, chunks, CHUNKS).to(tl.int32)
        everything, zero = tl.full((), ALL, tl.int64), tl.full((), 0.0, tl.float32)
        first, near, top = everything, everything, everything
        shift, highest = zero, zero

        top_k = tl.load(row_ptr + TOP_K)
        if top_k > 0:
            first = border(
                z_ptr, ids_ptr, n, ALL, 0.0, ALL, 0.0, 0.0, top_k.to(tl.int64), False, BLOCK
            )
        typical_p = number(row_ptr, TYPICAL_P)
        if typical_p < 1:
            shift, near, highest = typical(z_ptr, ids_ptr, n, first, typical_p, BLOCK)
        top_p = number(row_ptr, TOP_P)
        if top_p < 1:
            if (top_k > 0) | (typical_p < 1):  # else the list may end before the weight does
                weight = tl.zeros((BLOCK,), tl.int64)
                for start in range(0, n, BLOCK):
                    z, _ = survivors(
                        z_ptr, ids_ptr, start, n, first, shift, near, highest, ALL, zero, BLOCK
                    )
                    weight += weights(z)
                total = tl.sum(weight, 0)
            needed = share(total, top_p)
            top = border(
                z_ptr, ids_ptr, n, first, shift, near, highest, -highest, needed, True, BLOCK
            )

        # XTC: of two or more tokens that weigh `heavy` or more only the last in order stays.
        min_p = number(row_ptr, MIN_P)
        heavy, last = tl.full((), 1 << 62, tl.int64), tl.full((), -1, tl.int64)
        chance = number(row_ptr, XTC_PROBABILITY)
        if chance > 0:
            blocks = drawn_words(row_ptr, tl.full((), 0, tl.int32), STREAM_XTC)
            if uniform_of_word(blocks[0]) < chance:
                weight = tl.zeros((BLOCK,), tl.int64)
                for start in range(0, n, BLOCK):
                    z, _ = survivors(
                        z_ptr, ids_ptr, start, n, first, shift, near, highest, top, min_p, BLOCK
                    )
                    weight += weights(z)
                heavy = share(tl.sum(weight, 0), number(row_ptr, XTC_THRESHOLD))
                farthest = tl.full((BLOCK,), -1, tl.int64)
                for start in range(0, n, BLOCK):
                    z, ids = survivors(
                        z_ptr, ids_ptr, start, n, first, shift, near, highest, top, min_p, BLOCK
                    )
                    choice = (z > NEG_INF) & (weights(z) >= heavy)
                    farthest = tl.maximum(farthest, tl.where(choice, place_of(z, ids), -1))
                last = tl.max(farthest, 0)

        best = tl.full((BLOCK,), LOWEST, tl.int64)
        for start in range(0, n, BLOCK):
            z, ids = survivors(
                z_ptr, ids_ptr, start, n, first, shift, near, highest, top, min_p, BLOCK
            )
            kept = (z > NEG_INF) & ((weights(z) < heavy) | (place_of(z, ids) == last))
            w0, w1, w2, w3 = drawn_words(row_ptr, ids // 4, STREAM_GUMBEL)
            even = tl.where(ids % 4 == 0, w0, w2)
            odd = tl.where(ids % 4 == 1, w1, w3)
            words = tl.where(ids % 2 == 0, even, odd)
            score = packed(z + gumbel_f32(uniform_of_word(words)), ids)
            best = tl.maximum(best, tl.where(kept, score, LOWEST))
        tl.store(tokens_ptr + row, id_of(tl.max(best, 0)))
