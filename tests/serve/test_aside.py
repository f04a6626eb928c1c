"""Which cores the server's event loop runs on."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.serve.aside import Aside

from .conftest import Running
from .http import completion, post

pytestmark = [
    pytest.mark.cores,
    pytest.mark.skipif(
        not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
        reason="needs Linux and two cores",
    ),
]


def _on_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns on a thread of its own, whose cores end with it."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(30)


class Elsewhere:
    """A thread that stays on one core."""

    def __init__(self, core: int) -> None:
        self._over = threading.Event()
        ready = threading.Event()

        def run() -> None:
            os.sched_setaffinity(0, {core})
            self.id = threading.get_native_id()
            ready.set()
            self._over.wait(30)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert ready.wait(30)

    def __enter__(self) -> int:
        return self.id

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_it_keeps_off_the_core_of_another_thread_and_follows_it() -> None:
    def work() -> None:
        every = os.sched_getaffinity(0)
        aside = Aside()
        for core in sorted(every)[:2]:
            with Elsewhere(core) as thread:
                aside.look(os.getpid(), thread)
            assert os.sched_getaffinity(0) == every - {core}
        aside.look(os.getpid(), thread)  # which has ended
        assert os.sched_getaffinity(0) == every - {core}
        aside.leave()
        assert os.sched_getaffinity(0) == every

    _on_a_thread(work)


def test_what_an_operator_chose_is_kept() -> None:
    def work() -> None:
        first, second = sorted(os.sched_getaffinity(0))[:2]
        aside = Aside()
        with Elsewhere(first) as thread:
            aside.look(os.getpid(), thread)
            os.sched_setaffinity(0, {first})  # the only core there is then
            aside.look(os.getpid(), thread)
            assert os.sched_getaffinity(0) == {first}
            os.sched_setaffinity(0, {first, second})
            aside.look(os.getpid(), thread)
            assert os.sched_getaffinity(0) == {second}

    _on_a_thread(work)


def test_the_loop_keeps_off_the_engines_core_and_a_new_engine_has_every_core(serving: Any) -> None:
    running: Running = serving()
    every = os.sched_getaffinity(0)

    def of_loop() -> set[int]:
        async def ask() -> set[int]:
            return os.sched_getaffinity(0)

        return asyncio.run_coroutine_threadsafe(ask(), running.loop).result(10)

    def of_workers() -> list[set[int]]:
        together = threading.Barrier(4)

        def work() -> set[int]:
            together.wait(10)
            return os.sched_getaffinity(0)

        async def ask() -> list[set[int]]:
            return await asyncio.gather(*[asyncio.to_thread(work) for _ in range(4)])

        return asyncio.run_coroutine_threadsafe(ask(), running.loop).result(10)

    assert post(running, "/v1/completions", completion("a", max_tokens=3)).status == 200
    info = running.service.info
    os.sched_setaffinity(info.thread, {min(every)})
    post(running, "/v1/completions", completion("a", max_tokens=3))  # it runs, on that core
    running.wait_until(lambda: of_loop() == every - {min(every)})
    assert of_workers() == [every] * 4
    os.kill(info.pid, signal.SIGKILL)
    running.wait_until(lambda: running.service.keeper.num_restarts == 1)
    threads = Path(f"/proc/{running.service.info.pid}/task").iterdir()
    assert all(os.sched_getaffinity(int(thread.name)) == every for thread in threads)
