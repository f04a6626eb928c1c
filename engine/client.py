"""EngineClient: what any form of client promises, its errors, and the sinks of live requests.

A client owns one engine that runs elsewhere: on a thread (client_thread.py) or in a child process
(client_process.py). Each request has a sink, called from the client's thread with every
RequestOutput and, exactly once, with an ending: an output with finished=True, or an EngineError.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .config import EngineConfig, ModelConfig
from .core.answers import Growth, RequestOutput
from .core.checks import (
    AdmissionError,
    as_prompt,
    check_identity,
    check_params,
    check_token_ids,
    check_weight,
)
from .core.parameter import ParameterError
from .core.sampling_params import SamplingParams

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

CLOSE_SECONDS = 10.0  # what close() waits for a step to end
CLOSED = "the engine was closed"

# ------------------------------------------------------------------------------------------- errors


class EngineError(RuntimeError):
    """Something that an engine could not do for a request or a caller."""


class EngineStartError(EngineError):
    """The engine could not be loaded. `kind` is the class of the reason, `field` what it names."""

    def __init__(self, message: str, *, kind: str = "", field: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.field = field


class EngineDeadError(EngineError):
    """The engine has ended, by close() or by failing; the message says which and why."""


class RequestRefused(EngineError):
    """The caller's request cannot be honoured. `error` is the ParameterError or AdmissionError.

    `kind` is that error's class, `field` its field or code.
    """

    def __init__(self, error: Exception | None, message: str, *, kind: str, field: str) -> None:
        super().__init__(message)
        self.error = error
        self.kind = kind
        self.field = field

    @classmethod
    def of(cls, error: ValueError) -> RequestRefused:
        """Of another class it would not come back from a process, so a thread hides it too."""
        known = error if isinstance(error, ParameterError | AdmissionError) else None
        return cls(known, str(error), kind=type(error).__name__, field=named_by(error))

    @classmethod
    def from_text(cls, kind: str, field: str, text: str) -> RequestRefused:
        """From another process. ParameterError and AdmissionError come back as themselves."""
        error: Exception | None = None
        if kind == ParameterError.__name__:
            error = ParameterError(field, text)
        elif kind == AdmissionError.__name__ and field in AdmissionError.CODES:
            error = AdmissionError(field, text)
        return cls(error, text, kind=kind, field=field)

    def unwrap(self) -> Exception:
        """What to raise to the caller: the error itself where it is known here."""
        return self if self.error is None else self.error


class RequestFailed(EngineError):
    """One request failed through no fault of its caller's; the engine lives on."""


def named_by(error: BaseException) -> str:
    """What a typed error says it is about: its field or code."""
    name = getattr(error, "field", None) or getattr(error, "code", None) or ""
    return name if isinstance(name, str) else ""


def describe(error: BaseException) -> str:
    """ "RuntimeError: out of cheese"."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# ---------------------------------------------------------------------------------------- interface

Sink = Callable[[RequestOutput | EngineError], None]
Grown = Callable[[Growth], None]  # of a request that takes Growths between its outputs
Messages = Sequence[Mapping[str, Any]]


class Added(Protocol):
    """The part of AddedRequest that a client uses."""

    @property
    def displaced(self) -> Sequence[str]: ...


class EngineLike(Protocol):
    """The part of Engine that a client uses.

    All of it runs on one thread but is_prepared(), prepare(), render_chat(), tokenize() and
    detokenize().
    """

    @property
    def config(self) -> EngineConfig: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def chat_template(self) -> object | None: ...
    @property
    def has_work(self) -> bool: ...
    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        final_only: bool = False,
        growths: bool = False,
        embed: bool = False,
        tenant: str = "",
        weight: float = 1.0,
    ) -> Added: ...
    def step(
        self, tell: Callable[[Sequence[Growth]], None] | None = None
    ) -> Sequence[RequestOutput]: ...
    def take_growths(self) -> list[Growth]: ...
    def abort(self, request_id: str) -> object: ...
    def is_prepared(self, params: SamplingParams) -> bool: ...
    def prepare(self, params: SamplingParams) -> None: ...
    def render_chat(self, messages: Messages, **options: Any) -> list[int]: ...
    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def stats(self) -> Any: ...
    def facts(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


EngineFactory = Callable[[], EngineLike]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What runs: its configuration as resolved at load, and in which process."""

    config: EngineConfig
    model: ModelConfig
    has_chat_template: bool
    chat_template: str | None = None  # its source
    pid: int
    thread: int  # that turns the engine, as the system numbers threads


@dataclass(frozen=True)
class Submission:
    """A request on its way to an engine, checked by EngineClient.submit()."""

    request_id: str
    prompt: str | tuple[int, ...]
    params: SamplingParams
    priority: int
    cache_salt: bytes
    final_only: bool = False
    embed: bool = False
    tenant: str = ""
    weight: float = 1.0
    growths: bool = False


