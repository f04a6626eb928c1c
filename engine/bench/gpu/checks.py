"""Is every kernel right? Each beside its formula in fp64, on fresh random numbers.

Outputs lie in buffers full of NaN with rows and columns around them that nobody may touch; cache
slots that no sequence has written are NaN too. An element passes where it is within a bound that
follows from the one rounding to its dtype and the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ....kernels.cpu.sampler import CpuLogits, CpuSampler
from ....kernels.triton import TritonBackend, quantised
from ....kernels.triton import device as dev
from ....kernels.triton.cache import KVCache
from ....kernels.triton.executor import TritonLogits
from ....kernels.triton.rms_norm import Norm
from ....kernels.weights import BF16, F16, F32, I4G32, Q4_0, Format
from ....quant.values import dequantise
from . import launches
from .card import Card
from .launches import Heads
from .sizes import Sizes

_PAD_ROWS, _PAD_COLUMNS = 3, 16
_TINY = 2.0**-24  # fp16's smallest step
_FLOATS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}


@dataclass(frozen=True)
class Check:
    """One row of the report. `error` is the worst one as a share of its bound; at most 1 passes."""

    kind: str
    name: str
    dtype: str
    shape: str
    error: float | None
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """A check before it has run; `run` returns the worst error as a share of its bound."""

    name: str
    dtype: str
    shape: str
    run: Callable[[], float]
    kind: str = "correct"


def run_probe(probe: Probe) -> Check:
    """The check's row, whatever happens: what raises has failed, and says how."""
    error, detail = None, ""
    try:
        error = probe.run()
    except Exception as raised:
        detail = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
    passed = error is not None and error <= 1
    finite = error if error is not None and np.isfinite(error) else None
    if error is not None and finite is None:
        detail = "a result is not finite, or memory beside the output was written"
    return Check(probe.kind, probe.name, probe.dtype, probe.shape, finite, passed, detail)


class Guarded:
    """An output [rows, width] full of NaN, inside of memory that is not to be touched."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows + 2 * _PAD_ROWS, width + _PAD_COLUMNS)
        self._memory = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.out = self._memory[_PAD_ROWS : _PAD_ROWS + rows, :width]

    def result(self) -> torch.Tensor:
        """The output in fp64; infinite throughout where something beside it was written."""
        around = self._memory.clone()
        around[_PAD_ROWS : _PAD_ROWS + self.out.shape[0], : self.out.shape[1]] = float("nan")
        out = self.out.double()
        return out if bool(around.isnan().all()) else torch.full_like(out, float("inf"))


def worst(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error as a share of its bound; infinite where a result is not a number."""
    share = (got - want).abs() / (bound + _TINY)
    return float("inf") if bool(share.isnan().any()) else float(share.max())


def half_step(dtype: torch.dtype) -> float:
    """What rounding to dtype changes at most, relatively."""
    return torch.finfo(dtype).eps / 2


def probes(card: Card, sizes: Sizes, rng: np.random.Generator) -> Iterator[Probe]:
    """Every check of correctness. A new kernel is one more line here."""
    for dtype in sizes.dtypes:
        name = str(dtype).removeprefix("torch.")
        for fmt in launches.WEIGHTS:
            if not fmt.is_float or fmt == _FLOATS[dtype]:
                yield from _linears(card, sizes, fmt, dtype, rng)
        for fmt in (_FLOATS[dtype], Q4_0):
            yield Probe(
                f"linear {fmt.name}, gate and layer in one",
                name,
                f"{sizes.batches[-1]} x {sizes.layer[1]} x {sizes.layer[0]}",
                lambda fmt=fmt, dtype=dtype: _gated(card, sizes, fmt, dtype, rng),  # type: ignore[misc]
            )
        for fmt, activations in eight_bits():
            yield from _linears(card, sizes, fmt, dtype, rng, activations)
        for activations in ("", "int8"):
            yield from _linears(card, sizes, I4G32, dtype, rng, activations, ordered=True)
        for heads, kind in caches(sizes, dtype):
            for case, new in (("decode", 1), ("chunks", 40)):
                yield Probe(
                    f"attention, {kind} cache, {case}",
                    name,
                    f"{heads.label()}, contexts {min(sizes.lengths)} to {max(sizes.lengths)}",
                    lambda heads=heads, kind=kind, new=new, dtype=dtype: _attention(  # type: ignore[misc]
                        card, heads, sizes, kind, new, dtype, rng
                    ),
                )
        yield from _by_rows(card, sizes, dtype)
        for kind in launches.cache_kinds(dtype):
            for before in ("", "norms of heads, "):
                yield Probe(
                    f"{before}rope and {kind} cache",
                    name,
                    f"{sizes.rows} rows, {sizes.attention.label()}",
                    lambda kind=kind, dtype=dtype, normed=bool(before): _rope(  # type: ignore[misc]
                        card, sizes, kind, dtype, rng, normed=normed
                    ),
                )
    for temperature, top_p in ((0.0, 1.0), (0.8, 1.0), (0.8, 0.9)):
        yield Probe(
            "sampling, beside the CPU's tokens",
            "float32",
            f"{max(sizes.sampled)} x {sizes.vocab}, temperature {temperature}, top-p {top_p}",
            lambda t=temperature, p=top_p: _sampling(card, sizes, t, p, rng),  # type: ignore[misc]
        )


