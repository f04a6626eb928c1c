"""Streams of text: written from the engine's socket to the connection, or by way of ASGI."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.serve import schema
from engineroom.engine.serve.app import make_app
from engineroom.engine.serve.connection import BodyWriter
from engineroom.engine.serve.requests import completion_params
from engineroom.engine.serve.sse import DONE

from .conftest import Running
from .http import chat, completion, post, streaming

TOKENS = 60
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Parts that went past the streams' tasks."""
    parts: list[bytes] = []
    write = BodyWriter.write

    def noting(connection: BodyWriter, part: bytes) -> None:
        parts.append(part)
        write(connection, part)

    monkeypatch.setattr(BodyWriter, "write", noting)
    return parts


def text(events: list[Any]) -> str:
    choices = [c for e in events for c in e["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [None, {"include_usage": True}], ids=["plain", "usage"])
def test_parts_of_text_go_straight_to_the_connection(
    serving: Callable[..., Running], written: list[bytes], path: str, usage: Any
) -> None:
    running = serving("paced")
    form = chat if "chat" in path else completion
    body = form(max_tokens=TOKENS, seed=3)
    whole = post(running, path, body).json["choices"][0]
    events = post(running, path, {**body, "stream": True, "stream_options": usage}).events
    assert text(events) == (whole["text"] if "text" in whole else whole["message"]["content"])
    parts = [json.loads(part.removeprefix(b"data: ")) for part in written]
    assert len(text(parts)) > len(text(events)) / 3  # a slow machine's parts are few, and longer
    assert all(part in events for part in parts)
    shapes = {(*e, *e["choices"][0]) for e in events if e["choices"]}
    assert len({s for s in shapes if "seed" not in s}) == 1  # pushed parts look like the others
    assert all(e.get("usage", 0) is (None if usage else 0) for e in parts)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"logprobs": 1},
        {"return_token_ids": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"prompt": ["a", "b"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_parts_that_tell_more_than_text_are_made_of_whole_outputs(
    serving: Callable[..., Running], written: list[bytes], more: dict[str, Any]
) -> None:
    body = completion(max_tokens=12, seed=3, stream=True) | more
    events = post(serving("paced"), "/v1/completions", body).events
    assert text(events) and not written


def test_tool_calls_are_pushed_as_they_are_read(
    serving: Callable[..., Running], written: list[bytes]
) -> None:
    running = serving("hermes")
    said = 'Well. <tool_call>{"name": "look", "arguments": {"at": "the sea"}}</tool_call>'
    body = chat(f"say«{said}»", max_tokens=200, tools=[TOOL])
    whole = post(running, "/v1/chat/completions", body).json["choices"][0]
    events = post(running, "/v1/chat/completions", {**body, "stream": True}).events
    calls = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls") or ()]
    arguments = "".join(c["function"].get("arguments") or "" for c in calls)
    assert arguments == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert text(events).strip() == whole["message"]["content"].strip() == "Well."
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert any(b"tool_calls" in part for part in written)


@pytest.mark.parametrize("is_so", ["", "closing", "full", "answered", "of one piece"])
def test_a_connection_is_written_to_only_while_it_takes_parts(is_so: str) -> None:
    cycle = SimpleNamespace(
        chunked_encoding=is_so != "of one piece",
        transport=SimpleNamespace(is_closing=lambda: is_so == "closing"),
        flow=SimpleNamespace(write_paused=is_so == "full"),
        response_complete=is_so == "answered",
    )
    assert BodyWriter(cycle).is_open is not bool(is_so)


@pytest.mark.parametrize("lacks", ["", "flow", "chunked_encoding"])
def test_a_uvicorn_of_another_make_is_not_written_to(lacks: str) -> None:
    flow = SimpleNamespace(write_paused=False)
    parts = {"flow": flow, "transport": None, "chunked_encoding": None, "response_complete": False}
    assert BodyWriter.knows(SimpleNamespace(**parts)) is True
    parts.pop(lacks, None)
    assert BodyWriter.knows(SimpleNamespace(**parts)) is not bool(lacks)


def test_a_server_that_offers_no_connection_gets_the_same_parts(
    serving: Callable[..., Running], written: list[bytes]
) -> None:
    running = serving("paced")
    body = completion(max_tokens=TOKENS, seed=3, stream=True)
    events = post(running, "/v1/completions", body).events
    written.clear()
    app = make_app(running.service)
    sent: list[Any] = []
    told = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if told:
            return told.pop()
        await asyncio.sleep(30)  # it stays to the end

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await app({**scope, "query_string": b"", "root_path": ""}, receive, send)

    future = asyncio.run_coroutine_threadsafe(ask(), running.loop)
    future.result(20)
    data = b"".join(m.get("body", b"") for m in sent).decode()
    parts = [json.loads(p.removeprefix("data: ")) for p in data.split("\n\n")[:-2]]
    assert text(parts) == text(events)
    assert sent[-1] == {"type": "http.response.body", "body": DONE, "more_body": False}
    assert not written


def test_parameters_that_are_asked_for_again_are_not_checked_again() -> None:
    def asked(**fields: Any) -> SamplingParams:
        body = completion(stop=["a", "b"], logit_bias={"7": 1.5}, **fields)
        request = msgspec.json.decode(json.dumps(body), type=schema.CompletionRequest)
        return completion_params(request)

    first = asked(max_tokens=3)
    assert asked(max_tokens=3) is first
    assert asked(max_tokens=4) == dataclasses.replace(first, max_tokens=4)
    given = {"stop": ["a", "b"], "logit_bias": {7: 1.5}, "max_tokens": 3}
    assert first == SamplingParams(**given)
    for _ in range(2):
        with pytest.raises(ParameterError):
            asked(max_tokens=-3)


def test_a_reader_who_stops_and_goes_on_gets_all_of_it_and_neighbours_wait_for_nobody(
    serving: Callable[..., Running],
) -> None:
    """Its connection is full: what comes meanwhile is kept as text, and sent in larger parts."""
    running = serving("paced")
    tokens = 1500
    whole = post(running, "/v1/completions", completion(max_tokens=tokens)).json["choices"][0]
    body = json.dumps(completion(max_tokens=tokens, stream=True)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", running.port))
        slow.sendall(head + body)
        running.wait_until(lambda: running.service.num_live == 1)
        beside = post(running, "/v1/completions", completion("b", max_tokens=20, stream=True))
        assert beside.status == 200
        # The slow one's connection keeps its stream live when its request has ended.
        time.sleep(1.0)
        data = b""
        while chunk := slow.recv(1 << 16):
            data += chunk
    events = [e for line in data.split(b"\n") if (e := line.strip()).startswith(b"data: {")]
    assert text([json.loads(e[6:]) for e in events]) == whole["text"]


def test_a_connection_goes_on_behind_a_stream(server: Running) -> None:
    with streaming(server, "/v1/completions", completion(max_tokens=9)) as response:
        first = response.read()
    assert first.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_is_left_counts_what_it_was_shown(serving: Callable[..., Running]) -> None:
    running = serving("paced")
    body = completion(max_tokens=3000, stream=True)
    with streaming(running, "/v1/completions", body) as response:
        seen = response.read(4000)
    running.wait_until(lambda: running.service.num_live == 0)
    page = running.service.metrics.page(None, ready=True, restarts=0).decode()
    (line,) = [x for x in page.splitlines() if x.startswith("engineroom_generated_tokens_total")]
    assert float(line.split()[-1]) >= 3 * (seen.count(b"data: ") - 1)
    assert 'finish_reason="abort"' in page and 'finish_reason="refused"' not in page
