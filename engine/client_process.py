"""ProcessClient: the engine in a supervised child process, over a socketpair.

Three things can end the child: close(), its own failure, and ours. Its death closes the socket and
is noticed at once; a child that hangs misses its heartbeats for `watchdog` seconds and is killed.
Should this process die, the child sees the socket close and ends by itself.

A thread reads the socket and watches over the child. Where requests come from an event loop, the
loop reads it instead (read_on()), so that a token needs no hop between threads; the thread goes on
watching, sees the child's end, and reads again where the loop has left something lying for a tick.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from . import differences, wire
from .client import (
    CLOSE_SECONDS,
    CLOSED,
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStartError,
    Grown,
    Messages,
    RequestFailed,
    RequestRefused,
    Sink,
    Sinks,
    Submission,
    describe,
)
from .config import EngineConfig
from .core.answers import RequestOutput
from .core.checks import AdmissionError
from .core.parameter import ParameterError

log = logging.getLogger(__name__)

CHILD = (sys.executable, "-m", "engineroom.engine.child")
WATCHDOG_SECONDS = 30.0  # without a heartbeat: the child hangs
STEP_SECONDS = 600.0  # in one step: the child's engine hangs, though its heart beats
FIRST_WORD_SECONDS = 60.0  # for the child's interpreter to start
MAX_QUEUED = 256 << 20  # bytes on their way to a child that does not read
_EXIT_SECONDS = 3.0
_REAP_SECONDS = 5.0  # for the kernel to take a killed process down
_CHUNK = 1 << 16  # bytes of a read
_QUOTED_LINES = 20  # of the child's stderr in the message that tells its death


class ProcessClient(EngineClient):
    """The engine in a child process. `config` has the model and the options.

    watchdog: seconds without a heartbeat after which the child counts as hung. step_timeout:
    seconds that one step may take; more than `watchdog` is warned of, since a large model on a slow
    machine takes its time, and more than this ends the child. on_progress: called with words while
    the model loads. command: what to run as the child, `--fd N` is added.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog: float = WATCHDOG_SECONDS,
        step_timeout: float = STEP_SECONDS,
        on_progress: Callable[[str], None] | None = None,
        command: Sequence[str] = CHILD,
    ) -> None:
        for name, value in (("watchdog", watchdog), ("step_timeout", step_timeout)):
            if not 0.05 <= value <= 86400.0:
                raise ValueError(f"{name} must be 0.05..86400 seconds, not {value!r}")
        self._link = _Link(config, watchdog, step_timeout, on_progress, tuple(command))
        self._finalizer = weakref.finalize(self, self._link.ask_to_end, False)
        self._finalizer.atexit = False  # the link has its own, which waits

    def start(self) -> EngineInfo:
        self._link.begin()
        return self._link.ready.result()

    @property
    def is_alive(self) -> bool:
        return self._link.is_ready and self._link.sinks.over is None

    @property
    def pid(self) -> int | None:
        """The child's process id, from start() on."""
        process = self._link.process
        return None if process is None else process.pid

    @property
    def stalled_s(self) -> float:
        return self._link.stalled_s

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._link.read_on(loop)

    def abort(self, request_id: str) -> None:
        if request_id in self._link.sinks:
            self._link.send(wire.Abort(request_id=request_id))

    def render_chat(self, messages: Messages, **options: Any) -> list[int]:
        try:
            plain_messages = [dict(m) for m in messages]
        except (TypeError, ValueError) as exc:
            raise ParameterError(
                "messages", f'messages are mappings such as {{"role": ..., "content": ...}}: {exc}'
            ) from exc
        answer = self._link.call(
            lambda ticket: wire.RenderChat(ticket=ticket, messages=plain_messages, options=options)
        )
        return list(answer.result())

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        answer = self._link.call(
            lambda ticket: wire.Tokenize(
                ticket=ticket, text=text, add_special_tokens=add_special_tokens
            )
        )
        return list(answer.result())

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        answer = self._link.call(
            lambda ticket: wire.Detokenize(
                ticket=ticket,
                token_ids=tuple(token_ids),
                skip_special_tokens=skip_special_tokens,
            )
        )
        text: str = answer.result()
        return text

    def stats(self, timeout: float = 30.0) -> dict[str, Any]:
        answer = self._link.call(lambda ticket: wire.Stats(ticket=ticket))
        stats: dict[str, Any] = answer.result(timeout)
        return stats

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._link.call(lambda ticket: wire.Facts(ticket=ticket)).result()
        return facts

    def close(self, *, drain: bool = False, timeout: float = CLOSE_SECONDS) -> None:
        self._link.close(drain, timeout)
        self._finalizer.detach()

    def _submit(self, submission: Submission, sink: Sink, grown: Grown | None) -> None:
        if submission.params.logits_processor is not None:
            raise ParameterError(
                "logits_processor",
                "logits_processor is a Python callable and does not cross to the engine's process: "
                "library face only (LLM, or AsyncLLM with client='thread')",
            )
        try:
            frame = wire.encode_to_child(
                wire.Submit(
                    request_id=submission.request_id,
                    prompt=submission.prompt,
                    params=wire.pack_params(submission.params),
                    priority=submission.priority,
                    cache_salt=submission.cache_salt,
                    final_only=submission.final_only,
                    embed=submission.embed,
                    tenant=submission.tenant,
                    weight=submission.weight,
                    growths=submission.growths,
                )
            )
        except wire.WireError as exc:
            raise ParameterError("request", str(exc)) from exc
        self._link.submit(submission.request_id, frame, sink, grown)


