"""Making Q8_0, Q4_0, Q4_K and Q6_K blocks, each column's error counted by its importance.

What the blocks mean is gguf.py's. The searches follow the idea of ggml's (MIT): several grids over
a group's range, least squares for the scale (and minimum) of the levels that each gives, and the
fit of the smallest weighted error kept. In k-quants a group's scale is an integer times a float of
its block: in turns each group takes the integers near its own that leave the smallest error, and
the block the floats that fit them by least squares.
"""

# mypy: no-warn-return-any
# (numpy types what is computed from float32 arrays and Python numbers as Any)

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..kernels.weights import Q4_0, Q4_K, Q6_K, Q8_0, Format
from .gguf import block_dtype

_TINY = np.float32(1e-30)
_TURNS = 3


def quantise_ggml(values: np.ndarray, fmt: Format, importance: np.ndarray | None = None) -> bytes:
    """Rows of blocks from float32 values [N, K], importance [K].

    Errors: ValueError where rows are no whole blocks, or hold what is not finite.
    """
    num_rows, columns = values.shape
    fmt.row_bytes(columns)
    if not np.isfinite(values).all():
        raise ValueError("the values hold a NaN or an infinity")
    x = values.reshape(-1, fmt.block_elements)
    weight = np.ones(columns)
    if importance is not None and importance.any():
        weight = importance / importance.mean() + 1e-3
    per_row = weight.astype(np.float32).reshape(-1, fmt.block_elements)
    w = np.broadcast_to(per_row, (num_rows, *per_row.shape)).reshape(x.shape)
    return _MAKERS[fmt.name](x, w).tobytes()


def _q8_0(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(x), block_dtype(Q8_0))
    d = _half(np.abs(x).max(axis=1, keepdims=True) / np.float32(127))
    blocks["d"], blocks["quants"] = d, np.clip(_divide(x, d), -128, 127)
    return blocks


def _q4_0(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(x), block_dtype(Q4_0))
    weight = w * _size(x)
    d = _half(_symmetric(x, weight, 8))
    for _ in range(_TURNS):
        q = np.clip(_divide(x, d), -8, 7)
        wq = weight * q
        d = _refitted(d, wq * x, wq * q)
    u = (np.clip(_divide(x, d), -8, 7) + 8).astype(np.uint8)
    blocks["d"], blocks["nibbles"] = d, u[:, :16] | (u[:, 16:] << np.uint8(4))
    return blocks


