"""Server-sent events, and noticing that a client has gone: the two ways an answer is sent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

_encoder = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
# In an ASGI scope's extensions: {PIPE: {CONNECTION: a Connection}}.
PIPE, CONNECTION = "engineroom.pipe", "connection"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_Result = TypeVar("_Result")


class Disconnected(Exception):
    """The client went away before its answer."""


def event(value: Any, name: str | None = None) -> bytes:
    """One event of a JSON value (HTML Living Standard, server-sent events)."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encoder.encode(value) + b"\n\n"


def dump(value: Any) -> bytes:
    """JSON of an answer."""
    return _encoder.encode(value)


async def gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """The work's result; cancelled where the client leaves first. Errors: Disconnected."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        await _cancel(task)
        await _cancel(leaving)


class Connection(Protocol):
    """What a server offers of the connection that an answer goes to: from a stream's source
    straight there, without a turn of the stream's task."""

    @property
    def is_open(self) -> bool:
        """Whether write() may be called; False while the client reads too slowly."""
        ...

    def write(self, part: bytes) -> None:
        """Send a part of the body now. Only while the stream's task waits for its source."""
        ...


class _Nowhere:
    """Of an answer that has not begun, or whose server offers none: all goes through `send`."""

    is_open = False

    def write(self, part: bytes) -> None:
        raise RuntimeError("a connection that is not open was written to")


NOWHERE: Connection = _Nowhere()


class Pushing(Protocol):
    """A stream's source that writes to its connection by itself, once the answer has begun."""

    connection: Connection


class Frame:
    """An event that is always the same but for one text."""

    def __init__(self, made: Callable[[str], bytes]) -> None:
        """`made` gives the event of a text."""
        mark = secrets.token_hex(16)
        self._head, self._tail = made(mark).split(_encoder.encode(mark))

    def of(self, text: str) -> bytes:
        return b"%b%b%b" % (self._head, _encoder.encode(text), self._tail)


class EventStream:
    """An ASGI response of events, whose source is closed as soon as nobody reads any more.

    `first` was taken of `events`: what it has to refuse was refused by a status. A failure later is
    told by `failure`, whose event is the last. A slow reader holds up nothing but its own source,
    which merges what it has not sent.
    """

    status_code = 200

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        failure: Callable[[Exception], bytes],
        source: Pushing | None = None,
    ) -> None:
        self._first = first
        self._events = events
        self._failure = failure
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
        sending = asyncio.ensure_future(self._send(scope, send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancel(sending)
            await _cancel(leaving)
            await self._events.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        last = b""
        try:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            if self._source is not None:  # ours offers a connection: connection.py
                offered = scope.get("extensions", {}).get(PIPE, {})
                self._source.connection = offered.get(CONNECTION, NOWHERE)
            async for part in self._events:
                if part is DONE:  # nothing follows: it goes with the body's end
                    last = part
                    continue
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:
            last = self._failure(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
    try:
        await task
    except (asyncio.CancelledError, Exception):
        pass  # its own failure was told already, or nobody is there to be told


__all__ = [
    "DONE",
    "NOWHERE",
    "Connection",
    "Disconnected",
    "EventStream",
    "Frame",
    "Pushing",
    "dump",
    "event",
    "gone",
    "unless_gone",
]
