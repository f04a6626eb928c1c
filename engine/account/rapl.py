"""Linux's powercap counters: the energy of processor packages and their memory (RAPL).

Source: the kernel's Documentation/power/powercap/powercap.rst. AMD's processors are under the same
names. Counters are of the whole machine, in microjoules, renewed about every millisecond, and turn
over at max_energy_range_uj.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .unavailable import MeterUnavailable

POWERCAP = Path("/sys/class/powercap")
# Top zones are packages; psys would count them again, and so would the intel-rapl-mmio twins. Of
# what is inside a package only dram is not already in it.
_PACKAGE = re.compile(r"intel-rapl:\d+")
_PART = re.compile(r"intel-rapl:\d+:\d+")


class Rapl:
    """All packages and their memory. Errors: MeterUnavailable, also where only root may read."""

    estimated = False

    def __init__(self, root: Path = POWERCAP) -> None:
        self._counters: list[_Counter] = []
        names = []
        try:
            for zone in sorted(root.iterdir()):
                name = _name(zone)
                if name is not None:
                    self._counters.append(_Counter(zone))
                    names.append(name)
        except OSError as error:
            self.close()
            raise MeterUnavailable(
                f"RAPL cannot be read: {error.filename}: {error.strerror}; a virtual machine often "
                "has none, and elsewhere its energy_uj files are readable by root alone until an "
                "administrator allows others"
            ) from error
        if not names:
            raise MeterUnavailable(f"RAPL: {root} has no processor package")
        self.name = f"RAPL: {', '.join(names)}"

    def read(self) -> int:
        return 1000 * sum([counter.read() for counter in self._counters])

    def close(self) -> None:
        for counter in self._counters:
            counter.close()
        self._counters = []


class _Counter:
    """One zone's microjoules since it was opened."""

    def __init__(self, zone: Path) -> None:
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._fd = os.open(zone / "energy_uj", os.O_RDONLY)
        try:
            self._last = int(os.pread(self._fd, 32, 0))
        except BaseException:
            os.close(self._fd)
            raise
        self._total = 0

    def read(self) -> int:
        now = int(os.pread(self._fd, 32, 0))
        # It turned over at most once: at 300 W that takes a quarter of an hour.
        self._total += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._total

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _name(zone: Path) -> str | None:
    """Of a zone that is to be counted."""
    package, part = _PACKAGE.fullmatch(zone.name), _PART.fullmatch(zone.name)
    if not package and not part:
        return None
    name = (zone / "name").read_text().strip()
    if package:
        return name if name.startswith("package") else None
    return f"{zone.name}/{name}" if name == "dram" else None


__all__ = ["POWERCAP", "Rapl"]
