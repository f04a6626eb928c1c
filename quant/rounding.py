"""Rounding a matrix to a grid: integers with a scale and a zero point a group, and FP8 codes.

value = scale (q - zero), q and zero in -2^(bits - 1) .. 2^(bits - 1) - 1, zero 0 of symmetric ones.
A scale is a bfloat16 number, as checkpoints store it, before anything is rounded by it. Of several
grids over a group's range the one of the smallest squared error is kept, each column's counted by
its importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .small_floats import e4m3_values

_SHRINK = np.linspace(1.0, 0.6, 9, dtype=np.float32)  # parts of a group's range
_TINY = np.float32(2.0**-100)  # the scale of a group of zeros
_E4M3 = e4m3_values()[:127]  # of magnitudes, ascending with their code
_E4M3_BETWEEN = (_E4M3[1:] + _E4M3[:-1]) / 2  # exact


@dataclass(frozen=True)
class Integers:
    """A grid: bits (4 or 8), columns a group (-1: a row), and whether zero is always 0."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """How many a row has. Errors: ValueError where they are not whole."""
        size = columns if self.group_size == -1 else self.group_size
        if columns % size:
            raise ValueError(f"rows of {columns} columns are no whole groups of {size}")
        return columns // size


@dataclass(frozen=True, eq=False)
class Rounded:
    """q int8 [N, K]; scale float32 (bfloat16 numbers) and zero int8 [N, G]."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def values(self) -> np.ndarray:
        """float32 [N, K]: what the engine reads them as, exactly."""
        width = self.q.shape[1] // self.scale.shape[1]
        scale, zero = (np.repeat(x, width, axis=1) for x in (self.scale, self.zero))
        return scale * (self.q.astype(np.float32) - zero.astype(np.float32))

    def rows(self, start: int, stop: int) -> Rounded:
        return Rounded(self.q[start:stop], self.scale[start:stop], self.zero[start:stop])


def join(parts: Sequence[Rounded]) -> Rounded:
    """Rows after rows."""
    return Rounded(
        *(np.concatenate([getattr(p, f) for p in parts]) for f in ("q", "scale", "zero"))
    )


def fit(
    values: np.ndarray, grid: Integers, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero [N, G] of the groups of float32 values [N, K], importance [K].

    Errors: ValueError where rows are no whole groups.
    """
    num_rows, columns = values.shape
    x = values.reshape(num_rows, grid.groups(columns), -1)
    weight = np.ones(columns) if importance is None else importance
    weight = weight.astype(np.float32).reshape(1, x.shape[1], -1)
    low, high = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
    if grid.symmetric:
        span = np.maximum(high, -low) / np.float32(grid.high)
    else:
        span = (high - low) / np.float32(grid.high - grid.low)
    unit = np.maximum(span, _TINY)[..., None]  # so that no square overflows
    best = np.full(span.shape, np.inf, np.float32)
    kept_scale, kept_zero = np.zeros_like(span), np.zeros_like(span)
    for shrink in _SHRINK:
        scale = np.maximum(to_bfloat16(span * shrink), _TINY)
        zero = np.zeros_like(scale)
        if not grid.symmetric:
            zero = np.clip(
                np.rint(np.float32(grid.low) - low * shrink / scale), grid.low, grid.high
            )
        q = np.clip(np.rint(x / scale[..., None]) + zero[..., None], grid.low, grid.high)
        wrong = (scale[..., None] * (q - zero[..., None]) - x) / unit
        error = (wrong * wrong * weight).sum(axis=2)
        better = error < best
        best = np.where(better, error, best)
        kept_scale, kept_zero = (
            np.where(better, scale, kept_scale),
            np.where(better, zero, kept_zero),
        )
    return kept_scale, kept_zero.astype(np.int8)


def round_to_nearest(
    values: np.ndarray, grid: Integers, importance: np.ndarray | None = None
) -> Rounded:
    """Every value to the nearest of its group's grid. Errors: ValueError, as `fit`."""
    scale, zero = fit(values, grid, importance)
    width = values.shape[1] // scale.shape[1]
    q = np.rint(values / np.repeat(scale, width, axis=1)) + np.repeat(zero, width, axis=1)
    return Rounded(np.clip(q, grid.low, grid.high).astype(np.int8), scale, zero)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out: np.ndarray = (rounded << np.uint32(16)).view(np.float32)
    return out


def e4m3_codes(values: np.ndarray) -> np.ndarray:
    """uint8 codes of the nearest E4M3 number, ties to the even code; beyond 448 it is 448."""
    size = np.abs(values)
    code = np.searchsorted(_E4M3_BETWEEN, size)
    tie = (code < len(_E4M3_BETWEEN)) & (size == _E4M3_BETWEEN[np.minimum(code, 125)])
    code = np.where(tie & (code % 2 == 1), code + 1, code).astype(np.uint8)
    signed: np.ndarray = np.where(np.signbit(values), code | np.uint8(0x80), code)
    return signed


def fp8_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes [N, K] and a scale a row, float32 [N, 1] (bfloat16 numbers)."""
    scale = _fp8_scale(np.abs(values).max(axis=1, keepdims=True))
    return e4m3_codes(values / scale), scale


def fp8_blocks(values: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes [N, K] and a scale per block x block elements; the last ones may be smaller."""
    num_rows, columns = values.shape
    high, wide = -(-num_rows // block), -(-columns // block)
    padded = np.zeros((high * block, wide * block), np.float32)
    padded[:num_rows, :columns] = values
    largest = np.abs(padded).reshape(high, block, wide, block).max(axis=(1, 3))
    scale = _fp8_scale(largest)
    each = np.repeat(np.repeat(scale, block, axis=0), block, axis=1)[:num_rows, :columns]
    return e4m3_codes(values / each), scale


def _fp8_scale(largest: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.maximum(to_bfloat16(largest / np.float32(448)), _TINY)
    return out


__all__ = [
    "Integers",
    "Rounded",
    "e4m3_codes",
    "fit",
    "fp8_blocks",
    "fp8_rows",
    "join",
    "round_to_nearest",
    "to_bfloat16",
]