def _q6_k(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(x), block_dtype(Q6_K))
    groups, weight = x.reshape(-1, 16), (w * _size(x)).reshape(-1, 16)
    scale = _symmetric(groups, weight, 32).reshape(-1, 16)
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    d = _half(extreme / np.float32(-128))
    sc = np.clip(_divide(scale, d), -128, 127)
    for _ in range(_TURNS):
        tried = [np.clip(sc + change, -128, 127) for change in (0, -1, 1)]
        steps = [(d * s).reshape(-1, 1) for s in tried]
        levels = [np.clip(_divide(groups, step), -32, 31) for step in steps]
        best = _least(groups, weight, [step * q for step, q in zip(steps, levels, strict=True)])
        sc = np.choose(best.reshape(sc.shape), tried)
        y = sc.reshape(-1, 1) * np.choose(best[:, None], levels)
        wy = weight * y
        d = _refitted(d, (wy * groups).reshape(x.shape), (wy * y).reshape(x.shape))
    step = (d * sc).reshape(-1, 1)
    q = (np.clip(_divide(groups, step), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 128)
    low, high = q & np.uint8(15), (q >> np.uint8(4)).reshape(-1, 2, 4, 32)
    blocks["d"], blocks["scales"] = d, sc
    packed = low[..., :64] | (low[..., 64:] << np.uint8(4))
    blocks["low_nibbles"] = packed.reshape(-1, 128)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    blocks["high_bits"] = np.bitwise_or.reduce(high << shift, axis=2).reshape(-1, 64)
    return blocks


def _q4_k(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(x), block_dtype(Q4_K))
    groups, weight = x.reshape(-1, 32), (w * _size(x)).reshape(-1, 32)
    scale, minimum = _asymmetric(groups, weight)
    scale, minimum = scale.reshape(-1, 8), minimum.reshape(-1, 8)
    d = _half(scale.max(axis=1, keepdims=True) / np.float32(63))
    dmin = _half(minimum.max(axis=1, keepdims=True) / np.float32(63))
    sc, mn = np.clip(_divide(scale, d), 0, 63), np.clip(_divide(minimum, dmin), 0, 63)
    for _ in range(_TURNS):
        sc, mn, q = _near_integers(groups, weight, sc, mn, d, dmin)
        d, dmin = _floats_of_block(x, weight.reshape(x.shape), sc, mn, q, d, dmin)
    sc, mn = sc.astype(np.uint8), mn.astype(np.uint8)
    step, low = (d * sc).reshape(-1, 1), (dmin * mn).reshape(-1, 1)
    u = np.clip(_divide(groups + low, step), 0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    blocks["d"], blocks["dmin"] = d, dmin
    blocks["nibbles"] = (u[:, :, 0] | (u[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    four, two = np.uint8(15), np.uint8(4)
    blocks["scales"] = np.concatenate(
        [
            sc[:, :4] | ((sc[:, 4:] >> two) << np.uint8(6)),
            mn[:, :4] | ((mn[:, 4:] >> two) << np.uint8(6)),
            (sc[:, 4:] & four) | ((mn[:, 4:] & four) << two),
        ],
        axis=1,
    )
    return blocks


def _refitted(d: np.ndarray, wyx: np.ndarray, wyy: np.ndarray) -> np.ndarray:
    """The float [n, 1] by which y comes nearest to x; d where all that counts is zero."""
    sxy, syy = wyx.sum(1, keepdims=True), wyy.sum(1, keepdims=True)
    return np.where(syy > 0, _half(_over(sxy, syy)), d)


def _near_integers(
    x: np.ndarray, w: np.ndarray, sc: np.ndarray, mn: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group [n * 8, 32] the scale and minimum [n, 8] within one of these that leave the
    smallest error, and its levels."""
    pairs = [
        (np.clip(sc + i, 0, 63), np.clip(mn + j, 0, 63)) for i in (0, -1, 1) for j in (0, -1, 1)
    ]
    kept = np.full((len(x), 1), np.inf, np.float32)
    best, levels = np.zeros(len(x), np.intp), np.zeros_like(x)
    for i, (scale, minimum) in enumerate(pairs):
        step, low = (d * scale).reshape(-1, 1), (dmin * minimum).reshape(-1, 1)
        q = np.clip(_divide(x + low, step), 0, 15)
        error = _error(x, w, step * q - low)
        better = error < kept
        kept, levels = np.where(better, error, kept), np.where(better, q, levels)
        best[better[:, 0]] = i
    at = best.reshape(sc.shape)
    return np.choose(at, [s for s, _ in pairs]), np.choose(at, [m for _, m in pairs]), levels


def _floats_of_block(
    x: np.ndarray,
    w: np.ndarray,
    sc: np.ndarray,
    mn: np.ndarray,
    q: np.ndarray,
    d: np.ndarray,
    dmin: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """d and dmin [n, 1] of blocks [n, 256] by least squares, for levels q of these integers;
    those that are given where the fit has another sign."""
    y = (sc.reshape(-1, 1) * q).reshape(x.shape)
    z = -np.repeat(mn, 32, axis=1)
    wy, wz = w * y, w * z
    syy, syz, szz, sxy, sxz = (
        t.sum(1, keepdims=True) for t in (wy * y, wy * z, wz * z, wy * x, wz * x)
    )
    det = syy * szz - syz * syz
    found = _half(_over(szz * sxy - syz * sxz, det)), _half(_over(syy * sxz - syz * sxy, det))
    fits = (found[0] > 0) & (found[1] > 0)
    return np.where(fits, found[0], d), np.where(fits, found[1], dmin)


def _least(x: np.ndarray, w: np.ndarray, made: list[np.ndarray]) -> np.ndarray:
    """Which of these is nearest to each group."""
    return np.concatenate([_error(x, w, values) for values in made], axis=1).argmin(axis=1)


def _error(x: np.ndarray, w: np.ndarray, made: np.ndarray) -> np.ndarray:
    wrong = made - x
    return (w * wrong * wrong).sum(axis=1, keepdims=True)


def _symmetric(x: np.ndarray, w: np.ndarray, half: int) -> np.ndarray:
    """Scale [n, 1] of groups [n, k] for levels -half .. half - 1; its sign gives -half to what is
    largest."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    kept = extreme / np.float32(-half)
    best = np.full(kept.shape, -np.inf, np.float32)
    for step in range(-9, 10):
        q = np.clip(_divide(x, extreme / np.float32(-half - 0.1 * step)), -half, half - 1)
        wq = w * q
        sxq, sqq = (wq * x).sum(1, keepdims=True), (wq * q).sum(1, keepdims=True)
        gain = _over(sxq * sxq, sqq)  # of the squared error: sum w x^2 less it
        better = gain > best
        kept, best = np.where(better, _over(sxq, sqq), kept), np.where(better, gain, best)
    return kept


def _asymmetric(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and negated minimum [n, 1], both at least 0, of groups [n, k] for levels 0 .. 15."""
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    span = x.max(axis=1, keepdims=True) - low
    sw, sx = w.sum(1, keepdims=True), (w * x).sum(1, keepdims=True)
    scale, minimum = span / np.float32(15), -low
    best = np.full(scale.shape, np.inf, np.float32)
    for step in range(21):
        q = np.clip(_divide(x - low, span / np.float32(14 + 0.1 * step)), 0, 15)
        wq = w * q
        sq, sqq, sxq = (t.sum(1, keepdims=True) for t in (wq, wq * q, wq * x))
        det = sw * sqq - sq * sq
        m = np.minimum(_over(sqq * sx - sq * sxq, det), 0)
        s = np.where(m < 0, _over(sw * sxq - sx * sq, det), _over(sxq, sqq))
        wrong = s * q + m - x
        error = (w * wrong * wrong).sum(1, keepdims=True)
        better = (s > 0) & (error < best)
        scale, minimum = np.where(better, s, scale), np.where(better, -m, minimum)
        best = np.where(better, error, best)
    return scale, minimum


def _size(x: np.ndarray) -> np.ndarray:
    """What a value counts beside its column's importance: large ones move a product more."""
    size: np.ndarray = np.sqrt((x * x).mean(axis=1, keepdims=True) + x * x) + _TINY
    return size


def _half(x: np.ndarray) -> np.ndarray:
    """float32 rounded to float16, as blocks store scales."""
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _divide(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """x in whole steps, 0 where a step is 0."""
    step = np.broadcast_to(step, x.shape)
    return np.rint(np.divide(x, step, out=np.zeros_like(x), where=step != 0))


_MAKERS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}

__all__ = ["quantise_ggml"]
