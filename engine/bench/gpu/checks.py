"""Is every kernel right? Each beside its formula in fp64, on fresh random numbers.

Outputs lie in buffers full of NaN with rows and columns around them that nobody may touch; cache
slots that no sequence has written are NaN too. An element passes where it is within a bound that
follows from the one rounding to its dtype and the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ....kernels.backend import KV_CODES, KV_GROUP
from ....kernels.cpu.sampler import CpuLogits, CpuSampler
from ....kernels.triton import TritonBackend, quantised
from ....kernels.triton import device as dev
from ....kernels.triton.cache import KVCache
from ....kernels.triton.executor import TritonLogits
from ....kernels.weights import BF16, CODEBOOKS, F16, F32, I4G32, Q4_0, Format
from ....quant.values import dequantise
from . import launches, row_checks
from .card import Card
from .launches import Heads
from .probe import Guarded, Probe, half_step, worst
from .row_checks import gate
from .sizes import Sizes

_FLOATS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}


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
        yield from row_checks.probes(card, sizes, dtype, rng)
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
    if fmt.name in CODEBOOKS and dtype != torch.float32:
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
    a row, or "int4" with two for each 32 of a part, fp64: see ops.kv_write, and of whole rows
    linear.activations_kernel."""
    parts = x.float().view(len(x), heads, -1)
    if kind == "int4":
        return torch.cat([_in_4_bits(g) for g in torch.split(parts, KV_GROUP, -1)], -1).view(
            len(x), -1
        )
    most = 127.0 if kind == "int8" else 448.0
    largest = parts.abs().amax(-1, keepdim=True)
    top = torch.full_like(largest, most)  # of a plain number torch takes the reciprocal
    codes = (parts * (top / largest)).clamp(-most, most)
    codes = codes.round() if kind == "int8" else codes.to(torch.float8_e4m3fn)
    return (codes.double() * (largest / top).double()).view(len(x), -1)


def _in_4_bits(group: torch.Tensor) -> torch.Tensor:
    def towards(x: torch.Tensor, up: bool) -> torch.Tensor:  # 8 significant bits
        fraction, exponent = torch.frexp(x.double())
        whole = fraction * 256
        return torch.ldexp(whole.ceil() if up else whole.floor(), exponent - 8).float()

    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    offset = towards(low, up=False)
    scale = towards((high - offset) / torch.full_like(low, 15.0), up=True)
    factor = torch.ones_like(scale) / scale
    codes = ((group - offset) * factor).round().clamp(max=15)
    return codes.double() * scale.double() + offset.double()


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

    def read(x: torch.Tensor, part: str) -> torch.Tensor:
        if part not in KV_CODES:
            return x
        codes = codes_of(x, part, heads.num_kv_heads)
        return codes.to(dtype).double() if part == "int4" else codes  # multiplied rounded to dtype

    k, v = (read(x, part) for x, part in zip((k, v), cache.spec.parts, strict=True))
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
