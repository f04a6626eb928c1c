"""Kernels as the benchmark calls them: the one file here that knows the launchers' arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....kernels.backend import KV_CODES, KVSpec, SamplingInputs, StepInputs
from ....kernels.triton import attention, elementwise, embedding, linear, quantised, rms_norm, rope
from ....kernels.triton.cache import Half, KVCache
from ....kernels.triton.device import loads_ahead
from ....kernels.triton.inputs import scratch_width
from ....kernels.triton.quantised import Matrix
from ....kernels.triton.rms_norm import Norm
from ....kernels.weights import FORMATS, Format, RawWeight
from .card import Launch

# Every format that the GPU backend multiplies.
WEIGHTS = tuple(
    fmt for fmt in FORMATS.values() if fmt in quantised.FLOATS or fmt.name in quantised.LAYOUTS
)


# ---------------------------------------------------------------------------------------- linear


def random_weight(fmt: Format, rows: int, columns: int, rng: np.random.Generator) -> RawWeight:
    """A weight of random values of about 1/sqrt(columns); of quantised formats, random blocks."""
    size = columns**-0.5

    def fields(layout: tuple[tuple[str, str, int], ...], count: int) -> np.ndarray:
        parts = [_field(name, kind, (count, n), size, rng) for name, kind, n in layout]
        return np.concatenate(parts, axis=1)

    blocks = fields(fmt.layout, rows * columns // fmt.block_elements).reshape(rows, -1)
    data = np.concatenate([fields(fmt.header, rows), blocks], axis=1) if fmt.header else blocks
    return RawWeight("random", fmt, (rows, columns), {"data": data.reshape(-1)})


def _field(
    name: str, kind: str, shape: tuple[int, int], size: float, rng: np.random.Generator
) -> np.ndarray:
    """A field of shape[0] blocks, as bytes: values of about `size`, scales of codes smaller."""
    if kind in ("f2", "f4", "bf16"):
        scale = size / 64 if name in ("d", "dmin", "scale") else size
        values = rng.standard_normal(shape, np.float32) * np.float32(scale)
        if kind == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(kind).view(np.uint8)
    codes = rng.integers(0, 256, (shape[0], shape[1] * np.dtype(kind).itemsize), np.uint8)
    if name == "exponent":  # of a scale of about `size` / 64
        codes = codes % 4 + np.uint8(121 + round(np.log2(size)))
    if name == "values":  # e4m3, whose last code of either sign is a NaN
        codes[codes & 0x7F == 0x7F] = 0
    return codes


def pack(
    weight: RawWeight, device: torch.device, copies: int = 1, activations: str = ""
) -> list[Matrix]:
    """The weight in device memory, `copies` times; activations: see quantised.pack."""
    first = quantised.pack([weight], device, activations)
    tensors = {
        f.name: value
        for f in dataclasses.fields(first)
        if isinstance(value := getattr(first, f.name), torch.Tensor)
    }
    more = [
        dataclasses.replace(first, **{name: t.clone() for name, t in tensors.items()})  # type: ignore[arg-type]
        for _ in range(copies - 1)
    ]
    return [first, *more]


def multiply(x: torch.Tensor, weight: Matrix, out: torch.Tensor, **more: Any) -> Launch:
    """linear.launch, rounded to out's dtype."""
    width = scratch_width(weight)
    scratch = torch.empty((len(x), width), device=x.device) if width else None
    return lambda: linear.launch(x, weight, out, round_to=out.dtype, scratch=scratch, **more)


# ------------------------------------------------------------------------------------- attention


