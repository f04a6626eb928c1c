"""One terminal's engine: opens a model with progress on stderr and runs one request at a time."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from ..config import EngineConfig
from ..core.answers import RequestOutput
from ..core.sampling_params import SamplingParams
from ..engine import Engine
from ..load.source import resolve


class RequestFailed(RuntimeError):
    """The engine ended a request with an error."""


class EngineLike(Protocol):
    """What a session needs of an engine; a test gives its own."""

    def add_request(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams
    ) -> Any: ...

    def abort(self, request_id: str) -> bool: ...

    def step(self) -> list[RequestOutput]: ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]: ...


def open_engine(config: EngineConfig) -> Engine:
    """Resolve (fetching where the name says so), load, and report on stderr of a terminal.

    Errors: those of resolve and Engine.from_model.
    """
    source = resolve(config.model, progress=sys.stderr)
    say: Callable[[str], None] | None = None
    if sys.stderr.isatty():
        say = _say
    return Engine.from_model(str(source.path), config.replace(model=str(source.path)), say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Session:
    """Runs requests one after the other. `interrupt()` ends the running one after its step."""

    def __init__(self, engine: EngineLike) -> None:
        self.engine = engine
        self._ids = itertools.count(1)
        self._interrupted = False

    def interrupt(self) -> None:
        self._interrupted = True

    def run(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[RequestOutput]:
        """The request's outputs as they grow; the last has finished=True.

        After interrupt() the last one's finish_reason is "abort" and it holds what came so far.
        Errors: ParameterError, AdmissionError, RequestFailed.
        """
        request_id = f"request-{next(self._ids)}"
        self._interrupted = False
        self.engine.add_request(request_id, prompt, params)
        finished = False
        try:
            while not finished:
                if self._interrupted:
                    self._interrupted = False
                    self.engine.abort(request_id)
                for output in self.engine.step():
                    if output.request_id == request_id:
                        finished = output.finished
                        yield output
                        raise_failure(output)
        finally:
            if not finished:  # the caller left the loop
                self.engine.abort(request_id)
                self.engine.step()


def raise_failure(output: RequestOutput) -> None:
    """Errors: RequestFailed where the engine ended the request with an error."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise RequestFailed(completion.error or "the engine gave no reason")


@contextlib.contextmanager
def ctrl_c(action: Callable[[], None]) -> Iterator[None]:
    """While inside, the first Ctrl-C calls `action`; a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


__all__ = ["EngineLike", "RequestFailed", "Session", "ctrl_c", "open_engine", "raise_failure"]
