"""Inbox: the requests and calls that wait for what a child says, and what each message brings."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .. import differences, wire
from ..client import (
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStartError,
    RequestFailed,
    RequestRefused,
    Sinks,
)
from ..core.answers import RequestOutput

log = logging.getLogger(__name__)


class Inbox:
    """Of one child. `give_up` is called with the id of a request whose reader failed; `progress`
    with words while the model loads. `ready` has its result once the engine is loaded, or an
    EngineStartError.
    """

    def __init__(
        self, give_up: Callable[[str], None], progress: Callable[[str], None] | None
    ) -> None:
        self.sinks = Sinks()
        self.ready: Future[EngineInfo] = Future()
        self.is_ready = False
        self._give_up = give_up
        self._progress = progress
        self._calls: dict[int, Future[Any]] = {}
        self._tickets = itertools.count(1)
        self._sent: dict[str, RequestOutput] = {}  # reader's: what each live request has shown

    # ------------------------------------------------------------------------- from any thread

    def ticket(self) -> int:
        """What a call and its answer have in common."""
        return next(self._tickets)

    def expect(self, ticket: int) -> Future[Any]:
        """The answer to come. Errors: EngineDeadError. Call with the sinks' lock held."""
        self.sinks.check()
        answer = self._calls[ticket] = Future()
        return answer

    # --------------------------------------------------------------------- by whoever reads

    def take(self, message: wire.ToParent) -> None:
        """Hand one message to whom it is for."""
        match message:
            case wire.Growths(growths=growths):
                for request_id in self.sinks.grow(growths):
                    self._mute(request_id)
            case wire.Output():
                self._output(message)
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
                self._tell(text)
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

    def _tell(self, text: str) -> None:
        if self._progress is not None:
            try:
                self._progress(text)
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
            self._mute(rid)

    def _mute(self, request_id: str) -> None:
        """Its sink failed: nobody reads."""
        self.sinks.mute(request_id)
        self._give_up(request_id)

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

    # ------------------------------------------------------------------------------- the end

    def end_all(self, reason: str, kind: str = "", field: str = "") -> None:
        """Accept nothing more, and end whatever waits; start() with EngineStartError's fields."""
        self.sinks.end_all(reason)
        with self.sinks.lock:
            calls, self._calls = self._calls, {}
        for future in calls.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDeadError(reason))
        if not self.is_ready:
            self.ready.set_exception(EngineStartError(reason, kind=kind, field=field))


__all__ = ["Inbox"]
