"""expert_linear: each expert's products, over the pairs that experts.py has listed.

It is launched for as many tiles as there could be whatever the experts that are chosen, so that a
recorded step fits every choice; a tile finds its expert, of which it holds up to TOKENS pairs, and
one past the last ends at once. The products are those of linear.py over gathered rows: a pair has
the bits of `linear` by its expert's weight and bias, whichever pairs stand beside it (law 2).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import torch

import triton
import triton.language as tl

from . import linear
from .experts import Route
from .inputs import prepare
from .linear import ROWS, TOKENS, store
from .numerics import TL, next_power_of_two
from .products import float_product, quantised_product
from .quantised import FloatMatrix, Matrix, QuantisedMatrix


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


def launch(
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