@dataclasses.dataclass(frozen=True)
class Heads:
    """An attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0
    extras: bool = False  # ALiBi's slopes and sinks

    def slopes(self, device: torch.device) -> torch.Tensor | None:
        """fp32 [num_heads], falling by powers of two, or None."""
        heads = torch.arange(1, self.num_heads + 1, device=device, dtype=torch.float32)
        return torch.exp2(-8 * heads / self.num_heads) if self.extras else None

    def sinks(self, device: torch.device) -> torch.Tensor | None:
        """fp32 [num_heads], of small to large weight, or None."""
        return torch.linspace(-2, 4, self.num_heads, device=device) if self.extras else None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    def label(self) -> str:
        more = f" window {self.window}" if self.window else ""
        more += f" softcap {self.softcap:g}" if self.softcap else ""
        more += " slopes, sinks" if self.extras else ""
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}{more}"


def paged_step(
    lengths: Sequence[int], new: Sequence[int], block_size: int, rng: np.random.Generator
) -> StepInputs:
    """The last new[s] tokens of sequences of lengths[s], their blocks scattered over a cache of
    `cache_blocks(lengths, block_size)`."""
    blocks = [-(-n // block_size) for n in lengths]
    order = rng.permutation(cache_blocks(lengths, block_size))
    table = np.zeros((len(lengths), max(blocks)), np.int32)
    at = 0
    for s, count in enumerate(blocks):
        table[s, :count] = order[at : at + count]
        at += count
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lengths, new, strict=True)])
    owner = np.repeat(np.arange(len(lengths)), new)
    slot = table[owner, positions // block_size] * block_size + positions % block_size
    return StepInputs(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions.astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        seq_len=np.array(lengths, np.int32),
        block_table=table,
        slot=slot.astype(np.int32),
        logit_rows=np.zeros(0, np.int32),
    )


def cache_blocks(lengths: Sequence[int], block_size: int) -> int:
    """Blocks of a cache for such sequences, and one that nobody owns."""
    return sum(-(-n // block_size) for n in lengths) + 1


def new_cache(
    heads: Heads, num_blocks: int, block_size: int, kind: str, device: torch.device
) -> KVCache:
    """One layer's cache in `kind` (KV_DTYPES), every slot NaN: what no sequence wrote must not be
    read."""
    spec = KVSpec(1, heads.num_kv_heads, heads.head_dim, block_size, kind)
    cache = KVCache.zeros(spec, num_blocks, device)
    for half in (cache.keys, cache.values):
        if half.scales is None:
            half.data.fill_(float("nan"))
        else:  # of int4: the bits of bfloat16
            half.scales.fill_(0x7FC0 if half.codes == "int4" else float("nan"))
    return cache


def fill(cache: KVCache) -> None:
    """Random values in every slot."""
    for half in (cache.keys, cache.values):
        if half.scales is None:
            half.data.normal_()
        else:
            half.data.random_(-100, 100)
            half.scales.fill_(0x3C24 if half.codes == "int4" else 0.01)


def slots(cache: KVCache) -> torch.Tensor:
    """What is read of a cache of one layer, fp64 [slot, k or v, kv heads * head_dim]."""
    width = cache.spec.num_kv_heads * cache.spec.head_dim

    def rows(half: Half) -> torch.Tensor:
        read = half.decoded(cache.spec.head_dim)[:, 0]
        return read.transpose(1, 2).reshape(-1, width)

    return torch.stack([rows(cache.keys), rows(cache.values)], 1)


def cache_kinds(dtype: torch.dtype) -> tuple[str, ...]:
    """Caches beside activations of dtype: its own, and those in codes."""
    return (str(dtype).removeprefix("torch."), *KV_CODES)


def write(cache: KVCache, k: torch.Tensor, v: torch.Tensor, slot: torch.Tensor) -> Launch:
    """Store k and v [T, kv heads * head_dim] in their slots, not rotated."""
    dim = cache.spec.head_dim
    return lambda: rope.launch(dim, None, kv=(k, v), cache=cache, slot=slot)


def rotate_and_write(
    heads: Heads,
    q: torch.Tensor,
    q_out: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    cache: KVCache,
    slot: torch.Tensor,
    positions: np.ndarray,
    norms: Sequence[Norm | None] = (None, None),
) -> Launch:
    """The rope of queries and keys with the write to the cache, as a model's step has it; norms: of
    their heads, before it."""
    inv_freq = tuple(10000.0 ** (-2 * i / heads.head_dim) for i in range(heads.head_dim // 2))
    rows = rope.Rotations(inv_freq, 1.0).rows(positions)
    rotation = rope.Rotation(torch.from_numpy(rows).to(q.device), False)
    return lambda: rope.launch(
        heads.head_dim, rotation, q, q_out, kv, norms=norms, rotate_k=True, cache=cache, slot=slot
    )


def attend(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: KVCache,
    step: StepInputs,
    heads: Heads,
    split_programs: int = 1024,
) -> Launch:
    """attention.launch with its plan made; split_programs: see attention.plan."""
    product = str(q.dtype).removeprefix("torch.") if cache.serves(q.dtype) else "float32"
    shape = attention.Shape(
        heads.num_heads, heads.num_kv_heads, heads.head_dim, product, loads_ahead(), cache.grouped
    )
    last = np.where(step.slot >= 0, step.positions, -1).astype(np.int32)
    plan = attention.plan(step, shape, last, split_programs)

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(q.device)

    work = attention.DevicePlan(
        *map(there, (plan.wide, plan.narrow, plan.split, plan.pairs, last, step.block_table))
    )
    scratch = attention.Scratch(q.device)
    slopes, sinks = heads.slopes(q.device), heads.sinks(q.device)
    return lambda: attention.launch(
        q,
        out,
        cache,
        work,
        scratch,
        shape,
        layer=0,
        scale=heads.scale,
        window=heads.window,
        softcap=heads.softcap,
        slopes=slopes,
        sinks=sinks,
    )


# ---------------------------------------------------------------------------------- row by row


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    other: torch.Tensor | None = None,
) -> Launch:
    return lambda: rms_norm.launch(x, weight, out, eps, 0.0, other)


def elementwise_op(
    name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, parameter: float = 0.0
) -> Launch:
    return lambda: elementwise.launch(name, a, b, out, parameter)


def rows_of(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> Launch:
    return lambda: embedding.select_rows(x, index, out)


def embed(table: Matrix, index: torch.Tensor, out: torch.Tensor) -> Launch:
    return lambda: embedding.embedding(table, index, out)


# -------------------------------------------------------------------------------------- sampling


def sampling_rows(
    count: int, temperature: float, vocab_size: int, top_p: float = 1.0
) -> SamplingInputs:
    """`count` rows of one temperature and top-p, each with its own seed; no more is asked."""

    def of(value: float, dtype: type) -> np.ndarray:
        return np.full(count, value, dtype)

    none, starts = np.zeros(0, np.int32), np.zeros(count + 1, np.int32)
    zeros = {
        name: of(0, np.float32)
        for name in (
            "min_p",
            "top_n_sigma",
            "xtc_probability",
            "xtc_threshold",
            "presence_penalty",
            "frequency_penalty",
        )
    }
    ones = {name: of(1, np.float32) for name in ("typical_p", "repetition_penalty")}
    return SamplingInputs(
        temperature=of(temperature, np.float32),
        top_k=of(0, np.int32),
        top_p=of(top_p, np.float32),
        seed=np.arange(count, dtype=np.uint64),
        sample_index=of(0, np.uint32),
        position=of(7, np.uint32),
        target=of(-1, np.int32),
        num_logprobs=of(-1, np.int32),
        history_start=starts,
        history_ids=none,
        history_count=none,
        bias_start=starts,
        bias_ids=none,
        bias_values=np.zeros(0, np.float32),
        ban_start=starts,
        ban_ids=none,
        mask_row=of(0, np.int32),
        mask_table=np.full((1, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
        **zeros,
        **ones,
    )
