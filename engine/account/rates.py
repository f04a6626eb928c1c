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
        self._products = [[0.0] * 3 for _ in range(3)]
        self._answers = [0.0] * 3
        self._steps = 0

    def note(self, tokens: int, positions: int, seconds: float) -> None:
        """One step: tokens computed, positions read by all of them, seconds it ran."""
        row = (1.0, float(tokens), positions * 1e-3)  # of one magnitude, for the arithmetic
        for left, products in zip(row, self._products, strict=True):
            for column, right in enumerate(row):
                products[column] += left * right
        for column, left in enumerate(row):
            self._answers[column] += left * seconds
        self._steps += 1
        if self._steps % _EVERY == 0:
            found = _fit(self._products, self._answers)
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
