"""The reference of linear and embedding: weights stay as they came, dequantised tile by tile.

Law 2: a product's rows change with the number of rows that torch multiplies at once, so every
product has exactly ROW_TILE rows, the last ones zero-padded; and a weight is cut into tiles of rows
by its own shape alone. Which thread computes a tile does not matter, each torch call being
single-threaded. Every format, fp32 too, passes through an aligned scratch tile, so that a row's
bits do not depend on where a file was mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..cpu import _native
from ..cpu.quantise import as_packed
from ..weights import RawWeight, WeightGroup

ROW_TILE = 16  # rows of activations in one product
_TILE_BYTES = 256 * 1024  # of dequantised weight: half of a common L2, the rest is for activations


@dataclass(frozen=True, eq=False, slots=True)
class _Tile:
    """Rows [start, stop) of a packed weight, all of one format, and their bytes."""

    format: str
    raw: np.ndarray
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 2-D weight [N, K]: the checkpoint's own bytes, to be dequantised tile by tile."""

    name: str
    parts: tuple[RawWeight, ...]
    shape: tuple[int, int]

    @property
    def columns(self) -> np.ndarray | None:
        """Which column of the input each of its columns multiplies (RawWeight.columns)."""
        return self.parts[0].columns

    @cached_property
    def tiles(self) -> tuple[_Tile, ...]:
        """The weight cut into tiles, in row order; a function of the shapes and formats alone."""
        out, base = [], 0
        step = tile_rows(self.shape[1])
        for part in self.parts:
            data = part.data.view(np.ndarray)  # slicing a np.memmap is ten times slower
            for start in range(0, part.shape[0], step):
                stop = min(start + step, part.shape[0])
                raw = data[start * part.row_bytes : stop * part.row_bytes]
                out.append(_Tile(part.format.name, raw, base + start, base + stop))
            base += part.shape[0]
        return tuple(out)


def tile_rows(num_columns: int) -> int:
    """Rows of a weight tile for rows of num_columns: whole ROW_TILEs within _TILE_BYTES, or one."""
    return max(1, _TILE_BYTES // (4 * num_columns * ROW_TILE)) * ROW_TILE


def by_expert(weight: PackedWeight, num_experts: int) -> tuple[PackedWeight, ...]:
    """The weights of the experts, each of the same number of rows of `weight`."""
    rows, width = weight.shape[0] // num_experts, weight.shape[1]
    whole = WeightGroup(weight.parts)
    return tuple(
        PackedWeight(f"{weight.name}, expert {e}", group.parts, (rows, width))
        for e, group in enumerate(whole.split(num_experts))
    )


def pack(weight: RawWeight | WeightGroup, threads: int = 1) -> PackedWeight | torch.Tensor:
    """2-D: keep the bytes, or quantise them. 1-D (norms, biases): an fp32 tensor.

    Errors: ValueError otherwise, and for what cannot be quantised.
    """
    parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
    name = "+".join(p.name for p in parts)
    if len(weight.shape) == 1:
        return torch.cat([_dequantised(p) for p in parts])
    if len(weight.shape) != 2:
        raise ValueError(
            f"weight {name!r} has shape {list(weight.shape)}; the reference backend packs weights "
            "of one dimension (norms, biases) or two (matrices)"
        )
    parts = tuple(as_packed(part, threads) for part in parts)
    return PackedWeight(name, parts, (weight.shape[0], weight.shape[1]))


def _dequantised(part: RawWeight) -> torch.Tensor:
    part = part.made()
    out = torch.empty(part.shape)
    _native.dequantise(part.format.name, part.data, out.view(-1).numpy())
    return out


def embedding(table: PackedWeight, token_ids: np.ndarray) -> torch.Tensor:
    """See ops.embedding. Returns fp32 [T, H]. Errors: ValueError for an id outside the table."""
    num_rows, width = table.shape
    if table.columns is not None:
        raise ValueError(f"table {table.name!r} has its columns in another order")
    if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < num_rows):
        raise ValueError(
            f"token ids {token_ids.min()} .. {token_ids.max()} do not all lie in the "
            f"{num_rows} rows of {table.name!r}"
        )
    out = torch.empty(len(token_ids), width)
    base = 0
    for part in table.parts:
        here = np.flatnonzero((token_ids >= base) & (token_ids < base + part.shape[0]))
        if here.size:
            raw = part.data.reshape(part.shape[0], part.row_bytes)[token_ids[here] - base]
            rows = np.empty((here.size, width), dtype=np.float32)
            _native.dequantise(part.format.name, raw.reshape(-1), rows.reshape(-1), width)
            out[torch.from_numpy(here)] = torch.from_numpy(rows)
        base += part.shape[0]
    return out