def eight_bits() -> Iterator[tuple[Format, str]]:
    """Formats with activations of 8 bits that multiply them on this card."""
    for activations in ("int8",) if dev.lacks_fp8() else ("int8", "fp8"):
        for fmt in launches.WEIGHTS:
            layout = quantised.LAYOUTS.get(fmt.name)
            if layout is not None and layout.multiplies(activations):
                yield fmt, activations


def caches(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Heads, str]]:
    """Layers with a cache of activations of dtype, and the first of them with caches in codes."""
    floats, *codes = launches.cache_kinds(dtype)
    for heads in sizes.heads:
        yield heads, floats
    for kind in codes:
        yield sizes.heads[0], kind


# ---------------------------------------------------------------------------------------- linear


def _linears(
    card: Card,
    sizes: Sizes,
    fmt: Format,
    dtype: torch.dtype,
    rng: np.random.Generator,
    activations: str = "",
    *,
    ordered: bool = False,
) -> Iterator[Probe]:
    rows, columns = sizes.layer
    columns -= columns % fmt.block_elements
    afters = ("", "add", "silu_mul", "gelu_tanh_mul") if fmt.is_float else ("",)
    for after in afters:
        for tokens in (sizes.batches[-1],) if after else (1, sizes.batches[-1]):
            yield Probe(
                f"linear {fmt.name}"
                + (", act-order" if ordered else "")
                + (f" by {activations}" if activations else "")
                + (f" then {after}" if after else ""),
                str(dtype).removeprefix("torch."),
                f"{tokens} x {columns} x {rows}",
                lambda after=after, tokens=tokens: _linear(  # type: ignore[misc]
                    card, fmt, (rows, columns), tokens, dtype, after, rng, activations, ordered
                ),
            )


def _linear(
    card: Card,
    fmt: Format,
    layer: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    after: str,
    rng: np.random.Generator,
    activations: str,
    ordered: bool,
) -> float:
    rows, columns = layer
    raw = launches.random_weight(fmt, rows, columns, rng)
    order = rng.permutation(columns).astype(np.int32) if ordered else None
    held = replace(raw, columns=order)
    weight = launches.pack(held, card.device, activations=activations)[0]
    x = torch.randn(tokens, columns, device=card.device).to(dtype)
    other = torch.randn(tokens, rows, device=card.device).to(dtype)
    bias = torch.randn(rows, device=card.device)
    guarded = Guarded(tokens, rows, dtype, card.device)
    more = {"after": after, "other": other} if after else {}
    launches.multiply(x, weight, guarded.out, bias=bias, **more)()
    wide = torch.from_numpy(dequantise(raw)).to(card.device).double()
    given = codes_of(x, activations, 1) if activations else x.double()
    if order is not None:
        given = given[:, torch.from_numpy(order).to(card.device).long()]
    sums = given @ wide.T + bias.double()
    size = given.abs() @ wide.abs().T + bias.double().abs()
    order = 2.0**-22 * columns**0.5
    if fmt.name == "NF4" and dtype != torch.float32:
        order += half_step(dtype)  # its table is rounded to the dtype of x
    if activations == "fp8":
        order += 2.0**-12  # the tensor core's own sums of 8-bit floats have fewer bits
    error = sums.abs() * (half_step(dtype) if after else 0) + size * order
    want, slope = sums, torch.ones_like(sums)
    if after == "add":
        want = other.double() + sums
    elif after:
        slope = gate(other.double(), after)
        want = slope * sums
    bound = slope.abs() * error + want.abs() * (half_step(dtype) + 2.0**-20)
    return worst(guarded.result(), want, bound)


