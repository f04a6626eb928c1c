"""Mailbox: from a client's thread to an event loop, at most one output, merged, and one error."""

from __future__ import annotations

import array
import asyncio
import dataclasses
import io
import threading
import time
from collections.abc import Callable

from .client import EngineError, merge
from .core.answers import Growth, RequestOutput, Timings, Usage

Push = Callable[[Growth], bool]


class Mailbox:
    """What came for one request and was not read yet.

    What grows behind the latest output is pushed, or added to it when it is taken. What a step
    touches of each of many streams comes from memory: so there is little of it.
    """

    __slots__ = (
        "_closed",
        "_error",
        "_grown",
        "_latest",
        "_lock",
        "_loop",
        "_output",
        "_since",
        "_text",
        "_thread",
        "_token_ids",
        "_unread",
        "_waiter",
        "push",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, push: Push | None) -> None:
        """On the loop."""
        self._loop = loop
        self.push = push
        self._thread = threading.get_ident()
        self._lock = threading.RLock()  # who is pushed to may ask so_far()
        self._output: RequestOutput | None = None
        self._latest: RequestOutput | None = None  # the one that came last, taken or not
        self._since = 0.0  # when that was, monotonic seconds
        self._text = io.StringIO()  # that grew behind the latest, and its tokens
        self._token_ids = array.array("q")
        self._unread = ""  # of the text, neither pushed nor taken
        self._grown = False  # something was not
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None  # a reader that nobody has woken yet
        self._closed = False

    def put(self, item: RequestOutput | EngineError) -> None:
        """From any thread; from the loop's own the cheapest."""
        with self._lock:
            if self._closed:
                return
            if isinstance(item, RequestOutput):
                if self._grown:
                    self._output = self._take_growth()
                self._output = item if self._output is None else merge(self._output, item)
                self._latest, self._since = item, time.monotonic()
                if self._token_ids:
                    self._text, self._token_ids = io.StringIO(), array.array("q")
            else:
                self._error = item
        self.wake()

    def grow(self, growth: Growth) -> None:
        """As put(), of a request whose first output came."""
        with self._lock:
            if self._closed:
                return
            self._text.write(growth.text)
            self._token_ids.extend(growth.token_ids)
            waiter = self._waiter
            waits = waiter is not None and not waiter.done()  # it may have been cancelled
            waits = waits and threading.get_ident() == self._thread
            if waits and self.push is not None and self.push(growth):
                return
            self._unread += growth.text
            self._grown = True
        self.wake()

    def _take_growth(self) -> RequestOutput:
        """The output that shows what has grown. With the lock held."""
        whole = self._whole()
        assert whole is not None  # ours: a first output comes before what grows
        unread, self._unread, self._grown = self._unread, "", False
        whole = dataclasses.replace(whole, deltas=(unread,))
        return whole if self._output is None else merge(self._output, whole)

    def so_far(self) -> RequestOutput | None:
        with self._lock:
            return self._whole()

    def _whole(self) -> RequestOutput | None:
        """The latest output with what grew behind it, and the time that took as it came here."""
        latest = self._latest
        if latest is None or not self._token_ids:
            return latest
        choice, usage, times = latest.outputs[0], latest.usage, latest.timings
        more = time.monotonic() - self._since
        return dataclasses.replace(
            latest,
            outputs=(
                dataclasses.replace(
                    choice,
                    text=choice.text + self._text.getvalue(),
                    token_ids=choice.token_ids + tuple(self._token_ids),
                ),
            ),
            usage=Usage(
                usage.prompt_tokens,
                usage.completion_tokens + len(self._token_ids),
                usage.cached_tokens,
            ),
            timings=Timings(
                times.queued_s,
                times.prefill_s,
                times.decode_s + more,
                times.total_s + more,
                times.time_to_first_token_s,
            ),
            deltas=("",),
        )

    async def take(self) -> RequestOutput | EngineError:
        """On the loop."""
        while True:
            with self._lock:
                if self._closed:
                    raise StopAsyncIteration
                if self._grown:
                    self._output = self._take_growth()
                if (output := self._output) is not None:
                    self._output = None
                    return output
                if self._error is not None:
                    return self._error
                waiter = self._waiter = self._loop.create_future()
            await waiter

    def close(self) -> None:
        """From any thread, and without the lock: a collector may run in its holder."""
        self._closed = True

    def wake(self) -> None:
        """Let take() look again. From any thread. Errors: RuntimeError where nobody ever can."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
        here = threading.get_ident() == self._thread
        if not here and self._loop.is_closed():
            raise RuntimeError("the event loop that reads this request is closed")
        if waiter is None:
            return
        if here:
            _wake(waiter)
        else:
            self._loop.call_soon_threadsafe(_wake, waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # its task may have been cancelled
        waiter.set_result(None)


__all__ = ["Mailbox", "Push"]
