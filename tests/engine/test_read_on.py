"""An event loop that reads the engine's process itself, and the thread where it does not."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest

from engineroom.engine.async_llm import AsyncLLM
from engineroom.engine.client import EngineDeadError, EngineError
from engineroom.engine.client_process import ProcessClient
from engineroom.engine.core.answers import RequestOutput
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.client_tools import GREEDY, LONG, Collector, make_client, until

TICK = 0.1  # seconds between two looks of the thread: a quarter of the watchdog's
TWO_HUNDRED = SamplingParams(temperature=0.0, max_tokens=200)
TWO_THOUSAND = SamplingParams(temperature=0.0, max_tokens=2000)


@pytest.fixture
def client() -> Iterator[ProcessClient]:
    made = make_client("process", watchdog=4 * TICK)
    assert isinstance(made, ProcessClient)
    with made:
        yield made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_outputs_come_on_the_loop_s_own_thread() -> None:
    where: list[int] = []
    # The loop counts as blocked after 1.5 s of silence, not 0.15: busy machines pause for that.
    client = make_client("process", watchdog=40.0)

    async def ask() -> list[str]:
        loop = asyncio.get_running_loop()
        ended, texts = asyncio.Event(), []

        def sink(item: RequestOutput | EngineError) -> None:
            assert isinstance(item, RequestOutput)
            where.append(threading.get_ident())
            texts.append(item.deltas[0])
            if item.finished:
                loop.call_soon_threadsafe(ended.set)

        client.read_on(loop)
        client.submit("a", "hello", TWO_HUNDRED, sink=sink)
        await asyncio.wait_for(ended.wait(), 10)
        return texts

    with client:
        texts = asyncio.run(ask())
        here = threading.get_ident()
        turns = [thread for thread, _ in groupby(where)]
        # The thread that watches has to wake once to learn of the loop, and may read in that turn.
        assert here in turns and len(turns) - turns.count(here) <= 1, turns
        plain = Collector()
        client.submit("b", "hello", TWO_HUNDRED, sink=plain)  # that loop is closed
        plain.wait()
        assert "".join(texts) == plain.text


def test_a_blocked_loop_neither_kills_the_engine_nor_keeps_what_came(
    client: ProcessClient,
) -> None:
    async def ask() -> None:
        loop = asyncio.get_running_loop()
        client.read_on(loop)
        other = Collector()
        client.submit("a", "hello", TWO_THOUSAND, sink=other)  # two seconds of steps
        time.sleep(12 * TICK)  # three times what the watchdog would wait
        assert until(lambda: bool(other.outputs)), "the thread did not take over"
        assert client.is_alive
        client.read_on(loop)
        while not other.endings:
            await asyncio.sleep(0.01)
        assert len(other.output().outputs[0].token_ids) == 2000

    asyncio.run(ask())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_the_end_of_the_engine_reaches_the_loop_which_then_sleeps(number: signal.Signals) -> None:
    before = descriptors()

    async def ask() -> float:
        async with AsyncLLM.from_client(make_client("process", watchdog=4 * TICK)) as llm:
            stream = llm.generate("hello", LONG)
            await anext(stream)
            assert isinstance(llm.client, ProcessClient) and llm.client.pid is not None
            began = time.thread_time()
            os.kill(llm.client.pid, number)
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
            await asyncio.sleep(0.3)
            return time.thread_time() - began

    assert asyncio.run(ask()) < 0.1
    assert until(lambda: descriptors() <= before)  # the loop's handle of the socket is closed too


def test_two_loops_in_turn(client: ProcessClient) -> None:
    async def ask(number: int) -> str:
        llm: Any = AsyncLLM.from_client(client)
        stream = llm.generate("hello", GREEDY, request_id=f"r{number}")
        return "".join([output.deltas[0] async for output in stream])

    texts = [asyncio.run(ask(i)) for i in range(3)]
    threads = [
        threading.Thread(target=lambda i=i: texts.append(asyncio.run(ask(10 + i))))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(texts) == 7 and len(set(texts)) == 1
