"""A mixture of experts but for their products: who is chosen, pairs sorted by expert, the sum.

A pair is a token and one of its places: pair t * k + j is place j of token t. Two launches list the
pairs by expert, each expert's by ascending number: nothing is counted with atomics, and the host
hears of none of it.

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

from .elementwise import BLOCK
from .linear import TOKENS
from .numerics import OPTIONS, next_power_of_two

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
