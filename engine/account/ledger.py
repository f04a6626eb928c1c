"""The ledger: every nanojoule of the meter is somebody's share, or idle. See docs/efficiency.md."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..core.cost import Cost
from ..core.outputs import OutputGroup
from ..core.plan import Roster, StepPlan
from ..core.request import Request
from .meter import Meter
from .rates import Rates

_log = logging.getLogger("engineroom.account")
_KWH = 3.6e15  # nanojoules
_HOUR = 3.6e12  # nanoseconds


_AT_ONCE = 64  # steps whose sums are made together
_PAUSE = 1_000_000  # nanoseconds between turns that are worth a reading of the meter
_ONE = 64  # binary places that the price of a unit of work is kept to


class _Tab:
    """What the steps of one roster came to and is not shared out yet.

    A step's work is, of each of its requests, step + token * count + position * past, `past` being
    the positions that its tokens read, themselves included. While a roster stays, `past` grows by
    the same number from step to step, so four sums over the steps, of the price of a unit of work
    times its parts, tell every share, whenever that is asked for.
    """

    def __init__(self, plan: StepPlan) -> None:
        self.roster = plan.roster
        counts = [share.num_tokens for share in plan.roster.shares]
        starts = plan.starts
        past = [n * (2 * start + n + 1) >> 1 for n, start in zip(counts, starts, strict=True)]
        self._members = tuple(zip(plan.roster.requests, counts, past, strict=True))
        self._num_steps = 0
        self._past, self._growth = sum(past), sum([count * count for count in counts])
        self._clear()

    def _clear(self) -> None:
        self.pending = False  # whether something is there to share out
        self._joules = self._spent = 0
        self._energy = (0, 0, 0, 0)  # prices times: step, token, position, position * step number
        self._time = (0, 0, 0, 0)

    def add(self, joules: int, spent: int, rates: tuple[int, int, int]) -> int:
        """One step more. Returns the positions that it read."""
        step, token, position = rates
        step = step // len(self._members) + 1  # what all need alike; 1: nobody's work is 0
        number = self._num_steps
        positions = self._past + number * self._growth
        work = step * len(self._members) + token * self.roster.num_tokens + position * positions
        parts = (step, token, position, position * number)
        price = (joules << _ONE) // work
        self._energy = _plus(self._energy, price, parts)
        price = (spent << _ONE) // work
        self._time = _plus(self._time, price, parts)
        self._joules += joules
        self._spent += spent
        self._num_steps += 1
        self.pending = True
        return positions

    def settle(self) -> Iterator[tuple[Request, int, int]]:
        """Each request's nanojoules and nanoseconds since the last time.

        Whole numbers that add up to what was counted: each is the difference of two sums from the
        first request on, rounded down, of which the last is all.
        """
        energy, time_, joules, spent = self._energy, self._time, self._joules, self._spent
        self._clear()
        energy_until = time_until = energy_given = time_given = 0
        last = len(self._members) - 1
        for index, (request, count, past) in enumerate(self._members):
            square = count * count
            step, token, position, growth = energy
            energy_until += step + count * token + past * position + square * growth
            step, token, position, growth = time_
            time_until += step + count * token + past * position + square * growth
            energy_now = energy_until >> _ONE if index < last else joules
            time_now = time_until >> _ONE if index < last else spent
            yield request, energy_now - energy_given, time_now - time_given
            energy_given, time_given = energy_now, time_now


def _plus(
    sums: tuple[int, int, int, int], price: int, parts: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    a, b, c, d = sums
    w, x, y, z = parts
    return a + price * w, b + price * x, c + price * y, d + price * z


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

    A turn is begin(), charge() once a step is answered, end(). What the meter counts between two
    steps is the later one's. Idle is what it counts after a turn that left nothing to do, or, where
    that was a millisecond or more, between turns with nothing in flight; and so is a share of a
    request that was answered before its step was. Whole numbers: the shares and idle add up to the
    meter's count exactly.
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
        self._start = self._energy = meter.read()
        self._time = self._paused_time = clock_ns()
        self._resting = True  # before the first turn
        self._idle = 0  # nanojoules
        # Steps of the tab's roster that are not on it yet: nanojoules, nanoseconds, seconds run.
        self._new: list[tuple[int, int, float]] = []
        self._tab = _Tab(StepPlan(0, Roster((), (), ()), (), ()))
        self._groups: Mapping[str, OutputGroup] = {}

    @property
    def idle(self) -> int:
        """Nanojoules that were nobody's."""
        self._settle()
        return self._idle

    @property
    def total(self) -> int:
        """Nanojoules shared out so far, idle ones included."""
        return self._energy - self._start

    def begin(self) -> None:
        """A turn begins with nothing in flight: what passed since end(), if long, was idle."""
        pause = self._clock_ns() - self._paused_time
        # In a short one the caller passes on what the requests were shown, which is work for them.
        if pause >= _PAUSE or self._resting:
            self._rest()
            self._time += pause
            self._resting = False

    def end(self, *, resting: bool) -> None:
        """A turn ends with nothing in flight; `resting`: and nothing to do."""
        self._paused_time = self._clock_ns()
        self._resting = resting
        if resting:
            self._rest()
            self._time = self._paused_time

    def _rest(self) -> None:
        """What was counted since the last time is nobody's."""
        energy = self._read()
        self._idle += energy - self._energy
        self._energy = energy

    def charge(self, plan: StepPlan, groups: Mapping[str, OutputGroup], seconds: float) -> None:
        """Put what was counted since the last time on a step's account.

        groups: those that wait for an answer, now and as they change; cost() is asked of each
        before it leaves. seconds: the step's own, for the fit.
        """
        energy, instant = self._read(), self._clock_ns()
        joules, spent = energy - self._energy, instant - self._time
        self._energy, self._time = energy, instant
        if plan.roster is not self._tab.roster:
            self._settle()
            self._tab = _Tab(plan)
        self._groups = groups
        self._new.append((joules, spent, seconds))
        if len(self._new) == _AT_ONCE:
            self._sum_up()

    def _sum_up(self) -> None:
        """Put the latest steps on the tab, each by the rates that the ones before it tell."""
        tab, rates = self._tab, self._rates
        new, self._new = self._new, []
        for joules, spent, seconds in new:
            positions = tab.add(joules, spent, rates.rates)
            rates.note(tab.roster.num_tokens, positions, seconds)

    def _settle(self) -> None:
        """Share out what is on the account of the latest steps."""
        self._sum_up()
        if not self._tab.pending:
            return
        for request, joules, spent in self._tab.settle():
            group = self._groups.get(request.request_id)
            if group is None or request not in group.samples:  # another one took its id since
                self._idle += joules
            else:
                group.nanojoules += joules
                group.nanoseconds += spent

    def cost(self, group: OutputGroup) -> Cost | None:
        """Of a request, all its samples together, so far; None once the meter has failed."""
        self._settle()
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
        return self._energy


__all__ = ["EnergyStats", "Ledger", "Prices"]
