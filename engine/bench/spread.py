"""Median and 99th percentile of times: their columns, and their cells."""

from __future__ import annotations

from collections.abc import Sequence

from .tables import Column
from .timing import percentile


def spread_columns(key: str, title: str) -> tuple[Column, Column]:
    """Columns of what `spread` returns."""
    return (
        Column(f"{key}_median_ms", f"{title} median ms", 2),
        Column(f"{key}_p99_ms", f"{title} p99 ms", 2),
    )


def spread(key: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and p99 in milliseconds; no cell where nothing was measured."""
    if not seconds:
        return {}
    return {
        f"{key}_median_ms": 1e3 * percentile(seconds, 50),
        f"{key}_p99_ms": 1e3 * percentile(seconds, 99),
    }
