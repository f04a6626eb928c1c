"""What a row of the report times, and what it shall reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .card import Launch


@dataclass
class Case:
    """One row's work: what one launch reads and writes, its operations, and who else does it."""

    ours: list[Launch]
    num_bytes: int = 0
    operations: int = 0
    peers: dict[str, list[Launch]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # peer -> why


_SMALL = ("us", "% slower")  # units of which less is better


@dataclass(frozen=True)
class Target:
    """What a row shall reach, in a unit that `met` knows."""

    unit: str
    value: float

    @property
    def text(self) -> str:
        sign = "<=" if self.unit in _SMALL else ">="
        return f"{sign} {self.value:,g} {self.unit}"

    def met(self, row: dict[str, Any]) -> bool | None:
        """None where the figure it is about was not measured."""
        value = {
            "us": row.get("us"),
            "TB/s": row.get("tbs"),
            "TFLOP/s": row.get("tflops"),
            "% of copy": row.get("share"),
            "tok/s": row.get("tok_s"),
            "% slower": row.get("slower"),
        }[self.unit]
        if value is None:
            return None
        return bool(value <= self.value if self.unit in _SMALL else value >= self.value)
