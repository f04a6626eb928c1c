"""GPTQ and AWQ: rounding that counts what a layer's inputs are, from their second moments.

GPTQ: Frantar et al. 2022 (arXiv:2210.17323). AWQ: Lin et al. 2023 (arXiv:2306.00978). Both make a
linear layer's error on the calibration inputs X small: the trace of D H D^T, D what rounding moved
the weights by and H = X^T X. numpy only; the inputs come from running the model
(engine/tools/calibration.py).
"""

from __future__ import annotations

import numpy as np

from .rounding import Integers, Rounded, fit, round_to_nearest, to_bfloat16

_DAMP = 0.01  # of the mean of H's diagonal, added to it: GPTQ's own default
_BLOCK = 128  # columns between two updates of all that follow
_STEPS = 10  # AWQ's exponents: 0, 0.1 .. 1


def relative_error(values: np.ndarray, made: np.ndarray, hessian: np.ndarray) -> float:
    """Of the layer's output over the calibration inputs: |X (W - W')^T|^2 / |X W^T|^2."""
    wrong = _energy(values - made, hessian)
    whole = _energy(values, hessian)
    return wrong / whole if whole > 0 else 0.0


def _energy(values: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.vdot(values @ hessian.astype(np.float32), values))


def gptq(values: np.ndarray, hessian: np.ndarray, grid: Integers) -> Rounded:
    """Round float32 values [N, K] column by column, making up for each in those that follow.

    hessian float64 [K, K]. Scales are settled before (by the columns' second moments), and columns
    are taken by descending second moment: act-order whose groups stay where they were, so that the
    checkpoint needs no order of its own. A column that is never other than 0 becomes 0.

    Errors: ValueError where rows are no whole groups.
    """
    second = np.diag(hessian)
    w = np.where(second > 0, values, np.float32(0))
    scale, zero = fit(w, grid, second)
    width = w.shape[1] // scale.shape[1]
    order = np.argsort(-second, kind="stable")
    upper = _inverse_factor(hessian, order)
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
    h = hessian[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diag(h).copy()
    damp = _DAMP * diagonal.mean() or 1.0
    h[np.diag_indices_from(h)] = np.where(diagonal > 0, diagonal, 1.0) + damp
    # H^-1 = U^T U with U upper: of the matrix turned end for end, the lower factor's inverse.
    lower = np.linalg.cholesky(h[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return np.triu(upper).astype(np.float32)


def awq_scales(
    values: np.ndarray, hessian: np.ndarray, size: np.ndarray, grid: Integers
) -> np.ndarray:
    """Factors [K] for the columns, of several powers of the inputs' mean size [K] the best.

    The inputs are to be divided by the same. Errors: ValueError where rows are no whole groups.
    """
    best, kept = np.inf, np.ones(values.shape[1], np.float32)
    floor = np.maximum(size, size.max() * 1e-4 + 1e-30)
    for step in range(_STEPS + 1):
        by = floor ** (step / _STEPS)
        by = (by / np.sqrt(by.max() * by.min())).astype(np.float32)
        made = round_to_nearest(values * by, grid, np.diag(hessian) / by**2).values() / by
        error = _energy(values - made, hessian)
        if error < best:
            best, kept = error, by
    return kept


def awq(values: np.ndarray, hessian: np.ndarray, grid: Integers, by: np.ndarray) -> Rounded:
    """Round values * by to nearest; what is lost is counted at inputs divided by `by`."""
    return round_to_nearest(values * by, grid, np.diag(hessian) / by.astype(np.float64) ** 2)


def folded_norm(norm: np.ndarray, offset: float, by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weight [K] with 1 / by folded in, as bfloat16, and the factors that it really is of.

    The columns take the latter, so that rounding the norm's weight changes no product.
    """
    gain = norm + np.float32(offset)
    folded = to_bfloat16(gain / by - np.float32(offset))
    with np.errstate(divide="ignore", invalid="ignore"):
        real = gain / (folded + np.float32(offset))
    return folded, np.where(np.isfinite(real) & (real > 0), real, np.float32(1)).astype(np.float32)


__all__ = ["awq", "awq_scales", "folded_norm", "gptq", "relative_error"]
