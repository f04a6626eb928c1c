"""One streamed request of a server, with the moment of every part. httptools parses, as uvicorn's
side of it does: a client that costs much would measure itself."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

_PART = 1 << 16
_LONGEST_ERROR = 400  # characters of a server's words that are shown


class ServerFailed(RuntimeError):
    """The server refused, broke off, or answered what is no answer. The text says which."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and as what."""

    url: str  # of the interface, with its /v1
    model: str
    path: str  # "completions" or "chat/completions"
    key: str | None = None
    timeout: float = 600.0  # seconds of one request

    def body(self, prompt: str, output_len: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        what: dict[str, Any] = (
            {"prompt": prompt}
            if self.path == "completions"
            else {"messages": [{"role": "user", "content": prompt}]}
        )
        return {
            "model": self.model,
            **what,
            "max_tokens": output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }


@dataclass
class Answer:
    """What came of one request. Times in seconds on time.perf_counter()'s clock."""

    sent: float
    parts: list[float] = field(default_factory=list)  # of each part with text
    end: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    timings: Mapping[str, float] | None = None  # the server's own, where it tells them
    error: str | None = None


class _Response:
    """What httptools calls back with; the body's bytes are read by whoever owns it."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


async def ask(target: Target, body: Mapping[str, Any]) -> Answer:
    """Send one request and read its stream to the end. A failure is in the answer's `error`."""
    answer = Answer(time.perf_counter())
    try:
        async with asyncio.timeout(target.timeout):
            await _stream(target, body, answer)
        if not answer.output_tokens:
            answer.output_tokens = len(answer.parts)  # a server that sends no usage
    except TimeoutError:
        answer.error = f"no end after {target.timeout:g} s"
    except (OSError, ValueError, ServerFailed, httptools.HttpParserError) as error:
        answer.error = str(error) or type(error).__name__
    answer.end = answer.end or time.perf_counter()
    return answer


async def fetch(target: Target, path: str) -> Any:
    """The JSON at `path` below the interface's address. Errors: ServerFailed, OSError."""
    async with asyncio.timeout(target.timeout):
        reader, writer = await _connect(target)
        try:
            writer.write(_head(target, "GET", path, None))
            status, response = await _read_all(reader)
        finally:
            writer.close()
    if status != 200:
        raise ServerFailed(f"GET {target.url}/{path}: {_refusal(status, response)}")
    try:
        return json.loads(response)
    except ValueError:
        raise ServerFailed(f"GET {target.url}/{path}: the answer is no JSON") from None


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    at = urlsplit(target.url)
    secure = at.scheme == "https"
    return await asyncio.open_connection(
        at.hostname,
        at.port or (443 if secure else 80),
        ssl=ssl.create_default_context() if secure else None,
        limit=_PART,
    )


def _head(target: Target, method: str, path: str, body: bytes | None) -> bytes:
    at = urlsplit(target.url)
    lines = [
        f"{method} {at.path.rstrip('/')}/{path} HTTP/1.1",
        f"Host: {at.netloc.rpartition('@')[2]}",
        "Connection: close",
        "Accept: text/event-stream, application/json",
    ]
    if target.key is not None:
        lines.append(f"Authorization: Bearer {target.key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def _stream(target: Target, body: Mapping[str, Any], answer: Answer) -> None:
    data = json.dumps(body).encode()
    reader, writer = await _connect(target)
    try:
        writer.write(_head(target, "POST", target.path, data) + data)
        response = _Response()
        parser = httptools.HttpResponseParser(response)
        done = False
        while not response.complete and (received := await reader.read(_PART)):
            now = time.perf_counter()
            parser.feed_data(received)
            if parser.get_status_code() == 200:
                done = _events(response.body, now, answer) or done
        answer.end = time.perf_counter()
        if parser.get_status_code() != 200:
            raise ServerFailed(_refusal(parser.get_status_code(), bytes(response.body)))
        if not done:
            raise ServerFailed("the stream broke off before its [DONE]")
    finally:
        writer.close()


def _events(body: bytearray, now: float, answer: Answer) -> bool:
    """Take the whole lines out of `body`. True where one ended the stream."""
    done = False
    while (end := body.find(b"\n")) >= 0:
        line = bytes(body[:end]).strip()
        del body[: end + 1]
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if error := event.get("error"):
            words = error.get("message", error) if isinstance(error, dict) else error
            raise ServerFailed(f"the stream ended with an error: {words}")
        if any(_has_text(choice) for choice in event.get("choices") or ()):
            answer.parts.append(now)
        if usage := event.get("usage"):
            answer.input_tokens = int(usage.get("prompt_tokens") or 0)
            answer.output_tokens = int(usage.get("completion_tokens") or 0)
        if timings := event.get("timings"):
            answer.timings = timings
    return done


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(
        choice.get("text")
        or delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
    )


async def _read_all(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    while not response.complete and (received := await reader.read(_PART)):
        parser.feed_data(received)
    return parser.get_status_code(), bytes(response.body)


def _refusal(status: int, body: bytes) -> str:
    """A refused request in the server's words, where they are an OpenAI error, or in its bytes."""
    try:
        words = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        words = body.decode("utf-8", "replace").strip() or "no text"
    return f"status {status}: {str(words)[:_LONGEST_ERROR]}"
