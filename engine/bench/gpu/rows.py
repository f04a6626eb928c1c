"""How fast is every kernel? Beside torch's best, installed peers, and the card's measured limit.

A row is a builder of a Case: our launches and the peers', each list going round buffers that the L2
cache cannot hold together. A new row is one more line in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ....kernels.backend import KV_CODES, KVSpec
from ....kernels.triton import TritonBackend
from ....kernels.triton import device as dev
from ....kernels.triton.executor import TritonLogits
from ....kernels.weights import BF16, F16, FP8, FP8_128, INT4, INT8, NF4, Q4_0, Q8_0, Format
from ..timing import Times
from . import launches, peers
from .card import Card, Launch
from .case import Case, Target
from .sizes import Sizes


@dataclass(frozen=True)
class Row:
    """A row of the table. `limit` names one of Card.limits."""

    group: str
    name: str
    limit: str
    make: Callable[[], Case]
    target: Target | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """The cells that need no measuring."""
        goal = self.target.text if self.target else None
        return {"group": self.group, "name": self.name, "limit": self.limit, "target": goal}


def rows(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Every row. `card` and `sizes` are those that its buffers are made for."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    for batch, context in sizes.decode:
        target = Target("TB/s", 4.0) if batch * context >= 128 * 1024 else None
        if (batch, context) == (1, 1024):
            target = Target("us", 11.0)
        for kind in launches.cache_kinds(sizes.dtype):
            coded = kind in KV_CODES
            yield Row(
                "decode attention" + (f", {kind} cache" if coded else ""),
                f"{batch} x {context:,} {sizes.attention.label()}",
                "copy",
                lambda b=batch, c=context, k=kind: _decode(card, sizes, b, c, k),  # type: ignore[misc]
                None if coded else target,
            )
    for tokens in sizes.prefill:
        yield Row(
            "causal prefill",
            f"{tokens:,} {sizes.attention.label()}",
            dtype,
            lambda t=tokens: _prefill(card, sizes, t),  # type: ignore[misc]
            Target("TFLOP/s", 480.0),
        )
    floats = BF16 if sizes.dtype == torch.bfloat16 else F16
    for title, fmt, activations in (
        ("W4A16", Q4_0, ""),
        ("W4A16", INT4, ""),
        ("W4A16", NF4, ""),
        ("W8A16", Q8_0, ""),
        ("W8A16", INT8, ""),
        ("W8A16", FP8, ""),
        ("W8A16", FP8_128, ""),
        ("W8A8", INT8, "int8"),
        *(() if dev.lacks_fp8() else (("W8A8", FP8, "fp8"), ("W8A8", FP8_128, "fp8"))),
        ("16-bit", floats, ""),
    ):
        # Every shape of one format a class; the others where they differ most, in one layer.
        whole = fmt in (Q4_0, Q8_0, floats) or bool(activations)
        for layer, (out_width, width) in list(sizes.layers.items())[: None if whole else 1]:
            for tokens in sizes.linear_tokens:
                few = title == "W4A16" and tokens <= 16
                yield Row(
                    f"linear {title} {fmt.name}",
                    f"{layer} {tokens} x {width} x {out_width}",
                    "copy" if tokens <= 64 else activations or dtype,
                    lambda f=fmt, n=out_width, k=width, t=tokens, a=activations: _linear(  # type: ignore[misc]
                        card, sizes, f, n, k, t, a
                    ),
                    Target("% of copy", 70.0) if few else None,
                )
    by_rows = Target("% of copy", 85.0)
    for name, width, make in (
        ("rms_norm", sizes.hidden, _norm),
        ("silu_mul", sizes.ffn, _silu_mul),
        ("add", sizes.hidden, _add),
        ("rope and cache", sizes.attention.q_width, _rope),
    ):
        yield Row(
            "row by row",
            f"{name} {sizes.rows:,} x {width:,}",
            "copy",
            lambda make=make: make(card, sizes),  # type: ignore[misc]
            by_rows,
        )
    for count in sizes.sampled:
        yield Row(
            "sampling",
            f"{count} x {sizes.vocab:,}, temperature 0.8",
            "copy",
            lambda c=count: _sampling(card, sizes, c, 1.0),  # type: ignore[misc]
        )
        yield Row(
            "sampling",
            f"{count} x {sizes.vocab:,}, temperature 0.8, top-p 0.9",
            "copy",
            lambda c=count: _sampling(card, sizes, c, 0.9),  # type: ignore[misc]
        )


def figures(
    row: Row, case: Case, times: Times | None, limits: dict[str, float | None]
) -> dict[str, Any]:
    """A row's cells from its times; no figure in a rehearsal."""
    cells = row.labels
    if times is None:
        return cells
    seconds = times.median
    cells |= {
        "us": seconds * 1e6,
        "p99_us": times.p99 * 1e6,
        "repetitions": len(times.seconds),
        "warmup": times.warmup,
        "tbs": case.num_bytes / seconds / 1e12,
        "tflops": case.operations / seconds / 1e12 if case.operations else None,
    }
    limit = limits.get(row.limit)
    if limit:
        done = case.num_bytes if row.limit == "copy" else case.operations
        cells["share"] = 100 * done / seconds / limit
    if row.target:
        cells["met"] = row.target.met(cells)
    return cells


