"""The ledger: every nanojoule of the meter is somebody's share, or idle. See docs/efficiency.md."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..core.cost import Cost
from ..core.outputs import OutputGroup
from ..core.plan import StepPlan
from .meter import Meter
from .rates import Rates

_log = logging.getLogger("engineroom.account")
_KWH = 3.6e15  # nanojoules
_HOUR = 3.6e12  # nanoseconds


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What energy and time come to. None: not known, and then not counted."""

    price_per_kwh: float | None = None
    price_per_hour: float | None = None  # of the machine, while it computes
    grams_per_kwh: float | None = None  # CO2 equivalent


@dataclass(frozen=True)
class EnergyStats:
    """Joules since the engine started, by the meter so called; idle_joules are among them."""

    meter: str
    estimated: bool
    joules: float
    idle_joules: float


class Ledger:
    """Shares out what a meter counts. One caller, the engine's.

    A turn is begin(), charge() once a step is answered, end(). What the meter counts from begin()
    to charge() is the step's, and the end of a turn belongs to the next step; what it counts
    between turns with nothing in flight is idle, and so is a share of a request that was answered
    before its step was. Whole numbers: the shares and idle add up to the meter's count exactly.
    """

    def __init__(
        self,
        meter: Meter,
        prices: Prices | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._meter = meter
        self._prices = prices or Prices()
        self._clock_ns = clock_ns
        self._rates = Rates()
        self._failed = False
        self._start = self._energy = self._paused_energy = meter.read()
        self._time = self._paused_time = clock_ns()
        self.idle = 0  # nanojoules

    @property
    def total(self) -> int:
        """Nanojoules shared out so far, idle ones included."""
        return self._energy - self._start

    def begin(self) -> None:
        """A turn begins with nothing in flight: what passed since end() was idle."""
        idle = self._read() - self._paused_energy
        self.idle += idle
        self._energy += idle
        self._time += self._clock_ns() - self._paused_time

    def end(self, *, resting: bool) -> None:
        """A turn ends with nothing in flight; `resting`: and nothing to do."""
        self._paused_energy = self._read()
        self._paused_time = self._clock_ns()
        if resting:
            self.idle += self._paused_energy - self._energy
            self._energy, self._time = self._paused_energy, self._paused_time

    def charge(self, plan: StepPlan, groups: Mapping[str, OutputGroup], seconds: float) -> None:
        """Share out what was counted since the last time among a step's requests.

        groups: those that wait for an answer. seconds: the step's own, for the fit.
        """
        energy, instant = self._read(), self._clock_ns()
        joules, spent = energy - self._energy, instant - self._time
        self._energy, self._time = energy, instant
        roster = plan.roster
        per_step, per_token, per_position = self._rates.rates
        per_step = (
            per_step // len(roster.requests) + 1
        )  # what all need alike; 1: nobody's work is 0
        work: list[tuple[OutputGroup | None, int]] = []
        tokens = positions = done = 0
        for request, share, start in zip(roster.requests, roster.shares, plan.starts, strict=True):
            count = share.num_tokens
            past = count * (2 * start + count + 1) >> 1
            tokens += count
            positions += past
            done += per_step + per_token * count + per_position * past
            group = groups.get(request.request_id)
            if group is not None and request not in group.samples:
                group = None  # another one took its id since
            work.append((group, done))
        last_energy = last_time = 0
        for group, until in work:
            until_energy, until_time = joules * until // done, spent * until // done
            if group is None:
                self.idle += until_energy - last_energy
            else:
                group.nanojoules += until_energy - last_energy
                group.nanoseconds += until_time - last_time
            last_energy, last_time = until_energy, until_time
        self._rates.note(tokens, positions, seconds)

    def cost(self, group: OutputGroup) -> Cost | None:
        """Of a request, all its samples together, so far; None once the meter has failed."""
        if self._failed:
            return None
        prices = self._prices
        energy = group.nanojoules
        money = None
        if prices.price_per_kwh is not None:
            money = energy / _KWH * prices.price_per_kwh
        if prices.price_per_hour is not None:
            money = (money or 0.0) + group.nanoseconds / _HOUR * prices.price_per_hour
        grams = None if prices.grams_per_kwh is None else energy / _KWH * prices.grams_per_kwh
        return Cost(energy / 1e9, money, grams, self._meter.estimated)

    def stats(self) -> EnergyStats:
        return EnergyStats(
            self._meter.name, self._meter.estimated, self.total / 1e9, self.idle / 1e9
        )

    def close(self) -> None:
        self._meter.close()

    def _read(self) -> int:
        if not self._failed:
            try:
                return self._meter.read()
            except Exception as error:  # measuring never stops serving
                self._failed = True
                _log.error("%s: %s; costs are no longer told", self._meter.name, error)
        return max(self._energy, self._paused_energy)


__all__ = ["EnergyStats", "Ledger", "Prices"]
