"""ProcessClient: the engine in a supervised child process, over a socketpair.

Three things can end the child: close(), its own failure, and ours. Its death closes the socket and
is noticed at once; a child that hangs misses its heartbeats for `watchdog` seconds and is killed.
Should this process die, the child sees the socket close and ends by itself.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from . import wire
from .client import (
    CLOSE_SECONDS,
    EngineClient,
    EngineInfo,
    Grown,
    Messages,
    Sink,
    Submission,
)
from .config import EngineConfig
from .core.parameter import ParameterError
from .supervise.link import Link
from .supervise.watchdog import Watchdog

CHILD = (sys.executable, "-m", "engineroom.engine.child")
WATCHDOG_SECONDS = 30.0  # without a heartbeat: the child hangs
STEP_SECONDS = 600.0  # in one step: the child's engine hangs, though its heart beats


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
        self._link = Link(config, tuple(command), Watchdog(watchdog, step_timeout), on_progress)
        self._finalizer = weakref.finalize(self, self._link.ask_to_end, False)
        self._finalizer.atexit = False  # the link has its own, which waits

    def start(self) -> EngineInfo:
        self._link.begin()
        return self._link.inbox.ready.result()

    @property
    def is_alive(self) -> bool:
        return self._link.inbox.is_ready and self._link.inbox.sinks.over is None

    @property
    def pid(self) -> int | None:
        """The child's process id, from start() on."""
        child = self._link.child
        return None if child is None else child.pid

    @property
    def stalled_s(self) -> float:
        return self._link.watchdog.stalled_s

    def read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._link.read_on(loop)

    def abort(self, request_id: str) -> None:
        if request_id in self._link.inbox.sinks:
            self._link.abort(request_id)

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


__all__ = ["ProcessClient"]
