"""What this machine's memory and processor can do at most, measured: what shares are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.cpu import _native
from .tables import Column, Table

_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def cold_bytes() -> int:
    """What is read in turn, at least: four times the last cache, or 128 MiB where it is unknown."""
    try:
        return 4 * int(_LAST_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 128 << 20


@dataclass(frozen=True)
class Limits:
    """Of this machine at this moment; operations/s are 0 where the processor has no such
    instruction that the probe knows."""

    read: float  # bytes/s
    int8: float
    bf16: float
    f32: float

    @classmethod
    def measured(cls, threads: int, num_bytes: int) -> Limits:
        pool = _native.Pool(threads)
        dots = {kind: _native.probe_dots(pool, kind) for kind in ("int8", "bf16", "f32")}
        return cls(read=_native.probe_read(pool, num_bytes), **dots)

    def rates(self) -> dict[str, float]:
        """In 10^9 a second, by the names that a ModelCost asks for."""
        return {
            "read_gbs": self.read / 1e9,
            "int8_gops": self.int8 / 1e9,
            "bf16_gflops": self.bf16 / 1e9,
            "f32_gflops": self.f32 / 1e9,
        }

    def table(self) -> Table:
        columns = (Column("limit", "limit"), Column("value", "measured", 1), Column("unit", "unit"))
        rows: list[Mapping[str, Any]] = [
            {"limit": "read", "value": self.read / 1e9, "unit": "GB/s"}
        ]
        for kind in ("int8", "bf16", "f32"):
            value = getattr(self, kind)
            rows.append({"limit": kind, "value": value / 1e9 if value else None, "unit": "GOP/s"})
        return Table("Limits of this machine", columns, rows)