# ------------------------------------------------------------------------------------- attention


def _decode(card: Card, sizes: Sizes, batch: int, context: int, kind: str) -> Case:
    heads, dtype = sizes.attention, sizes.dtype
    spec = KVSpec(1, heads.num_kv_heads, heads.head_dim, sizes.block_size, kind)
    size = batch * context * spec.bytes_per_token
    rng = np.random.default_rng(2)
    lengths = [context] * batch
    case = Case([], size + 2 * batch * heads.q_width * dtype.itemsize)
    case.operations = 4 * batch * context * heads.q_width
    for _ in range(card.copies(size)):
        cache = launches.new_cache(
            heads,
            launches.cache_blocks(lengths, sizes.block_size),
            sizes.block_size,
            kind,
            card.device,
        )
        launches.fill(cache)
        step = launches.paged_step(lengths, [1] * batch, sizes.block_size, rng)
        q = torch.randn(batch, heads.q_width, device=card.device).to(dtype)
        case.ours.append(launches.attend(q, torch.empty_like(q), cache, step, heads))
    peers.attention(case, card, heads, dtype, batch, 1, context)
    return case


def _prefill(card: Card, sizes: Sizes, tokens: int) -> Case:
    heads, dtype = sizes.attention, sizes.dtype
    width = heads.num_kv_heads * heads.head_dim
    size = 2 * tokens * (width + heads.q_width) * dtype.itemsize
    case = Case([], size, 4 * tokens * (tokens + 1) // 2 * heads.q_width)
    for copy in range(card.copies(size)):
        cache = launches.new_cache(
            heads,
            launches.cache_blocks([tokens], sizes.block_size),
            sizes.block_size,
            launches.cache_kinds(dtype)[0],
            card.device,
        )
        launches.fill(cache)
        step = launches.paged_step(
            [tokens], [tokens], sizes.block_size, np.random.default_rng(copy)
        )
        q = torch.randn(tokens, heads.q_width, device=card.device).to(dtype)
        case.ours.append(launches.attend(q, torch.empty_like(q), cache, step, heads))
    peers.attention(case, card, heads, dtype, 1, tokens, tokens)
    return case


# ---------------------------------------------------------------------------------------- linear


def _linear(
    card: Card,
    sizes: Sizes,
    fmt: Format,
    out_width: int,
    width: int,
    tokens: int,
    activations: str,
) -> Case:
    raw = launches.random_weight(fmt, out_width, width, np.random.default_rng(3))
    matrices = launches.pack(raw, card.device, card.copies(raw.nbytes), activations)
    values = tokens * (width + out_width) * sizes.dtype.itemsize
    case = Case([], matrices[0].nbytes + values, 2 * tokens * width * out_width)
    x = torch.randn(tokens, width, device=card.device).to(sizes.dtype)
    for matrix in matrices:
        out = torch.empty(tokens, out_width, device=card.device, dtype=sizes.dtype)
        case.ours.append(launches.multiply(x, matrix, out))
    peers.linear(case, card, x, out_width, eight_bits=fmt in (Q8_0, FP8))
    return case


# ---------------------------------------------------------------------------------- row by row


def _turns(card: Card, sizes: Sizes, width: int, count: int) -> list[list[torch.Tensor]]:
    """`count` tensors [rows, width] for each turn."""
    size = sizes.rows * width * sizes.dtype.itemsize
    return [
        [torch.randn(sizes.rows, width, device=card.device).to(sizes.dtype) for _ in range(count)]
        for _ in range(card.copies(count * size))
    ]


def _case(card: Card, turns: list[list[torch.Tensor]], ours: Callable[..., Launch]) -> Case:
    """Each turn's tensors are all read or written once."""
    size = sum(t.nbytes for t in turns[0])
    return Case([ours(*tensors) for tensors in turns], size)


def _norm(card: Card, sizes: Sizes) -> Case:
    weight = torch.randn(sizes.hidden, device=card.device)
    turns = _turns(card, sizes, sizes.hidden, 2)
    case = _case(card, turns, lambda x, out: launches.normalise(x, weight, out, 1e-5))
    same = weight.to(sizes.dtype)
    norm = torch.nn.functional.rms_norm
    case.peers["torch"] = [
        lambda x=x: norm(x, (sizes.hidden,), same, 1e-5)  # type: ignore[misc]
        for x, _ in turns
    ]
    return case


def _silu_mul(card: Card, sizes: Sizes) -> Case:
    turns = _turns(card, sizes, sizes.ffn, 3)
    case = _case(card, turns, lambda a, b, out: launches.elementwise_op("silu_mul", a, b, out))
    silu = torch.nn.functional.silu
    case.peers["torch, two kernels"] = [
        lambda a=a, b=b, out=out: torch.mul(silu(a), b, out=out)  # type: ignore[misc]
        for a, b, out in turns
    ]
    return case


def _add(card: Card, sizes: Sizes) -> Case:
    turns = _turns(card, sizes, sizes.hidden, 3)
    case = _case(card, turns, lambda a, b, out: launches.elementwise_op("add", a, b, out))
    case.peers["torch"] = [
        lambda a=a, b=b, out=out: torch.add(a, b, out=out)  # type: ignore[misc]
        for a, b, out in turns
    ]
    return case


def _rope(card: Card, sizes: Sizes) -> Case:
    heads, count = sizes.attention, sizes.rows
    width = heads.num_kv_heads * heads.head_dim
    case = Case([])
    case.num_bytes = 2 * count * (heads.q_width + 2 * width) * sizes.dtype.itemsize
    for turn in range(card.copies(case.num_bytes)):
        step = launches.paged_step([count], [count], sizes.block_size, np.random.default_rng(turn))
        cache = launches.new_cache(
            heads,
            launches.cache_blocks([count], sizes.block_size),
            sizes.block_size,
            launches.cache_kinds(sizes.dtype)[0],
            card.device,
        )
        q, k, v = (
            torch.randn(count, n, device=card.device).to(sizes.dtype)
            for n in (heads.q_width, width, width)
        )
        slot = torch.from_numpy(step.slot).to(card.device)
        case.ours.append(
            launches.rotate_and_write(
                heads, q, torch.empty_like(q), (k, v), cache, slot, step.positions
            )
        )
    case.skipped["torch"] = "it has no such operation"
    return case


# -------------------------------------------------------------------------------------- sampling


def _sampling(card: Card, sizes: Sizes, count: int, top_p: float) -> Case:
    sampler = TritonBackend(threads=None).sampler(sizes.vocab)
    logits = torch.randn(count, sizes.vocab, device=card.device)
    inputs = launches.sampling_rows(count, 0.8, sizes.vocab, top_p)
    there = TritonLogits(logits)
    case = Case([lambda: sampler.launch(there, inputs)], logits.nbytes)
    if top_p < 1:
        case.skipped["torch"] = "it has no such operation"
        return case
    case.peers["torch.multinomial"] = [
        lambda: torch.multinomial(torch.softmax(logits / 0.8, -1), 1)
    ]
    return case