class _Link:
    """The child, its socket and the two threads that serve it; holds no reference to its client."""

    def __init__(
        self,
        config: EngineConfig,
        watchdog: float,
        step_timeout: float,
        on_progress: Callable[[str], None] | None,
        command: tuple[str, ...],
    ) -> None:
        self.sinks = Sinks()
        self.ready: Future[EngineInfo] = Future()
        self.is_ready = False
        self.process: subprocess.Popen[bytes] | None = None
        self._config = config
        self._watchdog = watchdog
        self._step_timeout = step_timeout
        self._on_progress = on_progress
        self._command = command
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued = 0  # bytes in the outbox
        self._calls: dict[int, Future[Any]] = {}
        self._tickets = itertools.count(1)
        self._sent: dict[str, RequestOutput] = {}  # reader's: what each live request has shown
        self._stderr: collections.deque[str] = collections.deque(maxlen=_QUOTED_LINES)
        self._unfinished = b""  # of the child's line that it has not ended
        self._fatal: wire.Fatal | None = None
        self._abandoned = False  # close() would wait no longer
        self._buried = False
        self._sock: socket.socket | None = None  # from begin() to _bury()
        self._frames = wire.Frames()
        self._read_buffer = bytearray(_CHUNK)
        self._reading = threading.Lock()  # of the socket's input, _frames and what they lead to
        self._pumper = 0  # the thread in _pump()
        self._on_loop: _OnLoop | None = None  # reads in the thread's stead
        self._spoken = False
        self._reason: str | None = None  # why nothing more is read
        self._reader: threading.Thread | None = None
        self._writer: threading.Thread | None = None
        # The heart: monotonic seconds.
        self._heard = self._ticked = 0.0
        self._stalled_s = 0.0  # the child's last word on its step
        self._stall_told = False

    # ----------------------------------------------------------------------- from any thread

    def begin(self) -> None:
        with self.sinks.lock:
            if self._reader is not None:
                return
            self.sinks.check()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    self.process = subprocess.Popen(
                        [*self._command, "--fd", str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,  # stdout is the parent's: a pipe may read it
                        start_new_session=True,  # Ctrl-C is the parent's to act on
                    )
            except OSError as exc:
                ours.close()
                raise EngineStartError(
                    f"the engine's process could not be started: {exc}", kind=type(exc).__name__
                ) from exc
            self._heard = self._ticked = time.monotonic()
            options = {k: v for k, v in _options(self._config).items() if k != "model"}
            self._put(
                wire.Configure(
                    model=self._config.model,
                    options=options,
                    log_level=logging.getLogger("engineroom").getEffectiveLevel(),
                )
            )
            atexit.register(self.close, False, _EXIT_SECONDS)
            self._writer = threading.Thread(
                target=self._write, args=(ours,), name="engineroom-writer", daemon=True
            )
            self._writer.start()
            self._sock = ours
            self._reader = threading.Thread(
                target=self._read, args=(ours,), name="engineroom-reader", daemon=True
            )
            self._reader.start()

    def submit(self, request_id: str, frame: bytes, sink: Sink, grown: Grown | None) -> None:
        self._check_started()
        with self.sinks.lock:
            self.sinks.check()
            if self._queued > MAX_QUEUED:
                raise AdmissionError(
                    "queue_full",
                    f"{self._queued} bytes wait for the engine's process, more than {MAX_QUEUED}; "
                    "it reads too slowly or hangs",
                )
            self.sinks.add(request_id, sink, grown)
            self._queue(frame)

    def send(self, message: wire.ToChild) -> None:
        with self.sinks.lock:
            if not self._buried:
                self._put(message)

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        on_loop = self._on_loop
        if on_loop is not None and on_loop.loop is loop:
            return
        with self.sinks.lock:
            self._leave_loop()
            if self._sock is not None and self._reason is None:
                self._on_loop = _OnLoop(loop, self._sock, self._pump)

    def _leave_loop(self) -> None:
        with self.sinks.lock:
            left, self._on_loop = self._on_loop, None
            if left is not None:
                left.leave()

    def call(self, message: Callable[[int], wire.ToChild]) -> Future[Any]:
        """Send a message that has an answer. Errors: EngineDeadError; ParameterError."""
        self._check_started()
        ticket = next(self._tickets)
        try:
            frame = wire.encode_to_child(message(ticket))
        except wire.WireError as exc:
            raise ParameterError("messages", str(exc)) from exc
        answer: Future[Any] = Future()
        with self.sinks.lock:
            self.sinks.check()
            self._calls[ticket] = answer
            self._queue(frame)
        return answer

    def ask_to_end(self, drain: bool) -> None:
        with self.sinks.lock:
            self.sinks.over = self.sinks.over or CLOSED
            if self._reader is not None:
                self._put(wire.Shutdown(drain=drain))

    def close(self, drain: bool, timeout: float) -> None:
        self.ask_to_end(drain)
        reader, here = self._reader, threading.get_ident()
        if reader is None or here in (reader.ident, self._pumper):
            return
        reader.join(timeout if drain else min(timeout, CLOSE_SECONDS))
        if reader.is_alive():
            log.warning("the engine's process has not ended within %.1f s; it is killed", timeout)
            self._abandoned = True
            self._kill()
            reader.join(_REAP_SECONDS + 1.0)

    def _check_started(self) -> None:
        if self._reader is None and self.sinks.over is None:
            raise EngineError("the engine is not loaded: call start() first")

    def _put(self, message: wire.ToChild) -> None:
        self._queue(wire.encode(message))

    def _queue(self, frame: bytes) -> None:
        with self.sinks.lock:
            self._queued += len(frame)
            self._outbox.put(frame)

    def _kill(self) -> None:
        """The child and what it has started: its session is its own. Harmless once it is reaped."""
        process = self.process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                process.kill()

    # -------------------------------------------------------------------------- the threads

    def _write(self, sock: socket.socket) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                sock.sendall(frame)
            except OSError:
                return  # the reader sees it too, and tells why
            with self.sinks.lock:
                self._queued -= len(frame)

    def _read(self, sock: socket.socket) -> None:
        process = self.process
        assert process is not None and process.stdout is not None  # ours: begin() made both
        try:
            reason = self._watch(sock, process.stdout.fileno())
        except BaseException as exc:  # ours; requests must not wait for ever
            log.exception("watching the engine's process failed")
            reason = f"was given up: {describe(exc)}"
        self._bury(process, sock, reason)

    def _watch(self, sock: socket.socket, stderr: int) -> str:
        """Serve the child until it is over; why it is."""
        tick = min(1.0, self._watchdog / 4)
        next_ping = 0.0
        os.set_blocking(stderr, False)
        poll = select.poll()
        poll.register(stderr, select.POLLIN)
        while True:
            # Where a loop reads, only the end is of interest here, and that is always reported.
            poll.register(sock, 0 if self._on_loop is not None else select.POLLIN)
            ready = [fd for fd, _ in poll.poll(1000 * tick)]
            now = time.monotonic()
            late = self._on_loop is not None and now - self._heard > 1.5 * tick
            if (sock.fileno() in ready or late) and self._pump() and late:
                self._leave_loop()  # it is blocked, or runs no more
            if self._reason is not None:
                return self._reason
            if stderr in ready:
                data = os.read(stderr, _CHUNK)
                self._keep(data)
                if not data:
                    poll.unregister(stderr)
            if now - self._ticked > 2 * tick + 1.0:
                self._heard = now  # it is we who slept: stopped by hand, or starved
            self._ticked = now
            limit = self._watchdog if self._spoken else max(self._watchdog, FIRST_WORD_SECONDS)
            if now - self._heard > limit:
                return f"hangs: no heartbeat for {now - self._heard:.1f} s"
            if now >= next_ping:
                next_ping = now + tick
                self._queue(wire.encode(wire.Ping(ticket=0)))

    def _pump(self) -> bool:
        """Serve what has arrived; False where nothing has. The last of it sets `_reason`."""
        with self._reading:
            sock = self._sock
            if sock is None or self._reason is not None:
                return False
            self._pumper = threading.get_ident()
            try:
                count = sock.recv_into(self._read_buffer, _CHUNK, socket.MSG_DONTWAIT)
                data = memoryview(self._read_buffer)[:count]
                self._reason = self._serve(data) if count else "ended"
            except BlockingIOError:
                return False  # another thread was faster
            except ConnectionError:  # the child left what we sent unread
                self._reason = "ended"
            except wire.WireError as exc:
                self._reason = f"sent what cannot be understood: {exc}"
            except OSError as exc:
                self._reason = f"cannot be read from: {exc}"
            except BaseException as exc:  # ours; requests must not wait for ever
                log.exception("reading from the engine's process failed")
                self._reason = f"was given up: {describe(exc)}"
            finally:
                self._pumper = 0
            if self._reason is not None:
                self._leave_loop()  # it would find the end again and again
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # which wakes the thread that watches
            return True

    def _serve(self, data: memoryview) -> str | None:
        """Handle the messages that `data` completes; why they are the last, where they are."""
        self._spoken = True
        self._heard = time.monotonic()
        for payload in self._frames.feed(data):
            if (over := self._handle(wire.decode_to_parent(payload))) is not None:
                return over
        return None

    def _handle(self, message: wire.ToParent) -> str | None:
        """One message; a text where it is the last."""
        match message:
            case wire.Growths(growths=growths):
                for growth in growths:
                    if not self.sinks.grow(growth):
                        self._give_up(growth.request_id)
            case wire.Output():
                self._output(message)
            case wire.Pong(stalled_s=stalled):
                return self._stalled(stalled)
            case wire.Refused():
                self._refused(message)
            case (
                wire.Rendered(ticket=ticket, token_ids=result)
                | wire.Text(ticket=ticket, text=result)
                | wire.StatsReply(ticket=ticket, stats=result)
                | wire.FactsReply(ticket=ticket, facts=result)
            ):
                self._answer(ticket, result)
            case wire.Log(level=level, logger=name, text=text):
                logging.getLogger(name).log(level, "%s", text)
            case wire.Progress(text=text):
                self._progress(text)
            case wire.Ready():
                info = EngineInfo(
                    config=message.config,
                    model=message.model,
                    has_chat_template=message.has_chat_template,
                    chat_template=message.chat_template,
                    pid=message.pid,
                    thread=message.thread,
                )
                self.is_ready = True
                self.ready.set_result(info)
            case wire.Fatal():
                self._fatal = message
                return message.text
        return None

    def _progress(self, text: str) -> None:
        if self._on_progress is not None:
            try:
                self._on_progress(text)
            except Exception:  # the listener's failure is no reason to give the child up
                log.exception("on_progress failed")

    def _output(self, message: wire.Output) -> None:
        rid = message.request_id
        if rid not in self.sinks.live:
            self._sent.pop(rid, None)
            return
        output = differences.apply(self._sent.get(rid), message)
        if message.more:
            self._sent[rid] = output
            return
        if output.finished:
            self._sent.pop(rid, None)
        else:
            self._sent[rid] = output
        if not self.sinks.output(output) and not output.finished:
            self._give_up(rid)

    def _give_up(self, request_id: str) -> None:
        """Its sink failed: nobody reads."""
        self.sinks.mute(request_id)
        self.send(wire.Abort(request_id=request_id))

    def _refused(self, message: wire.Refused) -> None:
        error: EngineError
        if message.fault == "caller":
            error = RequestRefused.from_text(message.kind, message.field, message.text)
        else:
            error = RequestFailed(message.text)
        if message.ticket:
            self._answer(message.ticket, error)
        else:
            self._sent.pop(message.request_id, None)
            self.sinks.end(message.request_id, error)

    def _answer(self, ticket: int, result: Any) -> None:
        with self.sinks.lock:
            future = self._calls.pop(ticket, None)
        if future is not None and future.set_running_or_notify_cancel():
            if isinstance(result, EngineError):
                future.set_exception(result)
            else:
                future.set_result(result)

    @property
    def stalled_s(self) -> float:
        """Of the step in flight as last heard of, and of the silence since where it is long."""
        silent = time.monotonic() - self._heard
        return self._stalled_s + (silent if silent > 2 * min(1.0, self._watchdog / 4) else 0.0)

    def _stalled(self, seconds: float) -> str | None:
        self._stalled_s = seconds
        if seconds > self._step_timeout:
            return f"hangs: one step has been running for {seconds:.1f} s"
        if seconds <= self._watchdog:
            self._stall_told = False
        elif not self._stall_told:
            self._stall_told = True
            log.warning(
                "the engine's step has been running for %.1f s (given up after %.0f s)",
                seconds,
                self._step_timeout,
            )
        return None

    def _keep(self, data: bytes) -> None:
        """What the child wrote; b"" where it writes no more, which ends its last line."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[-_CHUNK:]
        if not data and self._unfinished:
            lines, self._unfinished = [*lines, self._unfinished], b""
        for line in lines:
            words = "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace"))
            self._stderr.append(words)
            log.warning("engine process: %s", words)

    def _bury(self, process: subprocess.Popen[bytes], sock: socket.socket, reason: str) -> None:
        """Nothing of the child is left, and everybody who waited for it is told why."""
        if reason == "ended" or self._fatal is not None:
            try:
                process.wait(1.0)  # it closes the socket a moment before it ends
            except subprocess.TimeoutExpired:
                pass
        self._kill()
        try:
            process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("process %d does not die", process.pid)
        if process.stdout is not None:
            try:
                self._keep(process.stdout.read() or b"")
            except OSError:
                pass
            self._keep(b"")
            process.stdout.close()
        asked = self.sinks.over is not None and self._fatal is None
        asked = asked and (self._abandoned or process.returncode == 0)
        text = CLOSED if asked else self._epitaph(process, reason)
        if not self.is_ready and self._fatal is None:
            text = f"the engine could not be loaded: {text}"
        self.sinks.end_all(text)
        with self.sinks.lock:
            self._buried = True
            calls, self._calls = self._calls, {}
        self._outbox.put(None)
        if self._writer is not None:
            self._writer.join(1.0)  # what it was sending has no reader any more
        with self.sinks.lock:
            self._sock = None
        self._leave_loop()
        sock.close()
        for future in calls.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDeadError(text))
        if not self.is_ready:
            fatal = self._fatal
            self.ready.set_exception(
                EngineStartError(
                    text,
                    kind=fatal.kind if fatal else "",
                    field=fatal.field if fatal else "",
                )
            )
        atexit.unregister(self.close)

    def _epitaph(self, process: subprocess.Popen[bytes], reason: str) -> str:
        if self._fatal is not None:
            return reason
        code = process.returncode
        if reason == "ended" and code is not None:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        else:
            how = reason
        text = f"the engine's process {process.pid} {how}"
        if self._stderr:
            text += "; it said last:\n  " + "\n  ".join(self._stderr)
        return text


class _OnLoop:
    """An event loop's own handle of the socket: closed by that loop, which alone may forget it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, pump: Callable[[], object]
    ) -> None:
        """On the loop."""
        self.loop = loop
        self._sock = sock.dup()
        loop.add_reader(self._sock, pump)

    def leave(self) -> None:
        """From any thread."""
        try:
            self.loop.call_soon_threadsafe(self._leave)
        except RuntimeError:  # the loop is closed, its selector with it
            self._sock.close()

    def _leave(self) -> None:
        self.loop.remove_reader(self._sock)
        self._sock.close()


def _options(config: EngineConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


__all__ = ["ProcessClient"]
