"""A server in a process of its own, and the signals that end it: no orphan, and no client hangs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.client_tools import is_running, until

from .http import completion, get, post, streaming

PLAIN = "/v1/completions"
SERVER = """
import sys; sys.path.insert(0, {root!r})
from engineroom.engine.config import EngineConfig
from engineroom.engine.serve.server import serve
from engineroom.engine.serve.settings import ServeConfig
from tests.serve.conftest import AsyncLLM, _client
config = EngineConfig(model="paced")
settings = ServeConfig(port=0, drain_timeout=20.0)
sys.exit(serve(config, settings, make=lambda: AsyncLLM.from_client(_client(config, 10.0))))
"""


@dataclass
class Served:
    """A server, its engine's process, and three streams that are read to their ends."""

    process: subprocess.Popen[str]
    engine: int
    address: Any
    texts: list[str]
    readers: list[threading.Thread]

    def ends(self, seconds: float) -> list[str]:
        """What each stream said last."""
        for reader in self.readers:
            reader.join(seconds)
            assert not reader.is_alive(), "a client hangs"
        return [text.rstrip().split("\n\n")[-1].removeprefix("data: ") for text in self.texts]


@pytest.fixture
def serve() -> Iterator[Callable[[int], Served]]:
    """serve(max_tokens) -> a server with three streams of so many tokens, a millisecond each."""
    made: list[subprocess.Popen[str]] = []

    def make(max_tokens: int) -> Served:
        script = SERVER.format(root=str(Path(__file__).resolve().parents[2]))
        process = subprocess.Popen(
            [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
        )
        made.append(process)
        assert process.stderr is not None
        said = next(line for line in process.stderr if "serving paced on" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        address: Any = SimpleNamespace(port=int(json.loads(said)["message"].rpartition(":")[2]))
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        (engine,) = (int(pid) for path in children for pid in path.read_text().split())
        texts: list[str] = []

        def read(seed: int) -> None:
            body = completion("hello", model="paced", max_tokens=max_tokens, seed=seed)
            with streaming(address, PLAIN, body) as response:
                first = response.read1()
                begun.release()
                try:
                    texts.append((first + response.read()).decode())
                except (ConnectionError, HTTPException):
                    texts.append("cut off")

        begun = threading.Semaphore(0)
        readers = [threading.Thread(target=read, args=(i,)) for i in range(3)]
        for reader in readers:
            reader.start()
        for _ in readers:
            assert begun.acquire(timeout=10)
        return Served(process, engine, address, texts, readers)

    yield make
    for process in made:
        process.kill()
        process.wait()


def test_a_signal_lets_what_runs_finish(serve: Callable[[int], Served]) -> None:
    served = serve(1500)
    served.process.send_signal(signal.SIGTERM)
    assert until(lambda: get(served.address, "/health/ready").status == 503)
    refused = post(served.address, PLAIN, completion(model="paced"))
    assert refused.error["code"] == "draining"
    assert served.ends(10) == ["[DONE]"] * 3
    assert all('"finish_reason":"length"' in text for text in served.texts)
    assert served.process.wait(10) == 0 and not is_running(served.engine)


def test_a_second_signal_ends_what_runs(serve: Callable[[int], Served]) -> None:
    served = serve(4000)
    served.process.send_signal(signal.SIGTERM)
    assert until(lambda: get(served.address, "/health/ready").status == 503)
    assert all(reader.is_alive() for reader in served.readers)
    served.process.send_signal(signal.SIGTERM)
    assert served.ends(10) == ["[DONE]"] * 3
    assert all('"finish_reason":"abort"' in text for text in served.texts)
    assert served.process.wait(10) == 0 and not is_running(served.engine)


def test_a_killed_server_leaves_no_orphan_and_no_hanging_client(
    serve: Callable[[int], Served],
) -> None:
    served = serve(4000)
    served.process.kill()
    served.ends(10)
    assert until(lambda: not is_running(served.engine), 5)
