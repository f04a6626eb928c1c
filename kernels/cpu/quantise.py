"""Rows in the format that a backend holds them in, a tensor at a time: called as it packs."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..weights import BF16, SMALL_FLOATS, Format, RawWeight, WeightTooLarge
from . import _native


def as_packed(weight: RawWeight, threads: int) -> RawWeight:
    """The weight in the format it is to be packed in: itself, or its rows made or quantised anew.

    Errors: WeightTooLarge for a value that is a NaN, an infinity, or 2^120 and more.
    """
    weight = weight.made()
    if weight.pack_as is None:
        return weight
    data = np.empty(weight.packed_nbytes, np.uint8)
    columns = weight.shape[-1]
    row = _native.quantise(
        weight.format.name,
        weight.data.view(np.ndarray),
        weight.num_rows,
        columns,
        weight.pack_as.name,
        data,
        threads,
    )
    if row >= 0:
        raise WeightTooLarge(
            weight.name,
            f"tensor {weight.name!r}: row {row} holds a NaN, an infinity or 2^120 and more, which "
            f"{weight.pack_as.name} cannot; load it with quantization=None, or mend the checkpoint",
        )
    return dataclasses.replace(weight, format=weight.pack_as, buffers={"data": data}, pack_as=None)


def tiles_format(weight: RawWeight) -> Format:
    """The format of a weight's tiles: its packed format, or bf16 of those that have no kernels."""
    small = weight.packed_format.name in SMALL_FLOATS
    return BF16 if small else weight.packed_format


def as_tiles(weight: RawWeight, threads: int) -> RawWeight:
    """The weight in `tiles_format`: as_packed, or its values rounded to bf16, to nearest even."""
    weight = as_packed(weight, threads)
    if tiles_format(weight) is weight.format:
        return weight
    data = np.empty((weight.num_rows, weight.shape[-1]), np.uint16)
    chunk = max(1, _CHUNK // weight.shape[-1])
    values = np.empty(chunk * weight.shape[-1], np.float32)
    for start in range(0, weight.num_rows, chunk):
        rows = weight.rows(start, min(start + chunk, weight.num_rows))
        part = values[: rows.num_rows * rows.shape[-1]]
        _native.dequantise(rows.format.name, rows.data.view(np.ndarray), part, rows.shape[-1])
        data[start : start + rows.num_rows] = _bf16(part).reshape(rows.shape)
    return dataclasses.replace(
        weight, format=BF16, buffers={"data": data.reshape(-1).view(np.uint8)}
    )


_CHUNK = 1 << 18  # elements that are rounded at a time: they stay in the cache


def _bf16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bf16; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
