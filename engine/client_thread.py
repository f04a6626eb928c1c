"""ThreadClient: the engine on a thread of this process, asleep when there is nothing to do."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from .client import (
    CLOSE_SECONDS,
    CLOSED,
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineFactory,
    EngineInfo,
    EngineLike,
    EngineStartError,
    Grown,
    Messages,
    RequestFailed,
    RequestRefused,
    Sink,
    Sinks,
    Submission,
    describe,
    named_by,
    plain,
)
from .core.answers import Growth
from .core.checks import AdmissionError
from .core.parameter import ParameterError

log = logging.getLogger(__name__)

_NOT_LOADED = "the engine is not loaded: call start() first"
_EXIT_SECONDS = 5.0  # what the interpreter's end waits for a step
PREPARE_SECONDS = 10.0  # what a request may take to compile, its wait for others' included
_MAX_PREPARING = 64
_DISPLACED = (
    "the queue is full and this key has the most requests waiting: the newest of them gave its "
    "place to another key's; try again later"
)


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Call:
    function: Callable[[EngineLike], Any]
    future: Future[Any]


@dataclass(frozen=True)
class _Close:
    drain: bool


@dataclass(frozen=True)
class _Prepared:
    """What the submission needs is compiled, or why it is not."""

    submission: Submission
    error: BaseException | None


_Result = TypeVar("_Result")
Stepped = Callable[[Sequence[Growth]], None]
_Command = Submission | _Abort | _Call | _Close | _Prepared


class ThreadClient(EngineClient):
    """The engine on a thread of this process. `factory` loads it, on that thread.

    `stepped` is called there behind every step, when its outputs have gone to their sinks, with the
    step's growths; without it those go to the requests' own.
    """

    def __init__(self, factory: EngineFactory, stepped: Stepped | None = None) -> None:
        self._turner = _Turner(factory, stepped)
        # A client that is forgotten ends its engine, without waiting: this may run anywhere.
        self._finalizer = weakref.finalize(self, self._turner.ask_to_end, False)
        self._finalizer.atexit = False  # the turner has its own, which waits

    def start(self) -> EngineInfo:
        self._turner.begin()
        return self._turner.ready.result()

    @property
    def is_alive(self) -> bool:
        return self._turner.running

    @property
    def stalled_s(self) -> float:
        """For how long the step in flight has been running, in seconds; 0 between steps."""
        started = self._turner.step_started
        return 0.0 if started is None else time.monotonic() - started

    def abort(self, request_id: str) -> None:
        if request_id in self._turner.sinks:
            self._turner.commands.put(_Abort(request_id))

    def render_chat(self, messages: Messages, **options: Any) -> list[int]:
        return self._beside("rendering the chat", lambda e: e.render_chat(messages, **options))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._beside(
            "tokenizing", lambda e: e.tokenize(text, add_special_tokens=add_special_tokens)
        )

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._beside(
            "detokenizing",
            lambda e: e.detokenize(token_ids, skip_special_tokens=skip_special_tokens),
        )

    def stats(self, timeout: float = 30.0) -> dict[str, Any]:
        answer = self._turner.call(lambda engine: plain(engine.stats()))
        stats: dict[str, Any] = answer.result(timeout)
        return stats

    def facts(self) -> dict[str, Any]:
        return self._beside("hashing the weights", lambda e: e.facts())

    def wait(self) -> str | None:
        """Block until the engine is over: None when it was closed, else why it failed."""
        return self._turner.over.result()

    def close(self, *, drain: bool = False, timeout: float = CLOSE_SECONDS) -> None:
        self._turner.close(drain, timeout)
        self._finalizer.detach()

    def _beside(self, what: str, work: Callable[[EngineLike], _Result]) -> _Result:
        """On the caller's thread: a slow template must not hold up the step of its neighbours."""
        engine = self._turner.loaded()
        try:
            return work(engine)
        except ValueError as exc:
            raise RequestRefused.of(exc) from exc
        except Exception as exc:
            raise RequestFailed(f"{what} failed: {describe(exc)}") from exc

    def _submit(self, submission: Submission, sink: Sink, grown: Grown | None) -> None:
        self._turner.submit(submission, sink, grown)


