"""Many at once where something goes wrong: an engine that dies or stops, an end, idle readers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engineroom.engine.async_llm import AsyncLLM
from tests.counts import count
from tests.engine import golden

from .conftest import Running
from .http import completion, get, post, streaming

PLAIN = "/v1/completions"
STREAMS = 20
ENDLESS = completion("slow: without an end", max_tokens=4000)


class Crowd:
    """Streams that are read to their end on threads of their own."""

    def __init__(self, running: Running, number: int, body: dict[str, Any]) -> None:
        self.texts: list[str] = []
        self._begun: list[int] = []  # who has had the head of an answer
        self._threads = [
            threading.Thread(target=self._read, args=(running, {**body, "seed": i}))
            for i in range(number)
        ]
        for thread in self._threads:
            thread.start()
        running.wait_until(lambda: len(self._begun) == number)

    def _read(self, running: Running, body: dict[str, Any]) -> None:
        with streaming(running, PLAIN, body) as response:
            self._begun.append(body["seed"])
            self.texts.append(response.read().decode())

    def last_events(self, seconds: float) -> list[str]:
        """What each stream said last; none may hang."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), "a client hangs"
        return [text.rstrip().split("\n\n")[-1].removeprefix("data: ") for text in self.texts]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_every_stream_hears_of_the_engine_s_end(
    serving: Callable[..., Running], number: signal.Signals
) -> None:
    running = serving(watchdog=1.0)
    crowd, pid = Crowd(running, STREAMS, ENDLESS), running.service.info.pid
    os.kill(pid, number)
    errors = [json.loads(event)["error"] for event in crowd.last_events(10)]
    assert [error["code"] for error in errors] == ["engine_down"] * STREAMS
    running.wait_until(lambda: running.service.keeper.num_restarts == 1)
    running.wait_until(lambda: gone(pid))  # no orphan, stopped or not
    assert get(running, "/health").status == 200
    assert post(running, PLAIN, completion(max_tokens=2)).status == 200


def end_at_some_step(running: Running, rng: random.Random) -> None:
    """An end at a random step: what began is answered to its end, whole."""
    body = completion("hello", max_tokens=rng.randrange(60, 120), ignore_eos=True)
    crowd = Crowd(running, 3, body)
    time.sleep(rng.random() * 0.05)
    running.stop()
    assert crowd.last_events(5) == ["[DONE]"] * 3
    for text in crowd.texts:
        events = [json.loads(e.removeprefix("data: ")) for e in text.split("\n\n")[:-2]]
        assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("seed", range(count(reduced=6, full=100)))
def test_an_end_at_any_step_lets_what_runs_finish(
    serving: Callable[..., Running], seed: int
) -> None:
    running = serving("paced", drain_timeout=10.0)
    pid = running.service.info.pid
    end_at_some_step(running, random.Random(seed))
    assert gone(pid)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(golden.write(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("seed", range(count(reduced=20, full=100)))
def test_an_end_at_any_step_of_a_small_model(
    serving: Callable[..., Running], small_model: str, seed: int
) -> None:
    def make() -> AsyncLLM:
        return AsyncLLM(small_model, device="cpu", max_num_seqs=4, threads=1)

    end_at_some_step(serving(make=make, drain_timeout=10.0), random.Random(seed))


def test_fifty_slow_readers_hold_up_nobody(serving: Callable[..., Running]) -> None:
    running = serving()
    with contextlib.ExitStack() as stack:
        for i in range(50):  # their answers are asked for and never read
            body = completion(f"slow reader {i}", max_tokens=20_000, ignore_eos=True)
            stack.enter_context(streaming(running, PLAIN, body))
        running.wait_until(lambda: running.service.num_live == 50)
        for _ in range(3):
            started = time.monotonic()
            assert post(running, PLAIN, completion("b", max_tokens=5)).status == 200
            assert time.monotonic() - started < 5
    running.wait_until(lambda: running.service.num_live == 0)
    running.wait_until(lambda: running.service.keeper.llm.client.stats()["live"] == 0)


@pytest.mark.parametrize("sent", [10, 60, 150, 250])
def test_a_client_that_leaves_in_the_middle_of_its_request(server: Running, sent: int) -> None:
    body = json.dumps(completion("x" * 200)).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall((head + body)[:sent])
        time.sleep(0.05)
    assert post(server, PLAIN, completion(max_tokens=2)).status == 200
    assert server.service.num_live == 0
