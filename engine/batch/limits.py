"""When a batch stops before its end because its owner said so: a deadline, and money."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable

from ..core.cost import Cost
from .errors import LIMIT, NOT_READ, BatchError

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = (86_400.0, 3_600.0, 60.0, 1.0)


class Limits:
    """max_cost: in the currency of the engine's prices, for the whole batch, earlier runs included.

    deadline: how long this run may take ("1h30m", "90s"; the system's clock may jump meanwhile), or
    when it ends, in ISO 8601 (local time where it names no zone). Errors: BatchError.
    """

    def __init__(self, *, max_cost: float | None = None, deadline: str | None = None) -> None:
        if max_cost is not None and not 0 <= max_cost < float("inf"):
            raise BatchError(NOT_READ, f"max_cost={max_cost} is no amount of money from 0 up")
        self.max_cost = max_cost
        self._deadline = deadline
        self._left = _clock(deadline) if deadline is not None else None

    def check_time(self) -> None:
        """Errors: BatchError where the deadline has passed."""
        if self._left is not None and self._left() <= 0:
            raise BatchError(
                LIMIT,
                f"the deadline ({self._deadline}) has passed. What was answered is kept; the same "
                "command with a later one goes on",
            )

    def afford(self, spent: float, answered: int, running: int) -> bool:
        """Whether one more request may begin, each running one taken for the mean of those
        answered; before the first answer, whether anything is left."""
        if self.max_cost is None:
            return True
        mean = spent / answered if answered else 0.0
        expected = spent + (running + 1) * mean
        return expected <= self.max_cost if mean else spent < self.max_cost

    def check_cost(self, cost: Cost | None) -> None:
        """Of an answer. Errors: BatchError where there is a budget and nobody counts money."""
        if self.max_cost is not None and (cost is None or cost.money is None):
            raise BatchError(
                NOT_READ,
                "max_cost is given and the engine counts no money: give it a price, "
                "--price-per-kwh or --price-per-hour",
            )

    def raise_spent(self, spent: float) -> None:
        """Errors: BatchError, always."""
        raise BatchError(
            LIMIT,
            f"the batch has cost {spent:.6g} and another request would exceed max_cost="
            f"{self.max_cost:g}. What was answered is kept; the same command with a higher one "
            "goes on",
        )


def _clock(deadline: str) -> Callable[[], float]:
    """Seconds that are left, as a function."""
    text = deadline.strip()
    match = _DURATION.fullmatch(text)
    if text and match is not None:
        parts = zip(match.groups(), _SECONDS, strict=True)
        end = time.monotonic() + sum(float(n) * unit for n, unit in parts if n is not None)
        return lambda: end - time.monotonic()
    try:
        at = datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise BatchError(
            NOT_READ,
            f"deadline={deadline!r} is neither a duration such as 90s or 1h30m nor a time in ISO "
            "8601 such as 2026-11-30T08:00",
        ) from None
    return lambda: at - time.time()


__all__ = ["Limits"]
