"""The processes that render templates, seen from here: started, asked with a deadline, replaced.

A small pool, so that a rendering which runs into its limit holds up nobody else's.
"""

from __future__ import annotations

import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Final

MAX_SECONDS: Final = 1.0  # wall time of one rendering, compiling included
MAX_OUTPUT: Final = 1 << 23  # bytes of rendered text
MAX_MEMORY: Final = 1 << 29  # bytes of address space
MAX_ANSWER: Final = 6 * MAX_OUTPUT + 4096  # JSON writes a character as up to six
START_SECONDS: Final = 30.0  # to import jinja2 on a machine that is busy with other things
MAX_WORKERS: Final = 2
_PROGRAM = Path(__file__).with_name("template_worker.py")
# All of the environment that a worker gets: where Python finds its parts, and the clock's zone.
_ENVIRONMENT = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class TemplateError(ValueError):
    """A conversation that cannot be rendered: bad input, or the template's failure.

    `kind`: "input", "raised" (the template refused, in its own words), "syntax", "security",
    "runtime", "limit" (time, memory, size), "crashed".
    """

    def __init__(self, message: str, *, kind: str = "input") -> None:
        super().__init__(message)
        self.kind = kind


class _Gone(Exception):
    """The worker has ended."""


class _TooSlow(Exception):
    """No complete answer by the deadline."""


class _Worker:
    """One process. Not thread-safe: whoever holds it is its only user."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._ready = False
        self._process = subprocess.Popen(
            # -P: neither the current folder nor the program's is searched for modules.
            [
                sys.executable,
                "-P",
                str(_PROGRAM),
                str(MAX_OUTPUT),
                str(MAX_MEMORY),
                str(max_seconds),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the pipes of the template process are missing")
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)
        self._kill = weakref.finalize(self, _end, self._process)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, data: bytes) -> bytes:
        """The answer to one request. Errors: _Gone, _TooSlow; the worker is of no more use then."""
        if not self._ready:
            if self._exchange(b"", time.monotonic() + START_SECONDS):
                raise _Gone("it said something else than that it is ready")
            self._ready = True
        return self._exchange(
            struct.pack(">I", len(data)) + data, time.monotonic() + self.max_seconds
        )

    def _exchange(self, data: bytes, deadline: float) -> bytes:
        """Write `data`, read one frame."""
        unsent, answer, need = memoryview(data), bytearray(), 4
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            if unsent:
                selector.register(self._in, selectors.EVENT_WRITE)
            while len(answer) < need:
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise _TooSlow
                for key, _ in ready:
                    if key.fileobj is self._in:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            selector.unregister(self._in)
                        continue
                    chunk = self._out.read(1 << 16)
                    if not chunk:
                        raise _Gone(f"exit status {self._process.poll()}")
                    answer += chunk
                    if need == 4 and len(answer) >= 4:
                        need += struct.unpack_from(">I", answer)[0]
                        if need > MAX_ANSWER:
                            raise _Gone(f"an answer of {need} bytes")
        return bytes(answer[4:])

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._in.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _Gone(error.strerror or "its pipe is closed") from None

    def end(self) -> None:
        """Kill the process and wait for it. Twice does nothing."""
        self._kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


class WorkerPool:
    """At most MAX_WORKERS workers for one template; thread-safe."""

    def __init__(self, origin: str, max_seconds: float) -> None:
        self._origin = origin
        self._max_seconds = max_seconds
        self._idle: list[_Worker] = []
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have one worker starting or started."""
        with self._lock:
            if not self._idle:
                self._idle.append(_Worker(self._max_seconds))

    def close(self) -> None:
        """End the idle workers; a busy one ends with its rendering's owner."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def render(self, data: bytes) -> str:
        """The text for a request (JSON, see template_worker.py). Errors: TemplateError."""
        with self._slots:
            try:
                answer = self._ask(data)
            except _TooSlow:
                self.start()  # the next one finds a worker that is warm, or nearly
                raise self._failed(
                    f"took longer than {self._max_seconds:g} s and was stopped", "limit"
                ) from None
            except _Gone as error:
                self.start()
                raise self._failed(f"ended the process it ran in ({error})", "crashed") from None
        text = answer.get("text")
        if isinstance(text, str):
            return text
        kind, message = str(answer.get("kind")), str(answer.get("message"))
        if kind == "raised":
            raise TemplateError(message, kind=kind)
        raise self._failed(f"failed ({kind}): {message}", kind)

    def _ask(self, data: bytes) -> dict[str, object]:
        worker = self._take_idle() or _Worker(self._max_seconds)
        try:
            answer: dict[str, object] = json.loads(worker.ask(data))
        except BaseException:
            worker.end()
            raise
        with self._lock:
            self._idle.append(worker)
        return answer

    def _take_idle(self) -> _Worker | None:
        """An idle worker that lives; those that somebody killed meanwhile are cleared away."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                worker = self._idle.pop()
            if worker.is_alive:
                return worker
            worker.end()

    def _failed(self, what: str, kind: str) -> TemplateError:
        return TemplateError(f"the chat template of {self._origin} {what}", kind=kind)


__all__ = ["MAX_SECONDS", "TemplateError", "WorkerPool"]
