"""Paged attention for packed rows: decoding, chunks and whole prompts by one family of kernels.

Work. An item is some tokens of one sequence; with one kv head it is a tile of rows (token, query
head of that kv head). Keys come in splits of SPLIT at absolute positions: in 16 bits one product of
all of them, in fp32 several of TILE keys each.

Law 2 is the kernels' (attention_kernels.py): how tokens are cut into items, which of them are split
and how many rows stand in a tile changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import triton.language as tl

from ..backend import StepInputs
from .attention_kernels import merge_kernel, split_kernel, walk_kernel
from .cache import KVCache
from .numerics import OPTIONS, next_power_of_two

SPLIT = 128  # keys whose softmax stands alone: what two warpgroups take in one product
NARROW = 16  # rows of a tile that decodes, at least
WIDE = 64  # rows of a longer chunk's tile, at least; half where a card does not load ahead
MIN_PAIRS = 512  # (item, split) pairs that may be computed side by side
SPLIT_PROGRAMS = 1024  # programs that fill a card without splitting
ITEM = 8  # int32 of an item: sequence, first token, tokens, lowest and highest position, pairs
_NO_ITEM = np.array([0, 0, 0, -1, -1, 0, 0, 0], dtype=np.int32)


@dataclass(frozen=True)
class Shape:
    """Heads of an attention layer and the dtype of its products: what decides its tiles."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    product: str  # a key of DTYPE_BYTES
    ahead: bool  # device.loads_ahead
    grouped: bool = False  # whether keys or values are of int4: a tile is fp32 before its product

    @property
    def shared(self) -> int:
        """Query heads of one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded(self) -> int:
        """head_dim as the products take it: a power of two, at least 16."""
        return max(16, next_power_of_two(self.head_dim))

    def rows(self, wide: bool) -> int:
        """Rows of a tile; a token's query heads stay together.

        Two widths only where the sum over keys has one order in both, which the product's layout
        decides: in the tensor cores of NVIDIA's cards (a test reads the compiler's layouts).
        And by registers: a program holds its split's sum and that of the splits before it, and
        before compute capability 9 the operands of its products too.
        """
        tensor_cores = self.product != "float32" and torch.version.hip is None
        least = NARROW
        if wide and tensor_cores and self.padded <= 128:
            least = WIDE if self.ahead and not self.grouped else WIDE // 2
        return max(least, next_power_of_two(self.shared))

    def scratch_bytes(self, num_pairs: int) -> int:
        """What split_kernel stores for so many pairs."""
        return 4 * num_pairs * self.num_kv_heads * self.rows(False) * (self.padded + 2)


def tile(shape: Shape, block_size: int, rows: int) -> dict[str, Any]:
    """The constants of walk_kernel and split_kernel."""
    keys = SPLIT
    if shape.product == "float32":  # by registers: there is no tensor core to share the work
        keys = SPLIT // 4 if shape.padded <= 64 else SPLIT // 8
    return {
        "KV_HEADS": shape.num_kv_heads,
        "SHARED": shape.shared,
        "BLOCK_SIZE": block_size,
        "TILE": keys,
        "SPLIT": SPLIT,
        "ROWS": rows,
        "ITEM": ITEM,
        "D": shape.head_dim,
        "D_PAD": shape.padded,
        "PRODUCT": {
            "float32": tl.float32,
            "bfloat16": tl.bfloat16,
            "float16": tl.float16,
        }[shape.product],
    }


def options(shape: Shape, has_slopes: bool = False) -> dict[str, Any]:
    """Launch options. To load ahead is to load the next split of K and V during a product; it takes
    shared memory and registers that cards before compute capability 9 do not have, nor any for
    heads of more than 128, or beside ALiBi's slopes. No bit depends on it.
    """
    plain = OPTIONS | {"num_stages": 1, "num_warps": 8}
    if shape.product != "float32" and not (shape.grouped or has_slopes):
        ahead = shape.ahead and shape.padded <= 128
        return plain | {"num_stages": 2 if ahead else 1}
    # All that a thread may have: left to choose, NVIDIA's assembler stops at 64 or 128 and spills.
    return plain if torch.version.hip is not None else plain | {"maxnreg": 255}


@dataclass(frozen=True)
class Plan:
    """A step's work list for layers of one number of query heads per kv head; int32 arrays."""

    wide: np.ndarray  # [n, ITEM] tiles of rows(True), walked
    narrow: np.ndarray  # [n, ITEM] tiles of rows(False), walked
    split: np.ndarray  # [n, ITEM] tiles of rows(False), split
    pairs: np.ndarray  # [n, 2] item of `split`, split

    def padded(self, num_items: int, num_pairs: int, table_width: int) -> Plan:
        """The plan of decoding sequences in lists of fixed lengths, filled with what computes and
        stores nothing. Items name the place in a flat table where their sequence's row begins.
        """
        narrow = np.tile(_NO_ITEM, (num_items, 1))
        narrow[: len(self.narrow)] = self.narrow
        narrow[:, 0] *= table_width
        if not num_pairs:
            return Plan(self.wide, narrow, self.split, self.pairs)
        split = np.tile(_NO_ITEM, (num_items + 1, 1))  # the last is what spare pairs belong to
        split[: len(self.split)] = self.split
        split[:, 0] *= table_width
        pairs = np.tile(np.array([num_items, 0], dtype=np.int32), (num_pairs, 1))
        pairs[: len(self.pairs)] = self.pairs
        return Plan(self.wide, narrow, split, pairs)


