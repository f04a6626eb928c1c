"""What the page at /dashboard shows: one look at the engine and the latest requests, as JSON.

The page asks once a second and keeps the past itself, so that nobody's looking costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from .service import Service


class Percentiles(Struct):
    """Milliseconds, over the latest requests; None where there were none."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Collection[float]) -> Percentiles:
        ordered = sorted(seconds)

        def at(percent: int) -> float | None:
            if not ordered:
                return None
            place = min(len(ordered) - 1, len(ordered) * percent // 100)
            return round(1000 * ordered[place], 3)

        return cls(len(ordered), at(50), at(90), at(99))


class Snapshot(Struct, kw_only=True):
    """Totals are since the engine's process started; None where it did not answer in time."""

    time: float  # Unix seconds
    model: str
    status: str
    engine_restarts: int
    live_requests: int
    engine: dict[str, float | None] | None
    time_to_first_token_ms: Percentiles
    per_token_ms: Percentiles


def snapshot(service: Service, stats: Mapping[str, Any] | None) -> Snapshot:
    """`stats`: EngineStats as plain data, where it is known."""
    keeper, metrics = service.keeper, service.metrics
    return Snapshot(
        time=time.time(),
        model=service.model_name,
        status=service.status,
        engine_restarts=keeper.num_restarts,
        live_requests=service.num_live,
        engine=None if stats is None else _engine(stats),
        time_to_first_token_ms=Percentiles.of(metrics.recent_ttft),
        per_token_ms=Percentiles.of(metrics.recent_per_token),
    )


def _engine(stats: Mapping[str, Any]) -> dict[str, float | None]:
    scheduler, recent = stats.get("scheduler", {}), stats.get("recent", {})
    names = ("num_running", "num_waiting", "free_blocks", "cached_blocks", "owned_blocks")
    totals = ("num_preemptions", "num_prompt_tokens", "num_cached_tokens")
    steps = recent.get("num_steps", 0)
    return {
        **{name: scheduler.get(name) for name in (*names, *totals)},
        "num_steps": stats.get("num_steps"),
        "num_generated_tokens": stats.get("num_generated_tokens"),
        "tokens_per_step": recent["num_tokens"] / steps if steps else None,
        "step_p50_ms": round(1000 * recent["median_s"], 3) if steps else None,
        "step_p99_ms": round(1000 * recent["p99_s"], 3) if steps else None,
    }


__all__ = ["Percentiles", "Snapshot", "snapshot"]
