"""GPTQ and AWQ: rounding that counts what a layer's inputs are, from their second moments.

GPTQ: Frantar et al. 2022 (arXiv:2210.17323). AWQ: Lin et al. 2023 (arXiv:2306.00978). Both make a
linear layer's error on the calibration inputs X small: the trace of D H D^T, D what rounding moved
the weights by and H = X^T X. numpy only; the inputs come from running the model
(engine/tools/calibration.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .rounding import Integers, Rounded, fit, round_to_nearest, to_bfloat16

_DAMP = 0.01  # of the mean of H's diagonal, added to it: GPTQ's own default
_BLOCK = 128  # columns between two updates of all that follow
_STEPS = 10  # AWQ's exponents: 0, 0.1 .. 1


def relative_error(values: np.ndarray, made: np.ndarray, hessian: np.ndarray) -> float:
    """Of the layer's output over the calibration inputs: |X (W - W')^T|^2 / |X W^T|^2."""
    h = hessian.astype(np.float32)
    whole = energy(values, h)
    return energy(values - made, h) / whole if whole > 0 else 0.0


def energy(values: np.ndarray, hessian: np.ndarray) -> float:
    """|X W^T|^2 of float32 values W [N, K], hessian float32 X^T X [K, K]."""
    return float(np.vdot(values @ hessian, values))


@dataclass(frozen=True, eq=False)
class Factor:
    """What GPTQ needs of a hessian [K, K]: its diagonal, the order that columns are taken in, and
    the upper Cholesky factor of its damped inverse in that order, float32."""

    second: np.ndarray
    order: np.ndarray
    upper: np.ndarray

    @classmethod
    def of(cls, hessian: np.ndarray) -> Factor:
        second = np.diag(hessian).copy()
        order = np.argsort(-second, kind="stable")
        return cls(second, order, _inverse_factor(hessian, order))


def gptq(values: np.ndarray, factor: Factor, grid: Integers) -> Rounded:
    """Round float32 values [N, K] column by column, making up for each in those that follow.

    Rows do not see each other. Scales are settled before (by the columns' second moments), and
    columns are taken by descending second moment: act-order whose groups stay where they were, so
    that the checkpoint needs no order of its own. A column that is never other than 0 becomes 0.

    Errors: ValueError where rows are no whole groups.
    """
    second, order, upper = factor.second, factor.order, factor.upper
    w = np.where(second > 0, values, np.float32(0))
    scale, zero = fit(w, grid, second)
    width = w.shape[1] // scale.shape[1]
    left = np.ascontiguousarray(w.T[order])  # [K, N]: a column is contiguous
    q = np.empty(left.shape, np.int8)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            group = order[i] // width
            s, z = scale[:, group], zero[:, group].astype(np.float32)
            code = np.clip(np.rint(left[i] / s) + z, grid.low, grid.high)
            error = (left[i] - s * (code - z)) / upper[i, i]
            left[i:stop] -= upper[i, i:stop, None] * error
            q[i], errors[i - start] = code, error
        left[stop:] -= upper[start:stop, stop:].T @ errors
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Rounded(np.ascontiguousarray(q[back].T), scale, zero)


def _inverse_factor(hessian: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of H^-1, columns in `order`, float32."""
    # H^-1 = U^T U with U upper: of the matrix turned end for end, the lower factor's inverse.
    h = hessian[np.ix_(order[::-1], order[::-1])]
    diagonal = np.diag(h).copy()
    damp = _DAMP * diagonal.mean() or 1.0
    h[np.diag_indices_from(h)] = np.where(diagonal > 0, diagonal, 1.0) + damp
    _factor_lower(h)
    _invert_lower(h)
    return np.ascontiguousarray(h[::-1, ::-1], np.float32)


def _factor_lower(h: np.ndarray) -> None:
    """A positive definite matrix becomes its lower Cholesky factor, where it is."""
    for i in range(len(h)):
        h[i, i + 1 :] = 0
    for start in range(0, len(h), _BLOCK):
        here = slice(start, start + _BLOCK)
        corner, below = h[here, here], h[start + _BLOCK :, here]
        corner[:] = np.linalg.cholesky(corner)
        below[:] = below @ np.linalg.inv(corner).T
        for at in range(start + _BLOCK, len(h), _BLOCK):
            strip = h[at:, here] @ h[at : at + _BLOCK, here].T
            square = h[at : at + _BLOCK, at : at + _BLOCK]
            square -= np.tril(strip[: len(square)])
            h[at + _BLOCK :, at : at + _BLOCK] -= strip[len(square) :]


def _invert_lower(lower: np.ndarray) -> None:
    """A lower triangular matrix becomes its inverse, where it is."""
    half = len(lower) // 2
    if half < _BLOCK:
        lower[:] = np.tril(np.linalg.inv(lower))  # whose upper triangle is 0, but for rounding
        return
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    below[:] = -(last @ below @ first)


def awq_scales(
    parts: Iterable[np.ndarray], hessian: np.ndarray, size: np.ndarray, grid: Integers
) -> np.ndarray:
    """Factors [K] for the columns, of several powers of the inputs' mean size [K] the best.

    parts: float32 runs of the rows [n, K]. The inputs are to be divided by the same.
    Errors: ValueError where rows are no whole groups.
    """
    floor = np.maximum(size, size.max() * 1e-4 + 1e-30)
    powers = [floor ** (step / _STEPS) for step in range(_STEPS + 1)]
    factors = [(by / np.sqrt(by.max() * by.min())).astype(np.float32) for by in powers]
    h, second = hessian.astype(np.float32), np.diag(hessian)
    errors = np.zeros(len(factors))
    for values in parts:
        for i, by in enumerate(factors):
            made = round_to_nearest(values * by, grid, second / by**2).values() / by
            errors[i] += energy(values - made, h)
    best: np.ndarray = factors[int(errors.argmin())]
    return best


def awq(values: np.ndarray, second: np.ndarray, grid: Integers, by: np.ndarray) -> Rounded:
    """Round values * by to nearest; what is lost is counted at inputs divided by `by`, `second` [K]
    being the diagonal of the hessian."""
    return round_to_nearest(values * by, grid, second / by.astype(np.float64) ** 2)


def folded_norm(norm: np.ndarray, offset: float, by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weight [K] with 1 / by folded in, as bfloat16, and the factors that it really is of.

    The columns take the latter, so that rounding the norm's weight changes no product.
    """
    gain = norm + np.float32(offset)
    folded = to_bfloat16(gain / by - np.float32(offset))
    with np.errstate(divide="ignore", invalid="ignore"):
        real = gain / (folded + np.float32(offset))
    return folded, np.where(np.isfinite(real) & (real > 0), real, np.float32(1)).astype(np.float32)


__all__ = ["Factor", "awq", "awq_scales", "energy", "folded_norm", "gptq", "relative_error"]
