"""Repetitions of one piece of work: medians, p99, and a budget of time that all rows share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FEWEST = 3  # repetitions of a row, however little time is left
MOST = 200


class Repeats(NamedTuple):
    """Rounds that are not counted, and rounds that are."""

    warmup: int
    counted: int


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition."""

    seconds: tuple[float, ...]
    warmup: int

    @property
    def median(self) -> float:
        return percentile(self.seconds, 50)

    @property
    def p99(self) -> float:
        return percentile(self.seconds, 99)

    def less(self, seconds: float) -> Times:
        """The same without what a repetition spends on something else, never below 0."""
        return Times(tuple(max(0.0, s - seconds) for s in self.seconds), self.warmup)

    def over(self, count: int) -> Times:
        """Of one of `count` equal pieces of a repetition."""
        return Times(tuple(s / count for s in self.seconds), self.warmup)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values. Errors: ValueError for none."""
    if not values:
        raise ValueError("no value was measured")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measure(
    timed: Callable[[], float], allowance: float, *, warmup: int = 2, most: int = MOST
) -> Times:
    """Repeat `timed`, which returns the seconds of one repetition, for about `allowance` seconds.

    At least FEWEST and at most `most` times; `warmup` repetitions before that are not counted.
    """
    for _ in range(warmup):
        timed()
    end = time.perf_counter() + allowance
    seconds: list[float] = []
    while len(seconds) < most and (len(seconds) < FEWEST or time.perf_counter() < end):
        seconds.append(timed())
    return Times(tuple(seconds), warmup)


def wall(run: Callable[[], object]) -> Callable[[], float]:
    """`run` on this process's clock, as `measure` takes it."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


class Budget:
    """Seconds that are shared out among the rows still to come."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def share(self, rows_left: int) -> float:
        """Seconds that the next of `rows_left` rows may take; 0 where none are left."""
        return max(0.0, self.left) / max(1, rows_left)
