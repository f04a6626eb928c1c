"""Link: a child, the socket to it and the two threads that serve both, until nothing is left.

One thread writes. The other reads the socket and watches over the child. Where requests come from
an event loop, the loop reads it instead (read_on()), so that a token needs no hop between threads;
the thread goes on watching, sees the child's end, and reads again where the loop has left something
lying for a tick.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .. import wire
from ..client import CLOSE_SECONDS, CLOSED, EngineError, EngineStartError, Grown, Sink, describe
from ..config import EngineConfig
from ..core.checks import AdmissionError
from ..core.parameter import ParameterError
from .inbox import Inbox
from .process import ChildProcess
from .reader import ENDED, Reader
from .watchdog import Watchdog

log = logging.getLogger(__name__)

MAX_QUEUED = 256 << 20  # bytes on their way to a child that does not read
_EXIT_SECONDS = 3.0
_GRACE_SECONDS = 1.0  # a child closes its socket a moment before it ends
_BURIAL_SECONDS = 6.0  # for the watching thread to take a killed child down


class Link:
    """One engine's process, to use from any thread; holds no reference to its client.

    `command` is what to run as the child; `progress` is called with words while the model loads.
    """

    def __init__(
        self,
        config: EngineConfig,
        command: tuple[str, ...],
        watchdog: Watchdog,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.inbox = Inbox(self.abort, progress)
        self.watchdog = watchdog
        self.child: ChildProcess | None = None  # from begin() on
        self._config = config
        self._command = command
        self._lock = self.inbox.sinks.lock  # what is accepted is sent in that order
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued = 0  # bytes in the outbox
        self._frames = wire.Frames()  # reader's
        self._reader: Reader | None = None  # from begin() on
        self._watching: threading.Thread | None = None  # and reading, where no loop does
        self._writing: threading.Thread | None = None
        self._fatal: wire.Fatal | None = None  # the child's own word on its end
        self._abandoned = False  # close() would wait no longer

    # ----------------------------------------------------------------------- from any thread

    def begin(self) -> None:
        """Start the child, which loads the model. Errors: EngineStartError, EngineDeadError."""
        with self._lock:
            if self._watching is not None:
                return
            self.inbox.sinks.check()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    child = ChildProcess(self._command, theirs)
            except EngineStartError:
                ours.close()
                raise
            reader = Reader(ours, self._serve)
            self.child, self._reader = child, reader
            self.watchdog.begin()
            self._put(
                wire.Configure(
                    model=self._config.model,
                    options=_options(self._config),
                    log_level=logging.getLogger("engineroom").getEffectiveLevel(),
                )
            )
            atexit.register(self.close, False, _EXIT_SECONDS)
            self._writing = threading.Thread(
                target=self._write, args=(ours,), name="engineroom-writer", daemon=True
            )
            self._writing.start()
            self._watching = threading.Thread(
                target=self._run, args=(child, reader), name="engineroom-reader", daemon=True
            )
            self._watching.start()

    def submit(self, request_id: str, frame: bytes, sink: Sink, grown: Grown | None) -> None:
        """Errors: those of Sinks.add(); AdmissionError("queue_full")."""
        self._check_started()
        with self._lock:
            self.inbox.sinks.check()
            if self._queued > MAX_QUEUED:
                raise AdmissionError(
                    "queue_full",
                    f"{self._queued} bytes wait for the engine's process, more than {MAX_QUEUED}; "
                    "it reads too slowly or hangs",
                )
            self.inbox.sinks.add(request_id, sink, grown)
            self._queue(frame)

    def abort(self, request_id: str) -> None:
        self._put(wire.Abort(request_id=request_id))

    def call(self, message: Callable[[int], wire.ToChild]) -> Future[Any]:
        """Send a message that has an answer. Errors: EngineDeadError; ParameterError."""
        self._check_started()
        ticket = self.inbox.ticket()
        try:
            frame = wire.encode_to_child(message(ticket))
        except wire.WireError as exc:
            raise ParameterError("messages", str(exc)) from exc
        with self._lock:
            answer = self.inbox.expect(ticket)
            self._queue(frame)
        return answer

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._reader is not None:
            self._reader.read_on(loop)

    def ask_to_end(self, drain: bool) -> None:
        with self._lock:
            self.inbox.sinks.over = self.inbox.sinks.over or CLOSED
            if self._watching is not None:
                self._put(wire.Shutdown(drain=drain))

    def close(self, drain: bool, timeout: float) -> None:
        self.ask_to_end(drain)
        watching, reader, child = self._watching, self._reader, self.child
        if watching is None or reader is None or child is None:
            return
        if watching is threading.current_thread() or reader.is_here:
            return
        watching.join(timeout if drain else min(timeout, CLOSE_SECONDS))
        if watching.is_alive():
            log.warning("the engine's process has not ended within %.1f s; it is killed", timeout)
            self._abandoned = True
            child.kill()
            watching.join(_BURIAL_SECONDS)

    def _check_started(self) -> None:
        if self._watching is None and self.inbox.sinks.over is None:
            raise EngineError("the engine is not loaded: call start() first")

    def _put(self, message: wire.ToChild) -> None:
        self._queue(wire.encode(message))

    def _queue(self, frame: bytes) -> None:
        with self._lock:
            self._queued += len(frame)
            self._outbox.put(frame)

    # -------------------------------------------------------------------------- the threads

    def _write(self, sock: socket.socket) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                sock.sendall(frame)
            except OSError:
                return  # the reader sees it too, and tells why
            with self._lock:
                self._queued -= len(frame)

    def _run(self, child: ChildProcess, reader: Reader) -> None:
        try:
            reason = self._watch(child, reader)
        except BaseException as exc:  # ours; requests must not wait for ever
            log.exception("watching the engine's process failed")
            reason = f"was given up: {describe(exc)}"
        self._bury(child, reader, reason)

    def _watch(self, child: ChildProcess, reader: Reader) -> str:
        """Serve the child until it is over; why it is."""
        next_ping = 0.0
        poll = select.poll()
        poll.register(child.words, select.POLLIN)
        while True:
            # Where a loop reads, only the end is of interest here, and that is always reported.
            poll.register(reader, 0 if reader.is_left_to_a_loop else select.POLLIN)
            ready = [fd for fd, _ in poll.poll(1000 * self.watchdog.tick)]
            now = time.monotonic()
            late = reader.is_left_to_a_loop and self.watchdog.is_late(now)
            if (reader.fileno() in ready or late) and reader.pump() and late:
                reader.leave_loop()  # it is blocked, or runs no more
            if reader.over is not None:
                return reader.over
            if child.words in ready and not child.listen():
                poll.unregister(child.words)
            if (hung := self.watchdog.look(now)) is not None:
                return hung
            if now >= next_ping:
                next_ping = now + self.watchdog.tick
                self._put(wire.Ping(ticket=0))

    def _serve(self, data: memoryview) -> str | None:
        """By whoever reads: handle the messages that `data` completes; why they are the last."""
        self.watchdog.heard()
        try:
            for payload in self._frames.feed(data):
                match wire.decode_to_parent(payload):
                    case wire.Pong(stalled_s=stalled):
                        if (hung := self.watchdog.stalled(stalled)) is not None:
                            return hung
                    case wire.Fatal() as fatal:
                        self._fatal = fatal
                        return fatal.text
                    case message:
                        self.inbox.take(message)
        except wire.WireError as exc:
            return f"sent what cannot be understood: {exc}"
        return None

    def _bury(self, child: ChildProcess, reader: Reader, reason: str) -> None:
        """Nothing of the child is left, and everybody who waited for it is told why."""
        fatal = self._fatal
        child.reap(_GRACE_SECONDS if reason == ENDED or fatal is not None else 0.0)
        asked = self.inbox.sinks.over is not None and (self._abandoned or child.ended_well)
        if fatal is not None:
            self.inbox.end_all(fatal.text, fatal.kind, fatal.field)
        else:
            text = CLOSED if asked else child.epitaph(None if reason == ENDED else reason)
            if not self.inbox.is_ready:
                text = f"the engine could not be loaded: {text}"
            self.inbox.end_all(text)
        self._outbox.put(None)
        if self._writing is not None:
            self._writing.join(1.0)  # what it was sending has no reader any more
        reader.close()
        atexit.unregister(self.close)


def _options(config: EngineConfig) -> dict[str, Any]:
    """As they were given; the model is no option."""
    names = [f.name for f in dataclasses.fields(config) if f.name != "model"]
    return {name: getattr(config, name) for name in names}


__all__ = ["Link"]
