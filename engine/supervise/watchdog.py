"""Watchdog: when a child was last heard of, how long its step runs, and when either is a hang."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

FIRST_WORD_SECONDS = 60.0  # for the child's interpreter to start


class Watchdog:
    """Of one child. `silence` and `step` are the limits, in seconds; times are monotonic seconds.

    heard() and stalled() come from whoever reads the child, look() from the thread that watches.
    """

    def __init__(self, silence: float, step: float) -> None:
        self._silence = silence
        self._step = step
        self.tick = min(1.0, silence / 4)  # seconds between two looks, and two pings
        self._spoken = False
        self._stalled_s = 0.0  # the child's last word on its step
        self._stall_told = False
        self.begin()

    def begin(self) -> None:
        """The child starts now."""
        self._heard = self._looked = time.monotonic()

    def heard(self) -> None:
        """Something came from the child."""
        self._spoken = True
        self._heard = time.monotonic()

    def is_late(self, now: float) -> bool:
        """True where an answer to a ping should have been read by now."""
        return now - self._heard > 1.5 * self.tick

    def look(self, now: float) -> str | None:
        """Once every tick, after reading: why the child counts as hung, where it does."""
        if now - self._looked > 2 * self.tick + 1.0:
            self._heard = now  # it is we who slept: stopped by hand, or starved
        self._looked = now
        limit = self._silence if self._spoken else max(self._silence, FIRST_WORD_SECONDS)
        if now - self._heard > limit:
            return f"hangs: no heartbeat for {now - self._heard:.1f} s"
        return None

    def stalled(self, seconds: float) -> str | None:
        """The child says that its step has been running this long: why it hangs, where it does."""
        self._stalled_s = seconds
        if seconds > self._step:
            return f"hangs: one step has been running for {seconds:.1f} s"
        if seconds <= self._silence:
            self._stall_told = False
        elif not self._stall_told:
            self._stall_told = True
            log.warning(
                "the engine's step has been running for %.1f s (given up after %.0f s)",
                seconds,
                self._step,
            )
        return None

    @property
    def stalled_s(self) -> float:
        """Of the step in flight as last heard of, and of the silence since where it is long."""
        silent = time.monotonic() - self._heard
        return self._stalled_s + (silent if silent > 2 * self.tick else 0.0)


__all__ = ["Watchdog"]
