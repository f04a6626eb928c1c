"""The reference of kv_write and attention: a paged cache, read in key tiles of a fixed size.

Law 2: every product has QUERY_TILE query rows (the last ones zero-padded) and KEY_TILE keys that
start at an absolute position divisible by KEY_TILE (zero-padded past the sequence's end), in a
batch over all kv heads; its shape depends on the model alone. Tiles are combined in ascending order
by online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). A tile that a row cannot see
leaves its maximum as it was and multiplies sum and accumulator by exp(0) = 1 before adding zeros:
an exact no-op, so that skipping it for some rows and not for their neighbours changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..backend import KV_GROUP, KVSpec, StepInputs, kv_groups
from .elementwise import in_whole_vectors, row_sum, softcap

QUERY_TILE = 16  # (token, query head) rows in one product
KEY_TILE = 256  # keys in one product
GROUP_TILES = 64  # query tiles scored at once: bounds the scratch, changes no result

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Scaled:
    """A row of bytes [dim] with one scale, fp32 [1]: int8 and fp8 of ops.kv_write."""

    dtype: torch.dtype
    largest: int

    def empty(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(dim, dtype=torch.int8), torch.zeros(1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        most = x.abs().amax(-1, keepdim=True)
        factor = torch.tensor(float(self.largest)) / most  # not number * (1 / most)
        usable = torch.isfinite(most) & torch.isfinite(factor)
        q = (x * factor).where(usable, torch.zeros(()))
        q = (q.round() if self.dtype == torch.int8 else q).to(self.dtype).view(torch.int8)
        return q, (most / self.largest).where(torch.isfinite(most), torch.tensor(torch.nan))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
        return codes.view(self.dtype).float() * scales


class Grouped:
    """A row of codes of 4 bits, two to a byte, with bfloat16 [2, groups]: int4 of ops.kv_write.

    Byte i of a group's 16 has the codes of its dims i (the low half) and i + 16.
    """

    def empty(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = kv_groups(dim)
        codes = torch.zeros(KV_GROUP // 2 * groups, dtype=torch.int8)
        return codes, torch.zeros(2 * groups, dtype=torch.bfloat16)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = x.shape[-1]
        missing = -dim % KV_GROUP
        last = x[..., -1:].expand(*x.shape[:-1], missing)  # changes no group's extremes
        groups = torch.cat([x, last], -1).reshape(*x.shape[:-1], -1, KV_GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        offset = _bfloat16(low, up=False)
        finite = torch.isfinite(low) & torch.isfinite(high - offset)
        nothing, nan = torch.zeros(()), torch.tensor(torch.nan)
        scale = _bfloat16((high - offset).where(finite, nothing) / 15, up=True)
        factor = 1 / scale
        usable = (finite & torch.isfinite(factor))[..., None]
        codes = ((groups - offset[..., None]) * factor[..., None]).where(usable, nothing)
        codes = codes.round().clamp(max=15).to(torch.uint8)
        codes.flatten(-2)[..., dim:] = 0
        low, high = codes.chunk(2, -1)
        packed = (low | high << 4).flatten(-2)
        scales = torch.cat([scale.where(finite, nan), offset.where(finite, nan)], -1)
        return packed.view(torch.int8), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
        packed = codes.view(torch.uint8)
        halves = packed.reshape(*packed.shape[:-1], -1, KV_GROUP // 2)
        each = torch.cat([halves & 15, halves >> 4], -1).flatten(-2)[..., :dim].float()
        scale, offset = (
            half.float().repeat_interleave(KV_GROUP, -1)[..., :dim] for half in scales.chunk(2, -1)
        )
        return each * scale + offset


def _bfloat16(x: torch.Tensor, up: bool) -> torch.Tensor:
    """x as the nearest number of bfloat16 that is not below (not above) it, in fp32."""
    bits = x.contiguous().view(torch.int32)
    further = ((bits & 0xFFFF) != 0) & ((bits < 0) != up)  # away from zero
    return ((bits & -0x10000) + further.int() * 0x10000).view(torch.float32)


@dataclass(frozen=True)
class Plain:
    """A row of floats."""

    dtype: torch.dtype

    def empty(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(dim, dtype=self.dtype), torch.zeros(0)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(self.dtype), x[..., :0]

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
        return codes.float()


ROWS: dict[str, Plain | Scaled | Grouped] = {
    **{name: Plain(dtype) for name, dtype in TORCH_DTYPES.items()},
    "int8": Scaled(torch.int8, 127),
    "fp8": Scaled(torch.float8_e4m3fn, 448),
    "int4": Grouped(),
}


@dataclass(frozen=True, eq=False)
class Half:
    """The cached keys or values, of one of ROWS: data and scales [num_blocks, layer, kv head, slot,
    as many as a row has], fp8 as bytes, since torch indexes none."""

    rows: Plain | Scaled | Grouped
    data: torch.Tensor
    scales: torch.Tensor

    def write(self, layer: int, block: torch.Tensor, slot: torch.Tensor, x: torch.Tensor) -> None:
        data, scales = self.rows.encode(x)
        self.data[:, layer].transpose(1, 2)[block, slot] = data
        self.scales[:, layer].transpose(1, 2)[block, slot] = scales.to(self.scales.dtype)

    def read(self, layer: int, block: torch.Tensor, slot: torch.Tensor, dim: int) -> torch.Tensor:
        data = self.data[:, layer].transpose(1, 2)[block, slot]
        scales = self.scales[:, layer].transpose(1, 2)[block, slot]
        return self.rows.decode(data, scales, dim)


@dataclass(frozen=True, eq=False)
class KVCache:
    """The paged cache in its logical order."""

    spec: KVSpec
    keys: Half
    values: Half

    @classmethod
    def zeros(cls, spec: KVSpec, num_blocks: int) -> KVCache:
        shape = (num_blocks, spec.num_layers, spec.num_kv_heads, spec.block_size)
        halves = []
        for part in spec.parts:
            rows = ROWS[part]
            data, scales = (
                torch.zeros(*shape, len(x), dtype=x.dtype) for x in rows.empty(spec.head_dim)
            )
            halves.append(Half(rows, data, scales))
        return cls(spec, *halves)

    @property
    def nbytes(self) -> int:
        return sum(h.data.nbytes + h.scales.nbytes for h in (self.keys, self.values))

    def write(self, layer: int, block: torch.Tensor, slot: torch.Tensor, x: torch.Tensor) -> None:
        """Store x, fp32 [n, 2, kv head, dim], at n places (block, slot)."""
        self.keys.write(layer, block, slot, x[:, 0])
        self.values.write(layer, block, slot, x[:, 1])

    def read(self, layer: int, block: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """What n places (block, slot) hold, fp32 [n, 2, kv head, dim]."""
        dim = self.spec.head_dim
        return torch.stack([h.read(layer, block, slot, dim) for h in (self.keys, self.values)], 1)


class Sequences:
    """A step's sequence metadata, prepared once and read by every layer."""

    def __init__(self, step: StepInputs, block_size: int) -> None:
        self.num_tokens = len(step.token_ids)
        self.query_start = step.query_start.tolist()
        self.seq_len = step.seq_len.tolist()
        self.block_size = block_size
        self.block_table = torch.from_numpy(step.block_table.astype(np.int64))
        written = np.flatnonzero(step.slot >= 0)
        slots = step.slot[written].astype(np.int64)
        self.written = None if len(written) == self.num_tokens else torch.from_numpy(written)
        self.write_block = torch.from_numpy(slots // block_size)
        self.write_slot = torch.from_numpy(slots % block_size)
        # A padding row sees no key: no position is at or below -1.
        self.positions = np.where(step.slot >= 0, step.positions, -1).astype(np.int64)


def kv_write(k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int, at: Sequences) -> None:
    """See ops.kv_write.  k, v [T, num_kv_heads * head_dim]."""
    spec = cache.spec
    both = torch.stack([k, v], dim=1).view(-1, 2, spec.num_kv_heads, spec.head_dim)
    if at.written is not None:
        both = both[at.written]
    cache.write(layer, at.write_block, at.write_slot, both)


def attention(
    q: torch.Tensor,
    cache: KVCache,
    at: Sequences,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: tuple[float, ...],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See ops.attention.  q fp32 [T, num_heads * head_dim] -> same; sinks fp32 [num_heads]."""
    shared = num_heads // num_kv_heads  # query heads of one kv head
    slopes = None if not alibi_slopes else torch.tensor(alibi_slopes)
    out = torch.zeros_like(q)
    heads = q.view(-1, num_kv_heads, shared, head_dim)
    tokens_at_once = max(1, GROUP_TILES * QUERY_TILE // shared)
    for s, seq_len in enumerate(at.seq_len):
        for start in range(at.query_start[s], at.query_start[s + 1], tokens_at_once):
            stop = min(start + tokens_at_once, at.query_start[s + 1])
            keys = _Keys(cache, layer, at.block_table[s], seq_len)
            rows = heads[start:stop].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)
            positions = np.repeat(at.positions[start:stop], shared)
            more = [
                None if x is None else x.view(num_kv_heads, shared).T.repeat(stop - start, 1)
                for x in (slopes, sinks)
            ]
            result = _attend(rows, positions, keys, scale, window, softcap, *more)
            result = result.view(stop - start, shared, num_kv_heads, head_dim)
            out[start:stop] = result.transpose(1, 2).reshape(stop - start, -1)
    return out


@dataclass(frozen=True, eq=False)
class _Keys:
    """One sequence's cached keys and values of one layer."""

    cache: KVCache
    layer: int
    blocks: torch.Tensor  # [max_blocks]
    seq_len: int

    def tile(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from position index*KEY_TILE: each fp32 [kv head, KEY_TILE, dim]."""
        spec = self.cache.spec
        position = torch.arange(index * KEY_TILE, min((index + 1) * KEY_TILE, self.seq_len))
        block = self.blocks[position // spec.block_size]
        both = torch.zeros(KEY_TILE, 2, spec.num_kv_heads, spec.head_dim)
        both[: len(position)] = self.cache.read(self.layer, block, position % spec.block_size)
        both = both.permute(1, 2, 0, 3).contiguous()
        return both[0], both[1]


def _attend(
    rows: torch.Tensor,
    positions: np.ndarray,
    keys: _Keys,
    scale: float,
    window: int,
    cap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """rows [M, kv head, dim] of one sequence, positions [M] (-1: sees nothing) -> same as rows.

    slopes, sinks [M, kv head].
    """
    count, num_kv_heads, head_dim = rows.shape
    tiles = -(-count // QUERY_TILE)
    padded = torch.zeros(tiles * QUERY_TILE, num_kv_heads, head_dim)
    padded[:count] = rows
    q = padded.view(tiles, QUERY_TILE, num_kv_heads, head_dim).transpose(1, 2).contiguous()

    def by_row(x: torch.Tensor) -> torch.Tensor:
        """x [M, kv head] as [tiles, kv head, QUERY_TILE, 1], zeros past M."""
        more = torch.zeros(tiles * QUERY_TILE, num_kv_heads)
        more[:count] = x
        return more.view(tiles, QUERY_TILE, num_kv_heads, 1).transpose(1, 2)

    last = np.full(tiles * QUERY_TILE, -1, dtype=np.int64)  # the last key that each row sees
    last[:count] = positions
    first = np.maximum(0, last - window + 1) if window else np.zeros_like(last)
    first = np.where(last < 0, 0, first)
    first_key = torch.from_numpy(first).view(tiles, 1, QUERY_TILE, 1)
    last_key = torch.from_numpy(last).view(tiles, 1, QUERY_TILE, 1)
    # Key tiles that each query tile reaches: [lowest, highest], empty for a tile of padding.
    seen = (last >= 0).reshape(tiles, QUERY_TILE)
    never = np.iinfo(np.int64).max
    lowest = np.where(seen, first.reshape(seen.shape), never).min(axis=1) // KEY_TILE
    highest = last.reshape(seen.shape).max(axis=1) // KEY_TILE

    maximum = torch.full((tiles, num_kv_heads, QUERY_TILE, 1), -torch.inf)
    total = torch.zeros(tiles, num_kv_heads, QUERY_TILE, 1)
    acc = torch.zeros(tiles, num_kv_heads, QUERY_TILE, head_dim)
    for j in range(int(lowest.min()) if seen.any() else 0, int(highest.max()) + 1):
        reach = np.flatnonzero((lowest <= j) & (highest >= j))
        if not reach.size:
            continue
        some = slice(int(reach[0]), int(reach[-1]) + 1)
        k, v = keys.tile(j)
        score = _products(q[some], k.transpose(1, 2)).mul_(scale)
        if cap:
            score = softcap(score, cap)
        position = torch.arange(j * KEY_TILE, (j + 1) * KEY_TILE)
        if slopes is not None:
            score += by_row(slopes)[some] * (position - last_key[some])
        hidden = (position > last_key[some]) | (position < first_key[some])
        score.masked_fill_(hidden, -torch.inf)
        new_maximum = torch.maximum(maximum[some], score.amax(-1, keepdim=True))
        # Where a row has seen nothing yet both are -inf, and -inf - -inf must not make a NaN.
        base = new_maximum.masked_fill(new_maximum == -torch.inf, 0)
        weight = in_whole_vectors(torch.exp, score.sub_(base))
        keep = in_whole_vectors(torch.exp, maximum[some] - base)
        acc[some] = acc[some] * keep + _products(weight, v)
        total[some] = total[some] * keep + row_sum(weight)
        maximum[some] = new_maximum
    if sinks is not None:
        total += in_whole_vectors(torch.exp, by_row(sinks) - maximum.masked_fill(total == 0, 0))
    out = acc / total.masked_fill(total == 0, 1)  # a row that sees nothing gives zeros
    return out.transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:count]


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [tile, kv head, QUERY_TILE, X] @ b [kv head, X, Y], one batch over kv heads per tile."""
    out = torch.empty(*a.shape[:3], b.shape[2])
    for rows, result in zip(a, out, strict=True):
        torch.bmm(rows, b, out=result)
    return out


def scratch_bytes(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Upper bound of what `attention` allocates for num_tokens tokens, its result included."""
    shared = num_heads // num_kv_heads
    rows = num_tokens * shared + QUERY_TILE
    at_once = min(rows, GROUP_TILES * QUERY_TILE + QUERY_TILE)
    scores = 4 * at_once * num_kv_heads * KEY_TILE
    states = 4 * at_once * num_kv_heads * (head_dim + 8)
    keys = 4 * 2 * KEY_TILE * num_kv_heads * head_dim
    result = 4 * num_tokens * num_heads * head_dim
    return result + 5 * scores + 8 * states + 4 * keys + 64 * num_tokens
