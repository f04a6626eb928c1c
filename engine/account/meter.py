"""Meters of electrical energy behind one seam: what the machine measures, else a stated model.

A meter counts nanojoules from its making. The model, busy core-seconds x watts, is used where the
system lets nobody read a counter, as in most virtual machines; its Cost is marked `estimated`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from .nvml import Nvml
from .rapl import POWERCAP, Rapl
from .unavailable import MeterUnavailable


class Meter(Protocol):
    """`name` says what it reads; `estimated`: whether any of it is a model's word."""

    name: str
    estimated: bool

    def read(self) -> int:
        """Nanojoules so far; never less than the last time."""
        ...

    def close(self) -> None: ...


class Model:
    """Busy core-seconds x watts: the processor time of this process's threads, times a constant."""

    estimated = True

    def __init__(
        self, watts_per_core: float, clock_ns: Callable[[], int] = time.process_time_ns
    ) -> None:
        self.name = f"model: {watts_per_core:g} W for each busy core of this process"
        self._milliwatts = round(watts_per_core * 1000)
        self._clock_ns = clock_ns
        self._start = clock_ns()

    def read(self) -> int:
        return (self._clock_ns() - self._start) * self._milliwatts // 1000

    def close(self) -> None:
        pass


class Sum:
    """Several meters of different parts of one machine."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = tuple(meters)
        self.name = " + ".join(meter.name for meter in meters)
        self.estimated = any(meter.estimated for meter in meters)

    def read(self) -> int:
        return sum([meter.read() for meter in self._meters])

    def close(self) -> None:
        for meter in self._meters:
            meter.close()


def open_meter(
    kind: str, *, gpu: bool, watts_per_core: float, powercap: Path = POWERCAP
) -> tuple[Meter, str]:
    """The meter of an engine on the CPU, or with `gpu` on a card beside it; and a note, or "".

    kind "auto": RAPL, else the model; with `gpu` NVML together with that. "rapl", "nvml" and
    "model" are one meter alone. Errors: MeterUnavailable with the reason.
    """
    if kind == "model":
        return Model(watts_per_core), ""
    if kind == "rapl":
        return Rapl(powercap), ""
    if kind == "nvml":
        return Nvml(), ""
    try:
        host: Meter = Rapl(powercap)
    except MeterUnavailable:
        host = Model(watts_per_core)
    if not gpu:
        return host, ""
    try:
        return Sum([Nvml(), host]), ""
    except MeterUnavailable as why:
        return host, f"the GPU's energy is not counted, only the host's: {why}"


__all__ = ["Meter", "MeterUnavailable", "Model", "Sum", "open_meter"]
