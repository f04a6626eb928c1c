"""Where values lie in scratch memory: columns of rows, taken and given back in order."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Arena:
    """Columns in use: first fit, lowest first. Widths are rounded up to `align` columns."""

    align: int
    taken: list[tuple[int, int]] = field(default_factory=list)  # (first, width), ascending
    size: int = 0

    def take(self, width: int) -> int:
        """The first column of a free range of `width`."""
        width = -(-width // self.align) * self.align
        at = 0
        for first, taken in self.taken:
            if first - at >= width:
                break
            at = first + taken
        self.taken.append((at, width))
        self.taken.sort()
        self.size = max(self.size, at + width)
        return at

    def give_back(self, first: int) -> None:
        """Free the range that begins at `first`."""
        self.taken = [entry for entry in self.taken if entry[0] != first]