class _Scratch:
    """One worker's tile of dequantised weight and, for one of odd height, its product."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._shape = (0, 0)  # of the views made last

    def tile(self, rows: int, columns: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """The tile as a flat array and as a matrix [rows, columns]; a product [rows, ROW_TILE]."""
        if self._shape != (rows, columns):
            size, product_size = rows * columns, rows * ROW_TILE
            if self._buffer.numel() < size + product_size:
                self._buffer = torch.empty(size + product_size)
            weight = self._buffer[:size]
            product = self._buffer[size : size + product_size]
            self._views = weight.numpy(), weight.view(rows, columns), product.view(rows, ROW_TILE)
            self._shape = (rows, columns)
        return self._views


def scratch_bytes(num_columns: int) -> int:
    """Bytes that one worker's scratch takes for weights of rows of num_columns."""
    return 4 * tile_rows(num_columns) * (num_columns + ROW_TILE)


class Workers:
    """Threads that share out the tiles of a product; the calling thread is the first of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scratch = [_Scratch() for _ in range(count)]
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            # Each sets torch's threads for itself, when it starts: inside a step.
            self._pool = ThreadPoolExecutor(
                count - 1, "engineroom-reference", torch.set_num_threads, (1,)
            )

    def run(self, job: Callable[[_Scratch, int, int], None], num_tiles: int) -> None:
        """Call job(scratch, first, step) once per worker; worker i takes tiles i, i + step, ..."""
        step = min(self.count, num_tiles)
        if self._pool is None or step < 2:
            job(self._scratch[0], 0, 1)
            return
        others = [self._pool.submit(job, self._scratch[i], i, step) for i in range(1, step)]
        try:
            job(self._scratch[0], 0, step)
        finally:
            for other in others:
                other.result()


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, workers: Workers
) -> torch.Tensor:
    """See ops.linear.  x fp32 [M, K] -> fp32 [M, N]."""
    if weight.columns is not None:
        x = x[:, torch.from_numpy(weight.columns)]
    num_rows, num_columns = x.shape
    row_tiles = -(-num_rows // ROW_TILE)
    padded = torch.zeros(row_tiles * ROW_TILE, num_columns)
    padded[:num_rows] = x
    # [row tile, K, ROW_TILE] and [row tile, N, ROW_TILE]: a weight tile's product is contiguous.
    inputs = padded.view(row_tiles, ROW_TILE, num_columns).transpose(1, 2).contiguous()
    out = torch.empty(row_tiles, weight.shape[0], ROW_TILE)
    pairs = list(zip(inputs, out, strict=True))

    def multiply(scratch: _Scratch, first: int, step: int) -> None:
        for tile in weight.tiles[first::step]:
            count = tile.stop - tile.start
            # A tile of odd height multiplies whatever lies beyond its rows, and that is cut off.
            height = -(-count // ROW_TILE) * ROW_TILE
            flat, matrix, product = scratch.tile(height, num_columns)
            _native.dequantise(tile.format, tile.raw, flat[: count * num_columns], num_columns)
            if count == height:
                for rows, result in pairs:
                    torch.mm(matrix, rows, out=result[tile.start : tile.stop])
                continue
            for rows, result in pairs:
                torch.mm(matrix, rows, out=product)
                result[tile.start : tile.stop] = product[:count]

    if row_tiles:
        workers.run(multiply, len(weight.tiles))
    result = out.transpose(1, 2).reshape(-1, weight.shape[0])[:num_rows]
    return result if bias is None else result + bias
