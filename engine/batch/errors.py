"""What ends a batch before its end; all that was answered stays in its journal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

BAD_REQUEST = "E-BATCH-01"
DUPLICATE = "E-BATCH-02"
CHANGED = "E-BATCH-03"
DAMAGED = "E-BATCH-04"
NOT_WRITTEN = "E-BATCH-05"
NOT_READ = "E-BATCH-06"
LIMIT = "E-BATCH-07"


class BatchError(RuntimeError):
    """A batch that cannot go on: what, why, and how to mend it. `code` is one of docs/errors.md.

    why, line: of a line at fault, the reason alone and its number.
    """

    def __init__(self, code: str, message: str, *, why: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.why = why
        self.line = line


class Interrupted(Exception):
    """Somebody asked the batch to end. `signal` is the number of the signal that did."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class LineError(ValueError):
    """A line of the input that is no request. `custom_id` where it could be read."""

    def __init__(self, message: str, *, field: str = "", custom_id: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.custom_id = custom_id


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """While inside, Ctrl-C and SIGTERM make the yielded check() raise Interrupted; a second Ctrl-C
    raises KeyboardInterrupt at once."""
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        came.append(number)

    def check() -> None:
        if came:
            raise Interrupted(came[0])

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


__all__ = ["BatchError", "Interrupted", "LineError", "signals"]
