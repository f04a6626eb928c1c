"""A weight as it came; what a Program does with it decides how it is packed."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..weights import RawWeight
from .quantised import Matrix


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """Parts of one weight, stacked by rows, still in the checkpoint's bytes.

    `matrices`: what `lower` brought to the device, alone or with the weights of its group, by
    whether rows are in pairs and the names of the parts; another Program over these weights shares
    them.
    """

    parts: tuple[RawWeight, ...]
    shape: tuple[int, ...]
    matrices: dict[tuple[bool | str, ...], Matrix] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)
