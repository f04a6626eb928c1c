"""Is each operation that goes row by row right? Norms, gates, rope with the write to the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ....kernels.backend import KV_CODES, KV_GROUP
from ....kernels.triton.rms_norm import Norm
from . import launches
from .card import Card
from .launches import Heads
from .probe import Guarded, Probe, half_step, worst
from .sizes import Sizes


def probes(
    card: Card, sizes: Sizes, dtype: torch.dtype, rng: np.random.Generator
) -> Iterator[Probe]:
    """Those with activations of dtype."""
    yield from _by_rows(card, sizes, dtype)
    for kind in launches.cache_kinds(dtype):
        for before in ("", "norms of heads, "):
            yield Probe(
                f"{before}rope and {kind} cache",
                str(dtype).removeprefix("torch."),
                f"{sizes.rows} rows, {sizes.attention.label()}",
                lambda kind=kind, normed=bool(before): _rope(  # type: ignore[misc]
                    card, sizes, kind, dtype, rng, normed=normed
                ),
            )


def gate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of silu_mul or gelu_tanh_mul."""
    if name == "silu_mul":
        return x * torch.sigmoid(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


def _by_rows(card: Card, sizes: Sizes, dtype: torch.dtype) -> Iterator[Probe]:
    def rows(width: int) -> torch.Tensor:
        return torch.randn(sizes.rows, width, device=card.device).to(dtype)

    def compare(out: Guarded, want: torch.Tensor, size: torch.Tensor | None = None) -> float:
        size = want if size is None else size
        bound = want.abs() * half_step(dtype) + size.abs() * 2.0**-19
        return worst(out.result(), want, bound)

    def norm() -> float:
        x, weight = rows(sizes.hidden), torch.randn(sizes.hidden, device=card.device)
        out = Guarded(sizes.rows, sizes.hidden, dtype, card.device)
        launches.normalise(x, weight, out.out, 1e-5)()
        mean = x.double().square().mean(-1, keepdim=True)
        return compare(out, x.double() / (mean + 1e-5).sqrt() * weight.double())

    def norm_and_add() -> float:
        x, other = rows(sizes.hidden), rows(sizes.hidden)
        weight = torch.randn(sizes.hidden, device=card.device)
        out = Guarded(sizes.rows, sizes.hidden, dtype, card.device)
        launches.normalise(x, weight, out.out, 1e-5, other)()
        mean = x.double().square().mean(-1, keepdim=True)
        normed = x.double() / (mean + 1e-5).sqrt() * weight.double()
        want = other.double() + normed
        rounding = normed.abs() * (half_step(dtype) * 1.01 + 2.0**-19)
        return worst(out.result(), want, rounding + want.abs() * (half_step(dtype) + 2.0**-19))

    def mapped(name: str) -> float:
        a, b = rows(sizes.ffn), rows(sizes.ffn)
        out = Guarded(sizes.rows, sizes.ffn, dtype, card.device)
        launches.elementwise_op(name, a, b, out.out, 3.0)()
        x, y = a.double(), b.double()
        if name == "add":
            return compare(out, x + y, x.abs() + y.abs())
        if name == "scale":
            return compare(out, x * 3.0)
        if name == "softcap":
            return compare(out, torch.tanh(x / 3.0) * 3.0)
        return compare(out, gate(x, name) * y, x * y)

    def selected() -> float:
        x = rows(sizes.hidden)
        index = torch.randint(0, sizes.rows, (7,), device=card.device, dtype=torch.int32)
        out = Guarded(7, sizes.hidden, dtype, card.device)
        launches.rows_of(x, index, out.out)()
        return compare(out, x[index.long()].double())

    found: list[tuple[str, int, Callable[[], float]]] = [
        ("rms_norm", sizes.hidden, norm),
        ("rms_norm then add", sizes.hidden, norm_and_add),
        ("select_rows", sizes.hidden, selected),
    ]
    found += [
        (op, sizes.ffn, lambda op=op: mapped(op))  # type: ignore[misc]
        for op in ("add", "scale", "softcap", "silu_mul", "gelu_tanh_mul")
    ]
    for name, width, run in found:
        dtype_name = str(dtype).removeprefix("torch.")
        yield Probe(name, dtype_name, f"{sizes.rows} x {width}", run)


def _rope(
    card: Card,
    sizes: Sizes,
    kind: str,
    dtype: torch.dtype,
    rng: np.random.Generator,
    *,
    normed: bool,
) -> float:
    heads, count = sizes.attention, sizes.rows
    step = launches.paged_step([count], [count], sizes.block_size, rng)
    slot = step.slot.copy()
    slot[::5] = -1  # padding: writes nothing
    cache = launches.new_cache(
        heads,
        launches.cache_blocks([count], sizes.block_size),
        sizes.block_size,
        kind,
        card.device,
    )
    q, k, v = (
        torch.randn(count, n * heads.head_dim, device=card.device).to(dtype)
        for n in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    )
    out = Guarded(count, heads.q_width, dtype, card.device)
    there = torch.from_numpy(slot).to(card.device)
    norms = [
        Norm(1 + torch.rand(heads.head_dim, device=card.device), 1e-5, 0.0) if normed else None
        for _ in range(2)
    ]
    launches.rotate_and_write(heads, q, out.out, (k, v), cache, there, step.positions, norms)()
    (want_q, size_q), (want_k, size_k) = (
        rotated(_heads_normed(x, norm), step.positions, heads)
        for x, norm in zip((q, k), norms, strict=True)
    )
    slots = launches.slots(cache)
    keys, values = cache.spec.parts
    kept = slot >= 0
    written = slots[torch.from_numpy(slot[kept]).to(card.device).long()]
    rest = np.setdiff1d(np.arange(len(slots)), slot[kept])
    if not bool(slots[torch.from_numpy(rest).to(card.device)].isnan().all()):
        return float("inf")
    here = torch.from_numpy(kept).to(card.device)
    want_k, size_k, want_v = want_k[here], size_k[here], v[here].double()

    def bound(want: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        # What is normed is rounded before it is rotated.
        return want.abs() * half_step(dtype) + size * (2.0**-20 + normed * 1.01 * half_step(dtype))

    def stored(want: torch.Tensor, part: str) -> torch.Tensor:
        """What the cache's own rounding adds: nothing where it holds the activations' dtype."""
        if part not in KV_CODES:
            return torch.zeros_like(want)
        parts = want.view(len(want), heads.num_kv_heads, -1)
        if part == "int4":  # scale and offset have 8 bits, rounded so that nothing is outside
            groups = torch.split(parts, KV_GROUP, -1)
            least = [g.amin(-1, keepdim=True) for g in groups]
            span = [g.amax(-1, keepdim=True) - low for g, low in zip(groups, least, strict=True)]
            scale = [
                (s + low.abs() * 2.0**-7) / 15 * 1.01 for s, low in zip(span, least, strict=True)
            ]
            half = torch.cat([s.expand_as(g) / 2 for s, g in zip(scale, groups, strict=True)], -1)
        else:
            size = parts.abs()
            unit = size.amax(-1, keepdim=True) / (127 if part == "int8" else 448)
            half = unit * 0.5 if part == "int8" else torch.maximum(size * 2.0**-4, unit * 2.0**-10)
        return (half.expand_as(parts) * 1.01).reshape(want.shape)

    return max(
        worst(out.result(), want_q, bound(want_q, size_q)),
        worst(written[:, 0], want_k, bound(want_k, size_k) + stored(want_k, keys)),
        worst(written[:, 1], want_v, stored(want_v, values)),
    )


def _heads_normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """rms_norm of each head of x [rows, heads * dim], fp64."""
    if norm is None:
        return x.double()
    heads = x.double().view(len(x), -1, len(norm.weight))
    mean = heads.square().mean(-1, keepdim=True)
    return (heads / (mean + norm.eps).sqrt() * norm.weight.double()).view(x.shape)


def rotated(
    x: torch.Tensor, positions: np.ndarray, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rope in fp64, and the sum of its terms' sizes."""
    half = heads.head_dim // 2
    inv_freq = np.array([10000.0 ** (-i / half) for i in range(half)], np.float32)
    angle = torch.from_numpy((positions[:, None].astype(np.float32) * inv_freq).astype(np.float64))
    cos, sin = (f(angle).to(x.device)[:, None, :] for f in (torch.cos, torch.sin))
    a, b = x.double().view(len(x), -1, 2, half).unbind(2)
    out = torch.stack([a * cos - b * sin, b * cos + a * sin], 2)
    size = torch.stack([(a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()], 2)
    return out.reshape(len(x), -1), size.reshape(len(x), -1)
