"""Law 2 on the card: a row's bits do not depend on what stands beside it.

Every comparison is of bits. Kernels are compared over batches of 1 to 256, chunkings and
neighbours; a whole engine of a random model over batches, chunkings and prefix hits in
engine_rows.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ....kernels.triton.quantised import FLOATS
from ....kernels.triton.rms_norm import Norm
from ....kernels.weights import Format
from . import launches
from .card import Card
from .checks import caches, eight_bits, filled_cache
from .launches import Heads
from .probe import Probe
from .sizes import Sizes


def probes(card: Card, sizes: Sizes, rng: np.random.Generator) -> Iterator[Probe]:
    """Every comparison of kernels."""
    for dtype in sizes.dtypes:
        name = str(dtype).removeprefix("torch.")
        for fmt in launches.WEIGHTS:
            yield Probe(
                f"linear {fmt.name}, batches of 1 to {sizes.batches[-1]}",
                name,
                f"{sizes.layer[1]} x {sizes.layer[0]}",
                lambda fmt=fmt, dtype=dtype: _linear(card, sizes, fmt, dtype, rng),  # type: ignore[misc]
                "law 2",
            )
        for fmt, activations in eight_bits():
            yield Probe(
                f"linear {fmt.name} by {activations}, batches of 1 to {sizes.batches[-1]}",
                name,
                f"{sizes.layer[1]} x {sizes.layer[0]}",
                lambda f=fmt, dtype=dtype, a=activations: _linear(card, sizes, f, dtype, rng, a),  # type: ignore[misc]
                "law 2",
            )
        for fmt in launches.WEIGHTS:
            if fmt.name in ("Q4_0", "Q4_K") or FLOATS.get(fmt) == dtype:
                yield Probe(
                    f"norm and linear {fmt.name}, batches of 1 to {sizes.batches[-1]}",
                    name,
                    f"{sizes.layer[1]} x {sizes.layer[0]}",
                    lambda f=fmt, dtype=dtype: _linear(card, sizes, f, dtype, rng, norm=True),  # type: ignore[misc]
                    "law 2",
                )
        for heads, kind in caches(sizes, dtype):
            yield Probe(
                f"attention, {kind} cache, chunkings, splits and neighbours",
                name,
                f"{heads.label()}, context {max(sizes.lengths)}",
                lambda heads=heads, kind=kind, dtype=dtype: _attention(  # type: ignore[misc]
                    card, heads, sizes, kind, dtype, rng
                ),
                "law 2",
            )
        yield Probe(
            "rms_norm, alone and in a batch",
            name,
            f"{sizes.rows} x {sizes.hidden}",
            lambda dtype=dtype: _norm(card, sizes, dtype),  # type: ignore[misc]
            "law 2",
        )


def verdict(same: bool) -> float:
    """An equality as Check.error has it: 0, or infinite."""
    return 0.0 if same else float("inf")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes: NaN equals itself, -0 is not 0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _linear(
    card: Card,
    sizes: Sizes,
    fmt: Format,
    dtype: torch.dtype,
    rng: np.random.Generator,
    activations: str = "",
    *,
    norm: bool = False,
) -> float:
    rows, columns = sizes.layer
    columns -= columns % fmt.block_elements
    raw = launches.random_weight(fmt, rows, columns, rng)
    weight = launches.pack(raw, card.device, activations=activations)[0]
    x = torch.randn(sizes.batches[-1], columns, device=card.device).to(dtype)
    before = Norm(torch.randn(columns, device=card.device), 1e-5, 0.0) if norm else None

    def product(part: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(part), rows), float("nan"), dtype=dtype, device=card.device)
        launches.multiply(part, weight, out, norm=before, normed=torch.empty_like(part))()
        return out

    whole = product(x)
    for count in sizes.batches[:-1]:
        first = int(rng.integers(0, len(x) - count + 1))
        if not same_bits(product(x[first : first + count]), whole[first : first + count]):
            return verdict(False)
    return verdict(True)


def _attention(
    card: Card,
    heads: Heads,
    sizes: Sizes,
    kind: str,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> float:
    lengths = sizes.lengths
    longest = lengths.index(max(lengths))
    cache, _, _ = filled_cache(card, heads, sizes, kind, dtype, rng)
    q = torch.randn(lengths[longest], heads.q_width, device=card.device).to(dtype)

    def run(new: dict[int, int], upto: int, splits: int = 1024) -> torch.Tensor:
        """The last new[longest] of the longest sequence's first `upto` tokens, beside others."""
        known = tuple(upto if s == longest else n for s, n in enumerate(lengths))
        table = launches.paged_step(lengths, lengths, sizes.block_size, np.random.default_rng(1))
        counts = [new.get(s, 0) for s in range(len(lengths))]
        step = launches.paged_step(known, counts, sizes.block_size, np.random.default_rng(1))
        # The cache was laid out for whole sequences.
        step = dataclasses.replace(step, block_table=table.block_table)
        rows = torch.randn(len(step.positions), heads.q_width, device=card.device).to(dtype)
        at = int(step.query_start[longest])
        count = new[longest]
        rows[at : at + count] = q[upto - count : upto]
        out = torch.full_like(rows, float("nan"))
        launches.attend(rows, out, cache, step, heads, splits)()
        return out[at : at + count]

    length = lengths[longest]
    whole = run({longest: length}, length)
    others = {s: min(3, n) for s, n in enumerate(lengths) if s != longest}
    for count in {n for n in (1, 2, 16, 17, length // 2) if n <= length}:
        for beside in ({}, others):
            for splits in (0, 1024):
                got = run({**beside, longest: count}, length, splits)
                if not same_bits(got, whole[length - count :]):
                    return verdict(False)
        half = length // 2
        if count <= half:
            got = run({**others, longest: count}, half)
            if not same_bits(got, whole[half - count : half]):
                return verdict(False)
    return verdict(True)


def _norm(card: Card, sizes: Sizes, dtype: torch.dtype) -> float:
    x = torch.randn(sizes.rows, sizes.hidden, device=card.device).to(dtype)
    weight = torch.randn(sizes.hidden, device=card.device)
    whole, alone = torch.empty_like(x), torch.empty_like(x[:1])
    launches.normalise(x, weight, whole, 1e-5)()
    for row in (0, sizes.rows // 2, sizes.rows - 1):
        launches.normalise(x[row : row + 1], weight, alone, 1e-5)()
        if not same_bits(alone, whole[row : row + 1]):
            return verdict(False)
    return verdict(True)
