"""From the moments of a level's answers to a row: rates, percentiles, goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..spread import spread, spread_columns
from ..tables import Column
from .client import Answer

_LEAD = (Column("model", "model"), Column("load", "load"))
RATES = (
    *_LEAD,
    Column("warmup", "warm-up"),
    Column("requests", "answered"),
    Column("failed", "failed"),
    Column("input_len", "mean in"),
    Column("output_len", "mean out"),
    Column("requests_s", "requests/s", 2),
    Column("output_tokens_s", "out tok/s", 1),
    Column("total_tokens_s", "total tok/s", 1),
    Column("goodput_s", "goodput/s", 2),
    Column("goodput_percent", "in limits %", 1),
)
WAITS = (
    *_LEAD,
    *spread_columns("first", "first token"),
    *spread_columns("between", "between parts"),
    *spread_columns("token", "per token"),
    *spread_columns("whole", "end to end"),
)


@dataclass(frozen=True)
class Limits:
    """What a user still calls good, in milliseconds; None is no limit."""

    first: float | None = None  # to the first token
    token: float | None = None  # per token after it, on average
    whole: float | None = None  # end to end

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.first, self.token, self.whole))

    def met(self, answer: Answer) -> bool:
        pairs = (
            (self.first, first(answer)),
            (self.token, per_token(answer)),
            (self.whole, answer.end - answer.sent),
        )
        return all(
            limit is None or seconds is None or 1e3 * seconds <= limit for limit, seconds in pairs
        )


def first(answer: Answer) -> float | None:
    """Seconds to the first part with text; None where there was none."""
    return answer.parts[0] - answer.sent if answer.parts else None


def per_token(answer: Answer) -> float | None:
    """Seconds a token after the first, on average: a part may hold several. None below two."""
    if answer.output_tokens < 2 or len(answer.parts) < 2:
        return None
    return (answer.parts[-1] - answer.parts[0]) / (answer.output_tokens - 1)


def row(answers: Sequence[Answer], limits: Limits) -> dict[str, Any]:
    """The cells of one level. Rates are over the time from its first request to its last answer."""
    good = [answer for answer in answers if answer.error is None]
    cells: dict[str, Any] = {"requests": len(good), "failed": len(answers) - len(good)}
    if not good:
        return cells
    seconds = max(answer.end for answer in answers) - min(answer.sent for answer in answers)
    inputs = sum(answer.input_tokens for answer in good)
    outputs = sum(answer.output_tokens for answer in good)
    cells |= {
        "input_len": inputs / len(good),
        "output_len": outputs / len(good),
        "requests_s": len(good) / seconds,
        "output_tokens_s": outputs / seconds,
        "total_tokens_s": (inputs + outputs) / seconds,
        **spread("first", known(first(answer) for answer in good)),
        **spread("between", [b - a for answer in good for a, b in pairwise(answer.parts)]),
        **spread("token", known(per_token(answer) for answer in good)),
        **spread("whole", [answer.end - answer.sent for answer in good]),
    }
    if limits:
        met = sum(limits.met(answer) for answer in good)
        cells |= {
            "goodput_s": met / seconds,
            "goodput_percent": 100 * met / len(answers),
        }
    return cells


def known(values: Any) -> list[float]:
    """Those that are not None."""
    return [value for value in values if value is not None]


def slowest(answers: Sequence[Answer]) -> Answer | None:
    """The answered request that took longest, end to end."""
    good = [answer for answer in answers if answer.error is None and answer.parts]
    return max(good, key=lambda answer: answer.end - answer.sent, default=None)


def stretches(answer: Answer) -> list[tuple[str, float, float]]:
    """A request's life as (what, start, end) in milliseconds since it was sent.

    Where the server tells its own timings the wait for the first token is split by them; what they
    leave is the way there and back.
    """
    at = 1e3 * (answer.parts[0] - answer.sent)
    end = 1e3 * (answer.end - answer.sent)
    parts: list[tuple[str, float, float]] = []
    start = 0.0
    told: Mapping[str, float] = answer.timings or {}
    for name, key in (("queue", "queue_ms"), ("prefill", "prefill_ms")):
        length = min(float(told.get(key) or 0.0), at - start)
        if length > 0:
            parts.append((name, start, start + length))
            start += length
    parts.append(("way" if parts else "first token", start, at))
    return [*parts, ("decode", at, end)]
