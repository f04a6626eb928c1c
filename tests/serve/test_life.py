"""Misfortunes: clients that leave, read slowly or wait too long; an engine that dies; the end."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import pytest

from engineroom.engine.config import ConfigError
from engineroom.engine.serve.accesslog import JsonFormatter
from engineroom.engine.serve.server import bind
from engineroom.engine.serve.settings import ServeConfig

from .conftest import Running
from .http import chat, completion, get, post, streaming

PLAIN = "/v1/completions"
LONG = completion("slow: a long one", max_tokens=4000)


@pytest.mark.parametrize("parts", [0, 1, 5, 50])
def test_a_client_that_leaves_ends_its_request(server: Running, parts: int) -> None:
    with streaming(server, PLAIN, LONG) as response:
        for _ in range(parts):
            assert response.readline()
        server.wait_until(lambda: server.service.num_live == 1)
    server.wait_until(lambda: server.service.num_live == 0)
    # The engine's process holds nothing of it either.
    server.wait_until(lambda: server.service.keeper.llm.client.stats()["live"] == 0)


def test_one_that_leaves_before_its_whole_answer(server: Running) -> None:
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        server.wait_until(lambda: server.service.num_live == 1)
    server.wait_until(lambda: server.service.num_live == 0)


def test_slow_readers_hold_up_nobody(server: Running) -> None:
    with streaming(server, PLAIN, completion("a", max_tokens=20_000, ignore_eos=True)):
        # Nobody reads that one; its parts are merged, and others are answered meanwhile.
        started = time.monotonic()
        assert post(server, PLAIN, completion("b", max_tokens=5)).status == 200
        assert time.monotonic() - started < 5
    server.wait_until(lambda: server.service.num_live == 0)


def test_a_deadline_ends_a_request_with_its_own_reason(server: Running) -> None:
    answer = post(server, PLAIN, {**LONG, "timeout_ms": 500}).json  # time for some text
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "timeout" and choice["text"]
    events = post(server, PLAIN, {**LONG, "timeout_ms": 100, "stream": True}).events
    assert events[-1]["choices"][0]["finish_reason"] == "timeout"
    assert post(server, PLAIN, completion(timeout_ms=60_000, max_tokens=3)).json["choices"][0][
        "finish_reason"
    ] == ("length")


def test_an_engine_that_is_killed_is_started_anew(serving: Any) -> None:
    running = serving()
    first = running.service.info.pid
    seen: list[bytes] = []

    def read() -> None:
        with streaming(running, PLAIN, LONG) as response:
            seen.append(response.read())

    reader = threading.Thread(target=read)
    reader.start()
    running.wait_until(lambda: running.service.num_live == 1)
    os.kill(first, signal.SIGKILL)
    reader.join(10)
    last = json.loads(seen[0].decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_down"
    running.wait_until(lambda: running.service.keeper.num_restarts == 1)
    assert running.service.info.pid != first
    assert post(running, PLAIN, completion(max_tokens=2)).status == 200
    assert get(running, "/health").json["engine_restarts"] == 1


def test_health_tells_of_an_engine_without_progress(serving: Any) -> None:
    running = serving(health_timeout=1.0)
    hang = threading.Thread(target=post, args=(running, PLAIN, completion("hang:3:", max_tokens=1)))
    hang.start()
    running.wait_until(lambda: get(running, "/health").status == 503, 8)
    assert get(running, "/health").json["status"] == "stalled"
    hang.join(10)
    running.wait_until(lambda: get(running, "/health").status == 200)


def test_draining_lets_what_runs_finish(serving: Any) -> None:
    running = serving(drain_timeout=20.0)
    whole: list[Any] = []
    body = completion("slow: it", max_tokens=700)
    asking = threading.Thread(target=lambda: whole.append(post(running, PLAIN, body)))
    asking.start()
    running.wait_until(lambda: running.service.num_live == 1)
    ending = threading.Thread(target=running.stop)
    ending.start()
    running.wait_until(lambda: running.service.draining)
    refused = post(running, PLAIN, completion())
    assert refused.error["code"] == "draining" and refused.headers["retry-after"]
    assert get(running, "/health/ready").status == 503 and get(running, "/health").status == 200
    asking.join(15)
    assert whole[0].json["choices"][0]["finish_reason"] == "length"
    ending.join(15)


def test_draining_has_an_end(serving: Any) -> None:
    running = serving(drain_timeout=0.2)
    with streaming(running, PLAIN, {**LONG, "max_tokens": 100_000}) as response:
        running.wait_until(lambda: running.service.num_live == 1)
        running.stop()
        last = response.read().decode().strip().split("\n\n")[-1]
    assert "engine_down" in last or "abort" in last or "[DONE]" in last


def test_no_string_forges_a_line_of_the_log() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("test.forged")
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning('one\n{"level": "forged"}\r\u2028\x00', extra={"fields": {"path": "/\n\u0085"}})
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["path"] == "/\n\u0085"


def test_two_keys_share_no_prefix() -> None:
    from engineroom.engine.core.sampling_params import SamplingParams
    from engineroom.engine.serve.service import NOBODY, Caller, Work

    def salt(caller: Caller, own: str | None = None) -> bytes:
        return Work(prompt="x", params=SamplingParams(), caller=caller, cache_salt=own).salt

    one, two = (Caller.of(k, shared_cache=False) for k in ("one-key", "two-key"))
    assert len({salt(one), salt(two), salt(one, "a"), salt(NOBODY), salt(NOBODY, "a")}) == 5
    assert salt(Caller.of("one-key", shared_cache=True)) == salt(NOBODY) == b""


def test_thirty_streams_are_as_each_alone(server: Running) -> None:
    """Thirty streams at once are as each is alone."""
    alone = post(server, "/v1/chat/completions", chat(max_tokens=30, seed=1)).json
    texts: list[str] = []

    def one() -> None:
        events = post(
            server, "/v1/chat/completions", chat(max_tokens=30, seed=1, stream=True)
        ).events
        texts.append("".join(e["choices"][0]["delta"].get("content", "") for e in events))

    threads = [threading.Thread(target=one) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == [alone["choices"][0]["message"]["content"]] * 30


def test_an_answer_s_second_write_does_not_wait_for_the_first_one_s_receipt() -> None:
    with (
        bind(ServeConfig(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_key_file_says_weights() -> None:
    settings = ServeConfig(api_keys=("one-long-key", "two-long-key weight=2.5"))
    assert settings.weights == {"one-long-key": 1.0, "two-long-key": 2.5}
    for entry in ("a-long-key weight=0", "a-long-key weight=x", "a-long-key heavy", "a-long-key "):
        with pytest.raises(ConfigError, match="weight=NUMBER"):
            ServeConfig(api_keys=(entry,))


def test_the_engine_knows_whose_request_it_is_and_not_the_key(serving: Any) -> None:
    running = serving(api_keys=("one-long-key", "two-long-key weight=2.5"))
    for key in ("one-long-key", "two-long-key"):
        answer = post(running, PLAIN, completion(max_tokens=1), {"x-api-key": key})
        assert answer.status == 200
    weights = running.service.keeper.llm.client.stats()["weights"]
    assert sorted(weights.values()) == [1.0, 2.5] and "one-long-key" not in weights
