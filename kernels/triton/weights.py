"""A weight as it came; what a Program does with it decides how it is packed."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights import RawWeight


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """Parts of one weight, stacked by rows, still in the checkpoint's bytes."""

    parts: tuple[RawWeight, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)
