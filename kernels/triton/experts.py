"""A mixture of experts: who is chosen, pairs sorted by expert, each expert's products, their sum.

A pair is a token and one of its places: pair t * k + j is place j of token t. Two launches list the
pairs by expert, each expert's by ascending number: nothing is counted with atomics, and the host
hears of none of it. `expert_linear` is launched for as many tiles as there could be whatever the
experts that are chosen, so that a recorded step fits every choice; a tile finds its expert, of
which it holds up to TOKENS pairs, and one past the last ends at once. The products are those of
linear.py over gathered rows: a pair has the bits of `linear` by its expert's weight, whichever
pairs stand beside it (law 2).

Where a softmax is over all experts, or over the chosen ones, its sum is a tree whose form follows
from their number.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from . import linear
from .elementwise import BLOCK
from .inputs import prepare
from .linear import ROWS, TOKENS, store
from .numerics import OPTIONS, TL, next_power_of_two
from .products import float_product, quantised_product
from .quantised import FloatMatrix, Matrix, QuantisedMatrix

PAIRS = 1024  # looked at together while they are sorted
LEAST = tl.constexpr(-(2**31))  # of 32 bits: below the rank of every logit


@triton.jit
def top_kernel(logits_ptr, out_ptr, logits_stride, out_stride, E, top_k, BLOCK: tl.constexpr):
    """One token: the maximum of its logits' ranks, which are integers in their order, k times."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * logits_stride + at, mask=at < E, other=0.0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(x == x, rank, LEAST + 1)  # a NaN
    rank = tl.where(at < E, rank, LEAST)
    for j in range(top_k):
        best = tl.min(tl.where(rank == tl.max(rank, 0), at, BLOCK), 0)
        tl.store(out_ptr + row * out_stride + j, best.to(tl.float32))
        rank = tl.where(at == best, LEAST, rank)


@triton.jit
def weights_kernel(
    logits_ptr,
    experts_ptr,
    out_ptr,
    logits_stride,
    experts_stride,
    out_stride,
    E,
    top_k,
    RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One token: the softmax at the chosen experts."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    experts_ptr += row * experts_stride
    place = tl.arange(0, PLACES)
    chosen = tl.load(experts_ptr + place, mask=place < top_k, other=0.0).to(tl.int32)
    # The best expert's: a NaN among the logits is no maximum, and shows in the exponentials.
    most = tl.load(logits_ptr + tl.load(experts_ptr).to(tl.int32)).to(tl.float32)
    up = tl.exp(tl.load(logits_ptr + chosen).to(tl.float32) - most)
    if RENORMALISE:
        total = tl.sum(tl.where(place < top_k, up, 0.0), 0)
    else:
        at = tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < E, other=0.0).to(tl.float32)
        total = tl.sum(tl.where(at < E, tl.exp(x - most), 0.0), 0)
    out = (up / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + place, out, mask=place < top_k)


