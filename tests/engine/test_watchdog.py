"""When a child counts as hung, and when it is its parent that slept."""

from __future__ import annotations

import time

import pytest

from engineroom.engine.supervise.watchdog import FIRST_WORD_SECONDS, Watchdog


def hung_after(watchdog: Watchdog, began: float, limit: float) -> float:
    """Seconds, in the middle of a tick, of looking until the child counts as hung."""
    for look in range(int(limit / watchdog.tick)):
        seconds = (look + 0.5) * watchdog.tick
        if (why := watchdog.look(began + seconds)) is not None:
            assert why.startswith("hangs: no heartbeat for ")
            return seconds
    raise AssertionError(f"not within {limit} s")


def test_silence_is_a_hang() -> None:
    watchdog = Watchdog(2.0, 600.0)
    watchdog.heard()
    assert hung_after(watchdog, time.monotonic(), 10.0) == 2.25


def test_a_child_has_longer_for_its_first_word() -> None:
    watchdog = Watchdog(2.0, 600.0)
    assert hung_after(watchdog, time.monotonic(), 100.0) == FIRST_WORD_SECONDS + 0.25
    patient = Watchdog(80.0, 600.0)
    assert hung_after(patient, time.monotonic(), 100.0) == 80.5


def test_a_parent_that_slept_does_not_blame_its_child() -> None:
    watchdog = Watchdog(2.0, 600.0)
    watchdog.heard()
    began = time.monotonic()
    assert watchdog.look(began + 0.5) is None
    assert watchdog.look(began + 1000.0) is None
    assert hung_after(watchdog, began + 1000.0, 10.0) == 2.25  # yet it looks on from there


def test_a_step_is_warned_of_once_and_given_up_later(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(2.0, 5.0)
    for seconds in (1.0, 2.5, 3.5, 0.0, 2.5):
        assert watchdog.stalled(seconds) is None
    assert [r.getMessage() for r in caplog.records] == [
        "the engine's step has been running for 2.5 s (given up after 5 s)"
    ] * 2
    assert watchdog.stalled(5.5) == "hangs: one step has been running for 5.5 s"


def test_what_is_stalled_counts_a_long_silence() -> None:
    watchdog = Watchdog(0.05, 5.0)
    watchdog.heard()
    watchdog.stalled(1.5)
    assert 1.5 <= watchdog.stalled_s < 2.0
    time.sleep(0.1)
    assert watchdog.stalled_s > 1.59