def scratch_pairs(max_context: int) -> int:
    """Pairs of a step at most: those that are allowed, or the longest sequence's own."""
    return max(MIN_PAIRS, -(-max_context // SPLIT))


def most_pairs(shape: Shape, fewest: int, most: int, max_context: int) -> int:
    """Pairs that `plan` makes at most of `fewest` to `most` decoding sequences of max_context."""
    splits = -(-max_context // SPLIT)
    if fewest * shape.num_kv_heads >= SPLIT_PROGRAMS or splits < 2:
        return 0
    return min(most * splits, max(MIN_PAIRS, splits))


def plan(
    step: StepInputs, shape: Shape, last: np.ndarray, split_programs: int = SPLIT_PROGRAMS
) -> Plan:
    """Cut a step's tokens into items. last [T]: position, -1 for a padding row.

    An item of more than one split is split while pairs are left, longest first, unless there
    are `split_programs` programs without that; the longest is always allowed its own pairs.
    """
    starts = step.query_start.astype(np.int64)
    sequence = np.arange(len(step.seq_len))
    if starts[-1] < len(last):  # padding after the sequences: an item of rows that see nothing
        starts = np.append(starts, len(last))
        sequence = np.append(sequence, 0)
    counts = np.diff(starts)
    narrow_tokens = shape.rows(False) // shape.shared
    wide_tokens = shape.rows(True) // shape.shared
    is_wide = counts > narrow_tokens
    size = np.where(is_wide, wide_tokens, narrow_tokens)
    tiles = -(-counts // size)
    owner = np.repeat(np.arange(len(counts)), tiles)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = starts[owner] + index * size[owner]
    items = np.zeros((len(owner), ITEM), dtype=np.int32)
    if not len(owner):
        return Plan(items, items, items, np.zeros((0, 2), np.int32))
    items[:, 0] = sequence[owner]
    items[:, 1] = first
    items[:, 2] = np.minimum(size[owner], starts[owner + 1] - first)
    never = np.iinfo(np.int32).max
    items[:, 3] = np.minimum.reduceat(np.where(last < 0, never, last), first)
    items[:, 4] = np.maximum.reduceat(last, first)
    items[items[:, 4] < 0, 3] = -1
    wide, narrow = items[is_wide[owner]], items[~is_wide[owner]]
    # Longest first: the last programs to start are then the shortest.
    wide = wide[np.argsort(-wide[:, 4], kind="stable")]
    narrow = narrow[np.argsort(-narrow[:, 4], kind="stable")]
    splits = (narrow[:, 4] + SPLIT) // SPLIT
    ends = np.cumsum(splits)
    allowed = max(MIN_PAIRS, int(splits[0])) if len(splits) else 0
    chosen = int(np.count_nonzero((ends <= allowed) & (splits > 1)))
    if (len(narrow) + len(wide)) * shape.num_kv_heads >= split_programs:
        chosen = 0
    split, narrow, splits = narrow[:chosen], narrow[chosen:], splits[:chosen]
    split[:, 5] = np.cumsum(splits) - splits
    split[:, 6] = splits
    item_of = np.repeat(np.arange(chosen), splits)
    pairs = np.stack([item_of, np.arange(len(item_of)) - split[item_of, 5]], axis=1)
    return Plan(wide, narrow, split, pairs.astype(np.int32))


@dataclass(frozen=True)
class DevicePlan:
    """A Plan in device memory, with what the kernels read beside it."""

    wide: torch.Tensor
    narrow: torch.Tensor
    split: torch.Tensor
    pairs: torch.Tensor
    position: torch.Tensor  # [T] -1 for padding rows
    table: torch.Tensor  # [S, max_blocks]


class Scratch:
    """What split_kernel stores; grows to the most pairs met."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def parts(self, shape: Shape, num_pairs: int) -> tuple[torch.Tensor, ...]:
        """acc, top and total of num_pairs pairs, flat."""
        rows = num_pairs * shape.num_kv_heads * shape.rows(False)
        if self._buffer.numel() < rows * (shape.padded + 2):
            device = self._buffer.device
            self._buffer = torch.empty(0, device=device)  # the old one goes before the new comes
            self._buffer = torch.empty(
                rows * (shape.padded + 2), dtype=torch.float32, device=device
            )
        return tuple(
            self._buffer[: rows * (shape.padded + 2)].split(  # type: ignore[no-untyped-call]
                [rows * shape.padded, rows, rows]
            )
        )


def launch(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: KVCache,
    work: DevicePlan,
    scratch: Scratch,
    shape: Shape,
    *,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """See ops.attention.  q, out [T, num_heads*head_dim], slopes, sinks fp32 [num_heads]."""
    more = options(shape, slopes is not None)
    places = (work.table.stride(0), cache.spec.num_layers, layer, scale, softcap or 1.0, window)
    flags: dict[str, Any] = dict(zip(("K_CODES", "V_CODES"), cache.codes, strict=True))
    flags |= {"HAS_CAP": softcap > 0, "HAS_WINDOW": window > 0, "HAS_SLOPES": slopes is not None}
    # What is absent is not read: any tensor stands for it.
    slope = work.position if slopes is None else slopes
    sink = work.position if sinks is None else sinks
    for items, wide in ((work.wide, True), (work.narrow, False)):
        if len(items):
            walk_kernel[(len(items), shape.num_kv_heads)](
                q,
                out,
                *cache.pointers,
                slope,
                sink,
                items,
                work.position,
                work.table,
                q.stride(0),
                out.stride(0),
                *places,
                **tile(shape, cache.spec.block_size, shape.rows(wide)),
                **flags,
                HAS_SINKS=sinks is not None,
                **more,
            )
    if len(work.pairs):
        rows = shape.rows(False)
        constants = tile(shape, cache.spec.block_size, rows)
        parts = scratch.parts(shape, len(work.pairs))
        split_kernel[(len(work.pairs), shape.num_kv_heads)](
            q,
            *parts,
            *cache.pointers,
            slope,
            work.split,
            work.pairs,
            work.position,
            work.table,
            q.stride(0),
            *places,
            **constants,
            **flags,
            **more,
        )
        kept = ("KV_HEADS", "SHARED", "ROWS", "ITEM", "D", "D_PAD")
        merge_kernel[(len(work.split), shape.num_kv_heads)](
            out,
            sink,
            *parts,
            work.split,
            work.position,
            out.stride(0),
            **{name: constants[name] for name in kept},
            HAS_SINKS=sinks is not None,
            **OPTIONS,
        )
