"""Which core the event loop keeps off: the one that the engine's own thread runs on.

Between two steps that thread works alone, and the step's other threads wait for it, each on its
core. What it sends wakes the server, and Linux wakes whom a socket wakes on the sender's core:
there all of them wait for the server, on any other core one that waits anyway.
"""

from __future__ import annotations

import os

_CORE = 36  # in /proc/*/stat behind the name, proc(5)'s field 39: where a thread ran last


class Aside:
    """Of an event loop's thread. Where it has one core, or the system (no Linux) does not let a
    program choose, nothing is done."""

    def __init__(self) -> None:
        self._chosen = self._all = _cores()

    def look(self, pid: int, thread: int) -> None:
        """On the loop: of the cores it might use, keep off the one of this thread of a process.

        Some 30 us.
        """
        if not self._all:
            return
        now = _cores()
        if now != self._chosen:  # somebody else moved us, who knows better
            self._all = now
        core = _core_of(pid, thread)
        if core is not None:
            self._chosen = self._all - {core} or self._all
            if self._chosen != now:
                os.sched_setaffinity(0, self._chosen)

    def leave(self) -> None:
        """On a thread that the loop's began: it, and what it begins, may use every core."""
        if self._all:
            os.sched_setaffinity(0, self._all)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _core_of(pid: int, thread: int) -> int | None:
    """None where there is no such thread any more."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", "rb", buffering=0) as stat:
            said = stat.read(4096)
    except OSError:
        return None
    return int(said.rpartition(b")")[2].split()[_CORE])


__all__ = ["Aside"]
