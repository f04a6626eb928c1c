"""What ran, for whom, how long: one record per step, and a timeline per request."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TextIO

__all__ = ["RecentSteps", "Segment", "StepLog", "StepRecord", "Timeline"]

_log = logging.getLogger("engineroom.steplog")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. Times in seconds (t_start on the engine's clock), blocks after its commit.

    t_execute_s: from its launch, or the answer of the step before where that came later, to its
    own answer. Where steps overlap (Backend.overlaps) the other three are of the host alone, while
    the device runs a step; the sum is then not the step's time, but t_execute_s may be added up.
    `requests`: (request_id, sample_index, tokens computed, "prefill" or "decode") in packed order.
    """

    step_id: int
    t_start: float
    t_schedule_s: float
    t_build_s: float
    t_execute_s: float
    t_commit_s: float
    num_tokens: int
    num_logit_rows: int
    num_running: int
    num_waiting: int
    num_preempted: int
    free_blocks: int
    cached_blocks: int
    requests: tuple[tuple[str, int, int, str], ...]
    backend: str

    def to_json(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(
            {name: getattr(self, name) for name in _RECORD_FIELDS}, separators=(",", ":")
        )


_RECORD_FIELDS = tuple(f.name for f in fields(StepRecord))


@dataclass(frozen=True, slots=True)
class RecentSteps:
    """The latest steps together: how many, what they computed, how long they took (seconds)."""

    num_steps: int
    num_tokens: int
    median_s: float
    p99_s: float

    @classmethod
    def of(cls, records: Sequence[StepRecord]) -> RecentSteps:
        times = sorted(r.t_schedule_s + r.t_build_s + r.t_execute_s + r.t_commit_s for r in records)
        n = len(times)
        return cls(
            n,
            sum(r.num_tokens for r in records),
            times[n // 2] if n else 0.0,
            times[min(n - 1, n * 99 // 100)] if n else 0.0,
        )


class StepLog:
    """The last `capacity` records in memory, and every record as a JSON line in `path` if given.

    A file that can no longer be written is closed and said once: measuring never stops serving.
    Errors: ValueError for a capacity below 1; OSError where `path` cannot be opened.
    """

    def __init__(self, capacity: int = 4096, path: str | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1 record")
        self._ring: deque[StepRecord] = deque(maxlen=capacity)
        self._path = path
        self._file: TextIO | None = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115
        self.num_steps = 0  # records ever appended
        self.write_error: str | None = None

    def append(self, record: StepRecord) -> None:
        self._ring.append(record)
        self.num_steps += 1
        if self._file is not None:
            try:
                self._file.write(record.to_json() + "\n")
                self._file.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def recent(self, count: int) -> RecentSteps:
        """Of the last `count` records at most."""
        return RecentSteps.of(tuple(islice(reversed(self._ring), count)))

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """Oldest first."""
        return tuple(self._ring)

    def close(self) -> None:
        """Close the file; the ring stays readable. May be called twice."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.write_error = str(error)
        _log.error("step log %s: %s; no more steps are written to it", self._path, error)
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                pass  # its buffer could not be written either, which was just said


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a request's life, in nanoseconds on the timeline's clock."""

    state: str
    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.start_ns


class Timeline:
    """A request's life as adjoining segments: queued, prefill, decode, preempted.

    Kept in whole nanoseconds, so that the segments sum to the wall time exactly. Instants are
    given in seconds; one before the latest counts as the latest.
    """

    __slots__ = ("_closed", "_marks", "_now", "_spent", "start_ns")

    def __init__(self, now: float, state: str = "queued") -> None:
        self.start_ns = self._now = round(now * 1e9)
        self._marks: list[tuple[str, int]] = [(state, self.start_ns)]
        self._closed = False
        self._spent: dict[str, int] = {}  # in segments that have ended: asked for after every step

    def mark(self, state: str, now: float) -> int:
        """Enter `state` at `now` (staying in it is no new segment). Returns now in ns."""
        instant = self._advance(now)
        if not self._closed and self._marks[-1][0] != state:
            last, since = self._marks[-1]
            self._spent[last] = self._spent.get(last, 0) + instant - since
            self._marks.append((state, instant))
        return instant

    def close(self, now: float) -> None:
        """The request ended at `now`; nothing is recorded afterwards."""
        self._advance(now)
        self._closed = True

    @property
    def state(self) -> str:
        return self._marks[-1][0]

    @property
    def total_ns(self) -> int:
        """Wall time from the start to the last mark or close."""
        return self._now - self.start_ns

    @property
    def segments(self) -> tuple[Segment, ...]:
        ends = [start for _, start in self._marks[1:]] + [self._now]
        return tuple(
            Segment(state, start, end)
            for (state, start), end in zip(self._marks, ends, strict=True)
        )

    def spent(self) -> dict[str, int]:
        """Nanoseconds in each state so far; one that it was never in may be missing."""
        current, since = self._marks[-1]
        spent = self._spent.copy()
        spent[current] = spent.get(current, 0) + self._now - since
        return spent

    def seconds(self, *states: str) -> float:
        """Time spent in these states."""
        spent = self.spent()
        return sum([spent.get(state, 0) for state in states]) / 1e9

    def _advance(self, now: float) -> int:
        if not self._closed:
            self._now = max(self._now, round(now * 1e9))
        return self._now
