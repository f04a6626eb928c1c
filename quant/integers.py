"""INT8 and INT4, the formats of quantising on load: what they mean and how they are chosen.

Readable numpy, the specification. Products and sums are float32, one rounding each, in the order
written here; kernels/cpu/quantise.cpp gives the same bytes.

INT8: d * q per row, q in -127..127, d the row's largest magnitude / 127.
INT4: (d * scale) * u - (dmin * minimum) per group of 32, u in 0..15; scale and minimum are bytes, d
and dmin floats of the row. A value of 0 is within a group's range: its minimum is 0 or negative.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

import numpy as np

from ..kernels.weights import INT4, INT8
from .gguf import row_dtype

_GROUP = 32
_GRIDS = 21  # of 14.0, 14.1, .. 16.0 levels over a group's range
_SPREAD = np.float32(2.0**-14)  # levels that vary less give no fit that means anything
_LIMIT = 2.0**120  # below it nothing that is made of a value overflows
_TINY = np.float32(2.0**-126)  # a scale below it would not be exact


def quantise_int8(values: np.ndarray) -> bytes:
    """Rows of INT8 from float32 values [N, K] below 2^120, K whole groups of 32.

    A value is off by at most d / 2 (and its rounding); a row below 127 * 2^-126 becomes zeros.
    Errors: ValueError for another shape, or a value that is larger or a NaN.
    """
    values = _checked(values)
    rows = np.zeros(len(values), row_dtype(INT8, values.shape[1]))
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    d[d < _TINY] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(d > 0, np.clip(np.rint(values / d), -127, 127), np.float32(0))
    rows["d"] = d
    rows["blocks"]["quants"] = q.reshape(len(values), -1, 32)
    return rows.tobytes()


def quantise_int4(values: np.ndarray) -> bytes:
    """Rows of INT4 from float32 values [N, K] below 2^120, K whole groups of 32.

    Rows are first brought to magnitudes around 1 by a power of two, so that no square overflows.
    Errors: ValueError for another shape, or a value that is larger or a NaN.
    """
    values = _checked(values)
    num_rows, columns = values.shape
    rows = np.zeros(num_rows, row_dtype(INT4, columns))
    exponent = np.maximum(np.frexp(np.abs(values).max(axis=1, keepdims=True))[1], -126)
    up, down = np.ldexp(np.float32(1), exponent), np.ldexp(np.float32(1), -exponent)
    x = (values * down).reshape(num_rows, -1, _GROUP)
    scale, minimum = _search(x)
    d = scale.max(axis=1, keepdims=True) / np.float32(255)
    dmin = minimum.max(axis=1, keepdims=True) / np.float32(255)
    rows["d"], rows["dmin"] = d * up, dmin * up
    with np.errstate(divide="ignore", invalid="ignore"):
        sc = np.where(d > 0, np.clip(np.rint(scale / d), 0, 255), np.float32(0))
        mn = np.where(dmin > 0, np.clip(np.rint(minimum / dmin), 0, 255), np.float32(0))
        step, low = (d * sc)[..., None], (dmin * mn)[..., None]
        u = np.where(step > 0, np.clip(np.rint((x + low) / step), 0, 15), np.float32(0))
    u = u.astype(np.uint8)
    blocks = rows["blocks"]
    blocks["scale"], blocks["minimum"] = sc[..., None], mn[..., None]
    blocks["nibbles"] = u[..., :16] | (u[..., 16:] << np.uint8(4))
    return rows.tobytes()


def _search(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and (negated) minimum of groups x [N, G, 32], |x| <= 1: float32 [N, G] each.

    Of several grids over a group's range, each rounds the values to levels l; weighted least
    squares then fits scale * l + minimum, and the fit that leaves the smallest error is kept. A
    minimum above 0 is taken as 0. A value's weight is its magnitude and the group's root mean
    square: what is large moves the product more. After the search of ggml's k-quants (MIT).
    """
    low = np.minimum(x.min(axis=2), np.float32(0))
    span = x.max(axis=2) - low
    weight = np.sqrt(_sum(x * x) / np.float32(32))[..., None] + np.abs(x)
    sw, sx = _sum(weight), _sum(weight * x)
    scale, minimum, best = span / np.float32(15), low, np.full_like(low, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(_GRIDS):
            levels = np.float32(14) + np.float32(i) / np.float32(10)
            inverse = np.where(span > 0, levels / span, np.float32(0))
            level = np.clip(np.rint(inverse[..., None] * (x - low[..., None])), 0, 15)
            wl = weight * level
            sl, sll, sxl = _sum(wl), _sum(wl * level), _sum(wl * x)
            det = sw * sll - sl * sl
            m = (sll * sx - sl * sxl) / det
            s = np.where(m > 0, sxl / sll, (sw * sxl - sx * sl) / det)
            m = np.where(m > 0, np.float32(0), m)
            gain = s * sxl + m * sx  # of the squared error: sum w x^2 less it
            better = (det > _SPREAD * (sw * sll)) & (s > 0) & (gain > best)
            scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
            best = np.where(better, gain, best)
    return scale, np.float32(0) - minimum


def _sum(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in ascending order: numpy's own sum has an order of its own."""
    total = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):
        total = total + x[..., i]
    return total


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or values.shape[1] % _GROUP or not values.size:
        raise ValueError(
            f"rows of whole groups of {_GROUP} are quantised; the values have shape "
            f"{list(values.shape)}"
        )
    fits = (np.abs(values) < _LIMIT).all(axis=1)  # a NaN is not below it
    if not fits.all():
        row = int(np.flatnonzero(~fits)[0])
        raise ValueError(f"row {row} holds a NaN, an infinity or 2^120 and more")
    return values


def int8_values(rows: np.ndarray) -> np.ndarray:
    """float32 [N, K] of rows [N] of `row_dtype(INT8, K)`."""
    return rows["d"] * rows["blocks"]["quants"].reshape(len(rows), -1).astype(np.float32)


def int4_values(rows: np.ndarray) -> np.ndarray:
    """float32 [N, K] of rows [N] of `row_dtype(INT4, K)`."""
    blocks = rows["blocks"]
    scale = rows["d"][..., None] * blocks["scale"].astype(np.float32)
    minimum = rows["dmin"][..., None] * blocks["minimum"].astype(np.float32)
    low, high = blocks["nibbles"] & np.uint8(15), blocks["nibbles"] >> np.uint8(4)
    u = np.concatenate([low, high], axis=2).astype(np.float32)
    return (scale * u - minimum).reshape(len(rows), -1)


__all__ = ["int4_values", "int8_values", "quantise_int4", "quantise_int8"]
