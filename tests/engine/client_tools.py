"""What the client tests share: clients over the fake engine, and a sink that remembers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engineroom.engine.client import EngineClient, EngineError, Sink
from engineroom.engine.client_process import ProcessClient
from engineroom.engine.client_thread import ThreadClient
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.answers import RequestOutput
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.fake import fake_engine

CHILD = (sys.executable, str(Path(__file__).with_name("fake_child.py")))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG = SamplingParams(temperature=0.0, max_tokens=1_000_000)


def make_client(form: str, model: str = "paced", **options: Any) -> EngineClient:
    config = EngineConfig(model=model)
    if form == "thread":
        return ThreadClient(lambda: fake_engine(config, lambda text: None))
    return ProcessClient(config, command=CHILD, **options)


class Collector:
    """A sink that keeps everything and can be waited for."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.errors: list[EngineError] = []
        self.ended_at = 0.0
        self._first = threading.Event()
        self._ended = threading.Event()
        self.endings = 0

    def __call__(self, item: RequestOutput | EngineError) -> None:
        if isinstance(item, EngineError):
            self.errors.append(item)
        else:
            self.outputs.append(item)
        self._first.set()
        if isinstance(item, EngineError) or item.finished:
            self.endings += 1
            self.ended_at = time.monotonic()
            self._ended.set()

    def wait_first(self, timeout: float = 10.0) -> None:
        assert self._first.wait(timeout), "nothing arrived"

    def wait(self, timeout: float = 10.0) -> RequestOutput | EngineError:
        assert self._ended.wait(timeout), f"no ending in {timeout} s"
        return self.errors[-1] if self.errors else self.outputs[-1]

    def output(self, timeout: float = 10.0) -> RequestOutput:
        item = self.wait(timeout)
        assert isinstance(item, RequestOutput), item
        return item

    def error(self, timeout: float = 10.0) -> EngineError:
        item = self.wait(timeout)
        assert isinstance(item, EngineError), item
        return item

    @property
    def text(self) -> str:
        return "".join(o.deltas[0] for o in self.outputs)


def submit(
    client: EngineClient,
    request_id: str,
    prompt: Any = "hello",
    params: SamplingParams = GREEDY,
    *,
    sink: Sink | None = None,
) -> Collector:
    collector = Collector()
    client.submit(request_id, prompt, params, sink=sink or collector)
    return collector


def until(condition: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Poll; True when it holds in time."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def is_running(pid: int) -> bool:
    """False for a process that is gone, or dead and not yet reaped by its new parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
