"""A server over the fake engine's process, and HTTP against it as any client would."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")

from engineroom.engine.async_llm import AsyncLLM
from engineroom.engine.client_process import ProcessClient
from engineroom.engine.config import EngineConfig
from engineroom.engine.serve.keeper import Keeper
from engineroom.engine.serve.server import Runner, bind
from engineroom.engine.serve.service import Service
from engineroom.engine.serve.settings import ServeConfig
from tests.engine.client_tools import CHILD


@dataclass
class Running:
    """A server on a thread of its own. `service` belongs to that thread's loop."""

    service: Service
    port: int
    stop: Callable[[], None]
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, what: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)


def start(
    model: str = "fake",
    *,
    make: Callable[[], AsyncLLM] | None = None,
    wait: bool = True,
    watchdog: float = 10.0,
    **options: Any,
) -> Running:
    """A server of the fake model, or of what `make` makes, on a free port; `watchdog`: the
    engine's, in seconds."""
    settings = ServeConfig(port=0, **options)
    config = EngineConfig(model=model)
    keeper = Keeper(make or (lambda: AsyncLLM.from_client(_client(config, watchdog))))
    listener = bind(settings)
    made: list[Any] = []
    ready = threading.Event()

    async def run() -> None:
        service = Service(keeper, settings, "fake", version="0")
        runner = Runner(service)
        made.extend((service, runner, asyncio.get_running_loop()))
        ready.set()
        await runner.run(listener)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(10)
    service, runner, loop = made

    def stop() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(runner.stop)
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"

    running = Running(service, listener.getsockname()[1], stop, loop)
    if wait:
        running.wait_until(lambda: service.keeper.is_ready)
    return running


def _client(config: EngineConfig, watchdog: float) -> ProcessClient:
    return ProcessClient(config, command=CHILD, watchdog=watchdog)


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    running = start()
    yield running
    running.stop()


@pytest.fixture
def serving() -> Iterator[Callable[..., Running]]:
    """Make servers with options of their own; they end with the test."""
    made: list[Running] = []

    def make(model: str = "fake", **options: Any) -> Running:
        made.append(start(model, **options))
        return made[-1]

    yield make
    for running in made:
        running.stop()