class EngineClient(ABC):
    """One engine, used from any thread. Use as a context manager, or call start() and close()."""

    @abstractmethod
    def start(self) -> EngineInfo:
        """Load, and return when ready; again: the same answer. Errors: EngineStartError."""

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:  # noqa: B027
        """From now on sinks are best called on this running loop; call it there, as often as you
        like. A client that may choose where it reads does so, and saves a hop for every token."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request with what it has; returns at once, at any moment, also twice.

        Its sink still gets its ending. An id that is not known is nothing to do.
        """

    @abstractmethod
    def render_chat(self, messages: Messages, **options: Any) -> list[int]:
        """Prompt token ids of a chat; blocks, not for an event loop.

        Errors: RequestRefused (a template's refusal, no template), RequestFailed, EngineDeadError.
        """

    @abstractmethod
    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; blocks. Errors: those of render_chat()."""

    @abstractmethod
    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; blocks. Errors: render_chat()'s."""

    @abstractmethod
    def stats(self, timeout: float = 30.0) -> dict[str, Any]:
        """EngineStats as plain data; blocks until the step in flight ends.

        Errors: EngineDeadError; TimeoutError.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the engine's answers depend on: receipts.facts.all_facts(). Blocks; the first time
        it reads the whole model. Errors: RequestFailed, EngineDeadError."""

    @abstractmethod
    def close(self, *, drain: bool = False, timeout: float = CLOSE_SECONDS) -> None:
        """End the engine; again: nothing. What runs is aborted, or with `drain` may finish first.

        Returns within about `timeout` seconds; every live request has then had its ending.
        """

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """True from start() until the engine is closed or has failed."""

    @property
    @abstractmethod
    def stalled_s(self) -> float:
        """For how long the engine has shown no progress on what it has to do, in seconds."""

    @abstractmethod
    def _submit(self, submission: Submission, sink: Sink, grown: Grown | None) -> None: ...

    def submit(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        final_only: bool = False,
        embed: bool = False,
        tenant: str = "",
        weight: float = 1.0,
        sink: Sink,
        grown: Grown | None = None,
    ) -> None:
        """Hand over a request; returns at once. `sink` must not block, and is not called in here.
        `final_only`, `embed`, `tenant` and `weight` are Engine.add_request()'s. With `grown`, which
        is called as `sink` is, steps between the first output and the last may bring a Growth
        instead.

        What the engine's door refuses comes to the sink as RequestRefused. Errors: EngineDeadError;
        AdmissionError("duplicate_id") while a request of this id lives, ("token_id") for what is no
        token id of any model; ParameterError.
        """
        check_identity(request_id, priority, cache_salt)
        check_weight(weight)
        check_params(params)
        prompt = as_prompt(prompt)
        if not isinstance(prompt, str):
            check_token_ids(params, prompt)  # the engine, which knows its vocabulary, does it again
            prompt = tuple(prompt)
        shape = (final_only, embed, tenant, weight, grown is not None)
        submission = Submission(request_id, prompt, params, priority, cache_salt, *shape)
        self._submit(submission, sink, grown)

    def __enter__(self) -> EngineClient:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def merge(waiting: RequestOutput | None, new: RequestOutput) -> RequestOutput:
    """`new` for a reader who has not seen `waiting`: the deltas of both, in order."""
    if waiting is None:
        return new
    pairs = itertools.zip_longest(waiting.deltas, new.deltas, fillvalue="")
    deltas = tuple(a + b for a, b in pairs)
    return dataclasses.replace(new, deltas=deltas[: len(new.outputs)])


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _ignore(_: RequestOutput | EngineError) -> None:
    """The sink of a request that nobody reads."""


class Sinks:
    """The live requests of a client: each sink is taken out exactly once, for its ending."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finalizer may run in any line of its holder
        self.over: str | None = None  # why nothing more is accepted
        self.live: dict[str, Sink] = {}  # to look into; what changes it is below
        self._growing: dict[str, Grown] = {}  # of those live ones that take growths

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.live

    def __len__(self) -> int:
        return len(self.live)

    def check(self) -> None:
        """Errors: EngineDeadError, saying why. Call with the lock held."""
        if self.over is not None:
            raise EngineDeadError(self.over)

    def add(self, request_id: str, sink: Sink, grown: Grown | None = None) -> None:
        """Errors: EngineDeadError; AdmissionError("duplicate_id"). Call with the lock held."""
        self.check()
        if request_id in self.live:
            raise AdmissionError(
                "duplicate_id",
                f"a request with the id {request_id!r} is running; ids are free again when a "
                "request has ended",
            )
        self.live[request_id] = sink
        if grown is not None:
            self._growing[request_id] = grown

    def grow(self, growths: Iterable[Growth]) -> list[str]:
        """Pass growths on. Returns the ids of those whose sink failed, as output() says it."""
        failed = []
        growing = self._growing
        for growth in growths:
            grown = growing.get(growth.request_id)
            if grown is not None and not self._call(grown, growth):
                failed.append(growth.request_id)
        return failed

    def output(self, output: RequestOutput) -> bool:
        """Pass an output on. False where its sink failed: nobody reads, so it may be aborted."""
        if output.finished:
            sink = self._pop(output.request_id)
        else:
            sink = self.live.get(output.request_id)
        return sink is None or self._call(sink, output)

    def end(self, request_id: str, error: EngineError) -> None:
        """End a request with an error."""
        sink = self._pop(request_id)
        if sink is not None:
            self._call(sink, error)

    def mute(self, request_id: str) -> None:
        """Call this request's sink no more; its id stays taken until its ending."""
        with self.lock:
            if request_id in self.live:
                self.live[request_id] = _ignore
                self._growing.pop(request_id, None)

    def end_all(self, reason: str) -> None:
        """Accept nothing more, and end every live request with EngineDeadError."""
        with self.lock:
            self.over = self.over or reason
            live, self.live = self.live, {}
            self._growing.clear()
        for sink in live.values():
            self._call(sink, EngineDeadError(reason))

    def _pop(self, request_id: str) -> Sink | None:
        with self.lock:
            self._growing.pop(request_id, None)
            return self.live.pop(request_id, None)

    def _call(self, sink: Callable[[_Item], None], item: _Item) -> bool:
        try:
            sink(item)
        except Exception:  # a reader's failure is its own: neighbours and engine go on
            log.exception("a request's sink failed; the request is aborted")
            return False
        return True


__all__ = [
    "EngineClient",
    "EngineDeadError",
    "EngineError",
    "EngineInfo",
    "EngineStartError",
    "RequestFailed",
    "RequestRefused",
    "Sink",
    "Submission",
]
