"""How much of a step each request caused: a model of a step's seconds, fitted as steps go by.

    seconds(step) = step + token * tokens + position * positions

`step` is what every step does once, reading the weights foremost; `token` what each token computes;
`position` what reading the K and V of one position of the past takes. Least squares over the steps
so far, none of the three below 0.
"""

from __future__ import annotations

from itertools import combinations

# Until there are enough steps: a step's own part is worth 16 tokens, a token 4096 positions.
_FIRST = (16.0, 1.0, 1.0 / 4096)
_EVERY = 64  # steps between two fits


class Rates:
    """`rates`: (step, token, position) as whole numbers, of which only the ratios matter."""

    def __init__(self) -> None:
        self.rates = _whole(_FIRST)
        self._steps = 0
        # Sums over the steps of tokens, positions, seconds, and of their products.
        self._t = self._p = self._s = 0.0
        self._tt = self._tp = self._pp = self._ts = self._ps = 0.0

    def note(self, tokens: int, positions: int, seconds: float) -> None:
        """One step: tokens computed, positions read by all of them, seconds it ran."""
        t, p = float(tokens), positions * 1e-3  # of one magnitude, for the arithmetic
        self._steps += 1
        self._t += t
        self._p += p
        self._s += seconds
        self._tt += t * t
        self._tp += t * p
        self._pp += p * p
        self._ts += t * seconds
        self._ps += p * seconds
        if self._steps % _EVERY == 0:
            found = _fit(
                [
                    [float(self._steps), self._t, self._p],
                    [self._t, self._tt, self._tp],
                    [self._p, self._tp, self._pp],
                ],
                [self._s, self._ts, self._ps],
            )
            if found is not None:
                self.rates = _whole((found[0], found[1], found[2] * 1e-3))


def _fit(products: list[list[float]], answers: list[float]) -> tuple[float, ...] | None:
    """Least squares with no coefficient below 0: the best of the fits over every subset of the
    three (seven at most). A subset that the steps cannot tell apart is no candidate. None: none is.
    """
    best, least = None, 0.0
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            solved = _solve(
                [[products[i][j] for j in chosen] for i in chosen], [answers[i] for i in chosen]
            )
            if solved is None or min(solved) < 0:
                continue
            # The sum of squares, up to a constant, of a solution of the normal equations.
            error = -sum(x * answers[i] for x, i in zip(solved, chosen, strict=True))
            if error < least:
                found = dict(zip(chosen, solved, strict=True))
                best, least = tuple(found.get(i, 0.0) for i in range(3)), error
    return best


def _solve(matrix: list[list[float]], answers: list[float]) -> list[float] | None:
    """Gauss with the diagonal as pivots, which suits a positive definite matrix; None: singular."""
    rows = [[*row, answer] for row, answer in zip(matrix, answers, strict=True)]
    size = len(rows)
    for i in range(size):
        if rows[i][i] <= 1e-9 * matrix[i][i] or rows[i][i] <= 0.0:
            return None
        for k in range(size):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def _whole(rates: tuple[float, ...]) -> tuple[int, int, int]:
    """In units that leave the smallest some digits; work is then exact whatever its size."""
    scale = 2**48 / max(sum(rates), 1e-30)
    step, token, position = (round(rate * scale) for rate in rates)
    return step, token, position


__all__ = ["Rates"]