class _Turner:
    """The engine's thread and what it shares; holds no reference to its client."""

    def __init__(self, factory: EngineFactory, stepped: Stepped | None) -> None:
        self.sinks = Sinks()
        self.commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self.ready: Future[EngineInfo] = Future()
        self.over: Future[str | None] = Future()  # why the engine failed; None: it was closed
        self.engine: EngineLike | None = None
        self.step_started: float | None = None
        self._factory = factory
        self._stepped = stepped
        self._thread: threading.Thread | None = None
        self._running: set[str] = set()  # accepted by the engine, not ended
        self._displaced: set[str] = set()  # of them, those whose end will be a refusal
        self._preparing: dict[str, bool] = {}  # what they need is compiled: aborted meanwhile?
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="engineroom-prepare")
        self._closing: _Close | None = None

    # Called from any thread.

    @property
    def running(self) -> bool:
        return self.engine is not None and self.sinks.over is None

    def begin(self) -> None:
        with self.sinks.lock:
            if self._thread is not None:
                return
            self.sinks.check()
            # A daemon, since Python joins the others before it calls exit handlers.
            atexit.register(self.close, False, _EXIT_SECONDS)
            self._thread = threading.Thread(target=self._run, name="engineroom-engine", daemon=True)
            self._thread.start()

    def loaded(self) -> EngineLike:
        """Errors: EngineDeadError, EngineError before start()."""
        with self.sinks.lock:
            self.sinks.check()
            engine = self.engine
        if engine is None:
            raise EngineError(_NOT_LOADED)
        return engine

    def submit(self, command: Submission, sink: Sink, grown: Grown | None) -> None:
        if self._thread is None:
            raise EngineError(_NOT_LOADED)
        with self.sinks.lock:
            self.sinks.add(command.request_id, sink, grown)
            self.commands.put(command)

    def call(self, function: Callable[[EngineLike], Any]) -> Future[Any]:
        if self._thread is None:
            raise EngineError(_NOT_LOADED)
        future: Future[Any] = Future()
        with self.sinks.lock:
            self.sinks.check()
            self.commands.put(_Call(function, future))
        return future

    def ask_to_end(self, drain: bool) -> None:
        with self.sinks.lock:
            self.sinks.over = self.sinks.over or CLOSED
            self.commands.put(_Close(drain))

    def close(self, drain: bool, timeout: float) -> None:
        self.ask_to_end(drain)
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        if thread.is_alive() and drain:
            log.warning("draining took over %.1f s: what still runs is aborted", timeout)
            self.commands.put(_Close(False))
            thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("the engine's thread is still in a step; it ends after it")
            self.sinks.end_all(CLOSED)

    # Called on the engine's thread alone.

    def _run(self) -> None:
        try:
            engine = self._factory()
            info = EngineInfo(
                config=engine.config,
                model=engine.model_config,
                has_chat_template=engine.chat_template is not None,
                chat_template=getattr(engine.chat_template, "source", None),
                pid=os.getpid(),
                thread=threading.get_native_id(),
            )
        except BaseException as exc:
            reason = f"the engine could not be loaded: {describe(exc)}"
            error = EngineStartError(reason, kind=type(exc).__name__, field=named_by(exc))
            error.__cause__ = exc
            self._end(reason)
            self.ready.set_exception(error)
            self.over.set_result(reason)
            return
        self.engine = engine
        if self.sinks.over is None:
            self.ready.set_result(info)
        else:
            self.ready.set_exception(EngineStartError("closed while loading"))
        failure = None
        try:
            self._turn(engine)
        except BaseException as exc:  # a step that failed as a whole leaves nothing to trust
            log.exception("the engine failed")
            failure = f"the engine failed: {describe(exc)}"
        self._end(failure or CLOSED)
        self.over.set_result(failure)
        self.engine = None
        try:
            engine.close()
        except Exception:
            log.exception("closing the engine failed")

    def _turn(self, engine: EngineLike) -> None:
        while True:
            self._obey(engine, wait=self._sleeps(engine))
            pending = self._running or self._preparing
            if self._closing and not (self._closing.drain and pending):
                self._abort_all(engine)
                return
            # Also with no work left: an aborted request's ending comes out of a step.
            if engine.has_work or self._running:
                self._step(engine)

    def _sleeps(self, engine: EngineLike) -> bool:
        """True where nothing happens before a command comes."""
        busy = engine.has_work or self._running
        return not busy and (self._closing is None or bool(self._preparing))

    def _obey(self, engine: EngineLike, *, wait: bool) -> None:
        try:
            while True:
                command = self.commands.get(block=wait)
                wait = False
                match command:
                    case Submission():
                        self._receive(engine, command)
                    case _Prepared(submission=submission, error=error):
                        self._prepared(engine, submission, error)
                    case _Abort(request_id=request_id) if request_id in self._preparing:
                        self._preparing[request_id] = True
                    case _Abort(request_id=request_id):
                        engine.abort(request_id)
                    case _Call(function=function, future=future):
                        if future.set_running_or_notify_cancel():
                            try:
                                future.set_result(function(engine))
                            except Exception as exc:
                                future.set_exception(exc)
                    case _Close():
                        self._closing = command
        except queue.Empty:
            return

    def _receive(self, engine: EngineLike, command: Submission) -> None:
        """Admit it, once what it needs is compiled: beside the steps, which do not wait for it."""
        if engine.is_prepared(command.params):
            self._admit(engine, command)
            return
        if len(self._preparing) >= _MAX_PREPARING:
            text = f"{_MAX_PREPARING} requests wait to be compiled; send this one again later"
            self.sinks.end(
                command.request_id, RequestRefused.of(AdmissionError("queue_full", text))
            )
            return
        self._preparing[command.request_id] = False
        late = threading.Timer(PREPARE_SECONDS, self._too_late, [command])
        late.daemon = True
        late.start()
        self._preparer.submit(self._prepare, engine, command, late)

    def _prepare(self, engine: EngineLike, command: Submission, late: threading.Timer) -> None:
        """On the preparer's thread."""
        try:
            engine.prepare(command.params)
        except BaseException as exc:
            self.commands.put(_Prepared(command, exc))
        else:
            self.commands.put(_Prepared(command, None))
        late.cancel()

    def _too_late(self, command: Submission) -> None:
        text = f"structured: compiling took longer than {PREPARE_SECONDS} s; simplify the form"
        self.commands.put(_Prepared(command, ParameterError("structured", text)))

    def _prepared(
        self, engine: EngineLike, command: Submission, error: BaseException | None
    ) -> None:
        aborted = self._preparing.pop(command.request_id, None)
        if aborted is None:  # it was refused already
            return
        if error is not None:
            self._refuse(command.request_id, error)
            return
        self._admit(engine, command)
        if aborted:
            engine.abort(command.request_id)

    def _admit(self, engine: EngineLike, command: Submission) -> None:
        rid = command.request_id
        try:
            added = engine.add_request(
                rid,
                command.prompt,
                command.params,
                priority=command.priority,
                cache_salt=command.cache_salt,
                final_only=command.final_only,
                growths=command.growths,
                embed=command.embed,
                tenant=command.tenant,
                weight=command.weight,
            )
        except BaseException as exc:  # a tokenizer's panic, too, is this request's alone
            self._refuse(rid, exc)
        else:
            self._running.add(rid)
            self._displaced.update(added.displaced)

    def _refuse(self, rid: str, exc: BaseException) -> None:
        if isinstance(exc, ValueError):
            self.sinks.end(rid, RequestRefused.of(exc))
            return
        log.error("request %r failed at the door", rid, exc_info=exc)
        self.sinks.end(rid, RequestFailed(f"the request failed at the door: {describe(exc)}"))

    def _step(self, engine: EngineLike) -> None:
        self.step_started = time.monotonic()
        outputs = engine.step(self._stepped)
        self.step_started = None
        for output in outputs:
            if output.finished:
                self._running.discard(output.request_id)
                if output.request_id in self._displaced:
                    self._displaced.remove(output.request_id)
                    self._refuse(output.request_id, AdmissionError("queue_full", _DISPLACED))
                    continue
            if not self.sinks.output(output) and not output.finished:
                self.sinks.mute(output.request_id)
                engine.abort(output.request_id)
        growths = engine.take_growths()
        if self._stepped is not None:
            self._stepped(growths)
        else:
            for request_id in self.sinks.grow(growths):
                self.sinks.mute(request_id)
                engine.abort(request_id)
        if not outputs and not engine.has_work:
            for rid in self._running:  # they would wait for ever
                self.sinks.end(rid, RequestFailed("the engine ended the request without a word"))
            self._running.clear()

    def _abort_all(self, engine: EngineLike) -> None:
        for rid in tuple(self._running):
            engine.abort(rid)
        for _ in range(4):  # the step in flight, and the one that brings the endings
            if not self._running:
                return
            self._step(engine)

    def _end(self, reason: str) -> None:
        self.step_started = None
        self.sinks.end_all(reason)
        atexit.unregister(self.close)
        try:
            while True:  # nothing more is put once sinks.over is set
                command = self.commands.get(block=False)
                if isinstance(command, _Call):
                    command.future.set_exception(EngineDeadError(reason))
        except queue.Empty:
            return


__all__ = ["ThreadClient"]