@triton.jit
def sum_kernel(
    x_ptr, weights_ptr, out_ptr, x_stride, weights_stride, out_stride, H, top_k, BLOCK: tl.constexpr
):
    """BLOCK columns of one token's sum over its places."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    x_at = x_ptr + row * x_stride + at
    weights_ptr += row * weights_stride
    weight = tl.load(weights_ptr).to(tl.float32)
    total = tl.load(x_at, mask=inside, other=0.0).to(tl.float32) * weight
    for j in range(1, top_k):
        weight = tl.load(weights_ptr + j).to(tl.float32)
        total += tl.load(x_at + j * H, mask=inside, other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + row * out_stride + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _experts_of(experts_ptr, start, num_pairs, top_k, stride, PAIRS: tl.constexpr):
    """Pairs from `start` on, and their experts; -1 past the end."""
    pair = start + tl.arange(0, PAIRS)
    at = (pair // top_k).to(tl.int64) * stride + pair % top_k
    return pair, tl.load(experts_ptr + at, mask=pair < num_pairs, other=-1.0).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(experts_ptr, counts_ptr, num_pairs, top_k, experts_stride, PAIRS: tl.constexpr):
    """One expert: how many pairs have it."""
    expert = tl.program_id(0)
    found = tl.zeros((PAIRS,), tl.int32)
    for start in range(0, num_pairs, PAIRS):
        _, chosen = _experts_of(experts_ptr, start, num_pairs, top_k, experts_stride, PAIRS)
        found += (chosen == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["num_pairs"])
def list_kernel(
    experts_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    pairs_ptr,
    num_pairs,
    top_k,
    experts_stride,
    E,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    NARROWEST: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """One expert: its pairs listed behind those of the experts before it; where its list starts;
    and for each width of a tile, ends [WIDTHS, E], how many tiles end with its last."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + at, mask=at < E, other=0)
    first = tl.sum(tl.where(at < expert, counts, 0), 0)
    tl.store(starts_ptr + expert, first)
    for i in tl.static_range(WIDTHS):
        tiles = (counts + ((NARROWEST << i) - 1)) // (NARROWEST << i)
        tl.store(ends_ptr + i * E + expert, tl.sum(tl.where(at <= expert, tiles, 0), 0))
    for start in range(0, num_pairs, PAIRS):
        pair, chosen = _experts_of(experts_ptr, start, num_pairs, top_k, experts_stride, PAIRS)
        mine = chosen == expert
        place = first + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs_ptr + place, pair, mask=mine)
        first += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _tile(counts_ptr, starts_ptr, ends_ptr, E, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """This tile's expert, E for none; where its pairs are listed, and how many there are."""
    tile = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    ends = tl.load(ends_ptr + at, mask=at < E, other=2147483647)
    before = ends <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    known = tl.minimum(expert, E - 1)
    done = (tile - tl.max(tl.where(before, ends, 0), 0)) * TOKENS
    return expert, tl.load(starts_ptr + known) + done, tl.load(counts_ptr + known) - done


@triton.jit
def _pairs(pairs_ptr, first, left, TOKENS: tl.constexpr):
    """A tile's pairs [TOKENS], and which of them there are; read anew by each call, so that they
    need no registers between two."""
    place = tl.arange(0, TOKENS)
    there = place < left
    return tl.load(pairs_ptr + first + place, mask=there, other=0, volatile=True), there


@triton.jit
def float_kernel(
    x_ptr,
    w_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    pairs_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    E,
    share,
    num_rows,
    K,
    x_stride,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W [E * num_rows, K] in floats; row p // share of x is that of pair p."""
    expert, first, left = _tile(counts_ptr, starts_ptr, ends_ptr, E, BLOCK, TOKENS)
    if expert < E:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        pair, _ = _pairs(pairs_ptr, first, left, TOKENS)
        # Rows past the expert's repeat its last one, pairs that are not there the first of all.
        acc = float_product(
            x_ptr,
            w_ptr,
            x_ptr,
            x_ptr,
            expert * num_rows + tl.minimum(row, num_rows - 1),
            pair // share,
            tl.zeros((TOKENS,), tl.float32),
            K,
            x_stride,
            0.0,
            PRODUCT,
            ROWS,
            TOKENS,
            STEP,
            False,
            False,
            WHOLE,
        )
        pair, there = _pairs(pairs_ptr, first, left, TOKENS)
        store(
            acc,
            pair,
            num_rows,
            there,
            bias_ptr + expert * num_rows,
            other_ptr,
            out_ptr,
            other_stride,
            out_stride,
            HAS_BIAS,
            AFTER,
            ROUND,
            PAIRED,
            ROWS,
            TOKENS,
        )


@triton.jit
def quantised_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    scratch_ptr,
    columns_ptr,
    counts_ptr,
    starts_ptr,
    ends_ptr,
    pairs_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    E,
    share,
    num_rows,
    K,
    all_rows,
    words,
    x_stride,
    scratch_stride,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    ORDERED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W in codes of all_rows = E * num_rows rows; row p // share of x and of the scratch is that
    of pair p."""
    expert, first, left = _tile(counts_ptr, starts_ptr, ends_ptr, E, BLOCK, TOKENS)
    if expert < E:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        pair, there = _pairs(pairs_ptr, first, left, TOKENS)
        acc = quantised_product(
            x_ptr,
            codes_ptr,
            scale_ptr,
            minimum_ptr,
            table_ptr,
            scratch_ptr,
            columns_ptr,
            x_ptr,
            expert * num_rows + tl.minimum(row, num_rows - 1),
            pair // share,
            tl.zeros((TOKENS,), tl.float32),
            tl.zeros((TOKENS,), tl.float32),
            tl.zeros((TOKENS,), tl.float32),
            all_rows,
            K,
            words,
            x_stride,
            scratch_stride,
            0.0,
            PRODUCT,
            ROWS,
            TOKENS,
            KIND,
            BITS,
            ZERO,
            GROUP,
            GROUPS,
            PER_ROW,
            HAS_MINIMUM,
            ORDERED,
            False,
            "",
            False,
            WHOLE,
        )
        store(
            acc,
            pair,
            num_rows,
            there,
            bias_ptr + expert * num_rows,
            other_ptr,
            out_ptr,
            other_stride,
            out_stride,
            HAS_BIAS,
            AFTER,
            ROUND,
            PAIRED,
            ROWS,
            TOKENS,
        )


def top_experts(logits: torch.Tensor, out: torch.Tensor) -> None:
    """See ops.top_experts.  logits [T, E], out fp32 [T, k]."""
    num_tokens, E = logits.shape
    if num_tokens:
        top_kernel[(num_tokens,)](
            logits,
            out,
            logits.stride(0),
            out.stride(0),
            E,
            out.shape[1],
            BLOCK=next_power_of_two(E),
            **OPTIONS,
        )


def expert_weights(
    logits: torch.Tensor, experts: torch.Tensor, out: torch.Tensor, renormalise: bool
) -> None:
    """See ops.expert_weights.  logits [T, E], experts fp32 [T, k], out [T, k]."""
    num_tokens, E = logits.shape
    if num_tokens:
        weights_kernel[(num_tokens,)](
            logits,
            experts,
            out,
            logits.stride(0),
            experts.stride(0),
            out.stride(0),
            E,
            out.shape[1],
            RENORMALISE=renormalise,
            BLOCK=next_power_of_two(E),
            PLACES=next_power_of_two(out.shape[1]),
            **OPTIONS,
        )


def expert_sum(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """See ops.expert_sum.  x [T, k*H], weights [T, k], out [T, H]."""
    num_tokens, H = out.shape
    if num_tokens:
        sum_kernel[(num_tokens, triton.cdiv(H, BLOCK))](
            x,
            weights,
            out,
            x.stride(0),
            weights.stride(0),
            out.stride(0),
            H,
            weights.shape[1],
            BLOCK=BLOCK,
            **OPTIONS,
        )


@dataclass(frozen=True)
class Route:
    """A step's pairs by expert, all int32: counts and starts [E], ends [len(TOKENS), E], see
    list_kernel, pairs [T*k]. Views of a buffer, whose first ones lie where they lie for every T."""

    counts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    pairs: torch.Tensor

    @staticmethod
    def size(num_tokens: int, num_experts: int, top_k: int) -> int:
        """Elements of a buffer."""
        return (2 + len(TOKENS)) * num_experts + num_tokens * top_k

    @classmethod
    def of(cls, buffer: torch.Tensor, num_experts: int) -> Route:
        """In a buffer int32 of at least `size`."""
        E, ends = num_experts, (2 + len(TOKENS)) * num_experts
        return cls(
            buffer[:E], buffer[E : 2 * E], buffer[2 * E : ends].view(len(TOKENS), E), buffer[ends:]
        )


def sort(experts: torch.Tensor, route: Route) -> None:
    """Fill `route` from experts fp32 [T, k]."""
    num_tokens, top_k = experts.shape
    E = route.counts.shape[0]
    if not num_tokens:
        return
    of_pairs = (num_tokens * top_k, top_k, experts.stride(0))
    count_kernel[(E,)](experts, route.counts, *of_pairs, PAIRS=PAIRS, **OPTIONS)
    list_kernel[(E,)](
        experts,
        route.counts,
        route.starts,
        route.ends,
        route.pairs,
        *of_pairs,
        E,
        BLOCK=next_power_of_two(E),
        PAIRS=PAIRS,
        NARROWEST=TOKENS[0],
        WIDTHS=len(TOKENS),
        **OPTIONS,
    )


def most_tiles(num_pairs: int, num_experts: int, tokens: int) -> int:
    """Tiles at most, each of one expert: all but one pair of a tile may be missing for each."""
    return (num_pairs + min(num_experts, num_pairs) * (tokens - 1)) // tokens


def tokens_of(num_pairs: int, num_experts: int, weight: Matrix) -> int:
    """Width of a tile: twice an even share, since some experts are taken more often than others.

    With minimums, tiles wider than 32 run out of registers; in floats, those wider than 64.
    """
    tokens = linear.tokens_of(triton.cdiv(2 * num_pairs, num_experts), weight)
    if not isinstance(weight, QuantisedMatrix):
        return min(tokens, TOKENS[2])
    return min(tokens, TOKENS[1]) if weight.layout.minimum else tokens


def expert_linear(
    x: torch.Tensor,
    weight: Matrix,
    route: Route,
    out: torch.Tensor,
    *,
    round_to: torch.dtype,
    bias: torch.Tensor | None = None,
    after: str = "",
    other: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """out = each pair's row of x by its expert's rows of the weight, and their bias, then `after`:
    see linear.launch.

    x [T, K], or [T*k, K] with a row for each pair; weight [E*N, K]; bias fp32 [E*N]; out and other
    [T*k, N]. A paired weight is [E*2N, K], its bias [E*2N], and it is its own `other`.
    scratch: fp32 [at least as many rows as x, at least scratch_width(W)].
    """
    num_pairs = out.shape[0]
    if not num_pairs:
        return
    K, E = weight.shape[1], route.counts.shape[0]
    num_rows = weight.shape[0] // E
    tokens = tokens_of(num_pairs, E, weight)
    other = out if other is None else other
    grid = (triton.cdiv(num_rows, ROWS), most_tiles(num_pairs, E, tokens))
    ends = route.ends[TOKENS.index(tokens)]
    routed = (route.counts, route.starts, ends, route.pairs)
    shapes = (out if bias is None else bias, other, out, E, num_pairs // x.shape[0], num_rows, K)
    strides = (other.stride(0), out.stride(0))
    constants = {"AFTER": after, "ROUND": TL[round_to], "BLOCK": next_power_of_two(E)}
    constants |= {"PAIRED": weight.paired, "HAS_BIAS": bias is not None}
    if isinstance(weight, FloatMatrix):
        product = linear.float_dtype(x, weight)
        float_kernel[grid](
            x,
            weight.data,
            *routed,
            *shapes,
            x.stride(0),
            *strides,
            PRODUCT=TL[product],
            **constants,
            **linear.float_tile(K, tokens, product),
            **linear.float_options(product),
        )
        return
    dtype, scratch = x.dtype, out if scratch is None else scratch
    ordered = weight.columns is not None
    if linear.has_inputs(weight):
        x, done = prepare(x, weight, scratch)
        ordered = ordered and not done
    quantised_kernel[grid](
        x,
        *linear.tables(weight, dtype),
        scratch,
        x if weight.columns is None else weight.columns,
        *routed,
        *shapes,
        weight.shape[0],
        weight.codes.shape[1],
        x.stride(0),
        scratch.stride(0),
        *strides,
        PRODUCT=linear.product_of(weight, dtype),
        ORDERED=ordered,
        **constants,
        **linear.quantised_tile(weight, tokens),
        **linear.quantised_options(weight, tokens),
    )