def _gated(
    card: Card, sizes: Sizes, fmt: Format, dtype: torch.dtype, rng: np.random.Generator
) -> float:
    """silu_mul of a gate and a layer whose rows take turns."""
    rows, columns = sizes.layer
    rows, columns = rows - rows % quantised.PAIR, columns - columns % fmt.block_elements
    raw = launches.random_weight(fmt, 2 * rows, columns, rng)
    weight = quantised.paired(launches.pack(raw, card.device)[0])
    x = torch.randn(sizes.batches[-1], columns, device=card.device).to(dtype)
    guarded = Guarded(len(x), rows, dtype, card.device)
    launches.multiply(x, weight, guarded.out, after="silu_mul")()
    wide = torch.from_numpy(dequantise(raw)).to(card.device).double()
    both, sizes_of = x.double() @ wide.T, x.double().abs() @ wide.abs().T
    a, b = both[:, :rows], both[:, rows:]
    size_a, size_b = sizes_of[:, :rows], sizes_of[:, rows:]
    order = 2.0**-22 * columns**0.5
    error_a, error_b = (
        s.abs() * half_step(dtype) + size * order for s, size in ((a, size_a), (b, size_b))
    )
    want = gate(a, "silu_mul") * b
    bound = 1.1 * error_a * (b.abs() + error_b) + gate(a, "silu_mul").abs() * error_b
    return worst(guarded.result(), want, bound + want.abs() * (half_step(dtype) + 2.0**-20))


def codes_of(x: torch.Tensor, kind: str, heads: int) -> torch.Tensor:
    """x [rows, width] through "int8" or "fp8" codes with a scale for each of `heads` equal parts of
    a row, fp64: see ops.kv_write, and of whole rows linear.activations_kernel."""
    parts = x.float().view(len(x), heads, -1)
    most = 127.0 if kind == "int8" else 448.0
    largest = parts.abs().amax(-1, keepdim=True)
    top = torch.full_like(largest, most)  # of a plain number torch takes the reciprocal
    codes = (parts * (top / largest)).clamp(-most, most)
    codes = codes.round() if kind == "int8" else codes.to(torch.float8_e4m3fn)
    return (codes.double() * (largest / top).double()).view(len(x), -1)


def gate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of silu_mul or gelu_tanh_mul."""
    if name == "silu_mul":
        return x * torch.sigmoid(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


# ------------------------------------------------------------------------------------- attention


def _attention(
    card: Card,
    heads: Heads,
    sizes: Sizes,
    kind: str,
    new: int,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> float:
    lengths = sizes.lengths
    cache, keys, values = filled_cache(card, heads, sizes, kind, dtype, rng)
    counts = [min(new, n) for n in lengths]
    step = launches.paged_step(lengths, counts, sizes.block_size, np.random.default_rng(1))
    q = torch.randn(sum(counts), heads.q_width, device=card.device).to(dtype)
    guarded = Guarded(len(q), heads.q_width, dtype, card.device)
    launches.attend(q, guarded.out, cache, step, heads)()
    got, at, share = guarded.result(), 0, 0.0
    for s, count in enumerate(counts):
        want, size = attention_formula(q[at : at + count], keys[s], values[s], heads)
        product = half_step(dtype) if dtype != torch.float32 else 0.0
        bound = size * (product * 1.1 + 2.0**-17) + want.abs() * half_step(dtype)
        share = max(share, worst(got[at : at + count], want, bound))
        at += count
    return share


def filled_cache(
    card: Card,
    heads: Heads,
    sizes: Sizes,
    kind: str,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> tuple[KVCache, list[torch.Tensor], list[torch.Tensor]]:
    """A cache of `kind` that holds random K and V of whole sequences, by the kernel that writes it,
    and what is to be read of it. Blocks are those of paged_step(lengths, ..., default_rng(1))."""
    lengths, block_size = sizes.lengths, sizes.block_size
    cache = launches.new_cache(
        heads, launches.cache_blocks(lengths, block_size), block_size, kind, card.device
    )
    step = launches.paged_step(lengths, lengths, block_size, np.random.default_rng(1))
    width = heads.num_kv_heads * heads.head_dim
    k, v = (torch.randn(sum(lengths), width, device=card.device).to(dtype) for _ in range(2))
    launches.write(cache, k, v, torch.from_numpy(step.slot).to(card.device))()
    if cache.scales is not None:
        k, v = (codes_of(x, kind, heads.num_kv_heads) for x in (k, v))
    return cache, list(torch.split(k, list(lengths))), list(torch.split(v, list(lengths)))


def attention_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens' attention to their sequence in fp64, and the same of |v|."""
    count, length, d = len(q), len(k), heads.head_dim
    shared = heads.num_heads // heads.num_kv_heads
    query = q.double().view(count, heads.num_kv_heads, shared, d)
    key, value = (x.double().view(length, heads.num_kv_heads, d) for x in (k, v))
    scores = torch.einsum("tgsd,kgd->tgsk", query, key) * heads.scale
    if heads.softcap:
        scores = torch.tanh(scores / heads.softcap) * heads.softcap
    position = torch.arange(length - count, length, device=q.device)[:, None]
    past = position - torch.arange(length, device=q.device)[None, :]
    seen = (past >= 0) & ((past < heads.window) if heads.window else (past >= 0))
    slopes, sinks = heads.slopes(q.device), heads.sinks(q.device)
    if slopes is not None:
        by_head = slopes.double().view(heads.num_kv_heads, shared, 1)
        scores = scores - by_head * past.double()[:, None, None, :]
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    if sinks is not None:
        sink = sinks.double().view(1, heads.num_kv_heads, shared, 1).expand(count, -1, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., :length]
    out = torch.einsum("tgsk,kgd->tgsd", p, value).reshape(count, -1)
    return out, torch.einsum("tgsk,kgd->tgsd", p, value.abs()).reshape(count, -1)


# ---------------------------------------------------------------------------------- row by row


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

    def stored(want: torch.Tensor) -> torch.Tensor:
        """What the cache's own rounding adds: nothing where it holds the activations' dtype."""
        if cache.scales is None:
            return torch.zeros_like(want)
        parts = want.view(len(want), heads.num_kv_heads, -1).abs()
        unit = parts.amax(-1, keepdim=True) / (127 if kind == "int8" else 448)
        half = unit * 0.5 if kind == "int8" else torch.maximum(parts * 2.0**-4, unit * 2.0**-10)
        return (half.expand_as(parts) * 1.01).reshape(want.shape)

    return max(
        worst(out.result(), want_q, bound(want_q, size_q)),
        worst(written[:, 0], want_k, bound(want_k, size_k) + stored(want_k)),
        worst(written[:, 1], want_v, stored(want_v)),
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


# -------------------------------------------------------------------------------------- sampling


def _sampling(
    card: Card, sizes: Sizes, temperature: float, top_p: float, rng: np.random.Generator
) -> float:
    """Infinite unless each token is the one that the CPU's sampler draws."""
    logits = rng.standard_normal((max(sizes.sampled), sizes.vocab), np.float32) * 4
    rows = launches.sampling_rows(len(logits), temperature, sizes.vocab, top_p)
    want = CpuSampler(sizes.vocab, 1).run(CpuLogits(logits), rows)
    sampler = TritonBackend(threads=1).sampler(sizes.vocab)
    got = sampler.run(TritonLogits(torch.from_numpy(logits).to(card.device)), rows)
    same = np.array_equal(got.tokens, want.tokens)
    return 0.0 if same else float("inf")
