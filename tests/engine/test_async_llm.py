"""The asyncio face: streams, leaving them, slow readers, errors, and a loop that stays free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from engineroom.engine.async_llm import AsyncLLM
from engineroom.engine.client import (
    EngineDeadError,
    EngineStartError,
    RequestFailed,
    RequestRefused,
)
from engineroom.engine.config import ConfigError
from engineroom.engine.core.answers import RequestOutput
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.client_tools import GREEDY, LONG, make_client
from tests.engine.test_client import comparable, expected

FORMS = ["thread", "process"]
Body = Callable[[AsyncLLM], Awaitable[None]]


def using(form: str, body: Body, model: str = "paced") -> None:
    """Run `body` over a client; it must leave nothing running."""

    async def run() -> None:
        async with AsyncLLM.from_client(make_client(form, model)) as llm:
            await asyncio.wait_for(body(llm), 20.0)

    asyncio.run(run())


async def read(stream: AsyncIterator[RequestOutput]) -> tuple[str, RequestOutput]:
    """All deltas, and the last output."""
    text, output = "", None
    async for output in stream:
        text += output.deltas[0]
    assert output is not None and output.finished
    return text, output


async def freed(llm: AsyncLLM, within: float = 5.0) -> bool:
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        if (await llm.stats())["live"] == 0:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_is_the_engines_output(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        for prompt in ("hello", [1, 2, 3]):
            text, output = await read(llm.generate(prompt, GREEDY))
            assert comparable(output) == comparable(expected(prompt, GREEDY))
            assert text == output.outputs[0].text
        _, output = await read(llm.chat([{"role": "user", "content": "hi"}], GREEDY, tools=[1]))
        assert bytes(output.prompt_token_ids).decode() == "user:hi;[('tools', [1])]"

    using(form, body)


@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_streams(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        prompts = [f"prompt {i}" for i in range(100)]
        answers = await asyncio.gather(*(read(llm.generate(p, GREEDY)) for p in prompts))
        for prompt, (text, output) in zip(prompts, answers, strict=True):
            assert comparable(output) == comparable(expected(prompt, GREEDY))
            assert text == output.outputs[0].text

    using(form, body)


async def cancel(llm: AsyncLLM) -> None:
    task = asyncio.create_task(read(llm.generate("r", LONG)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


HELD: list[Any] = []  # a stream in here is not dropped, so that dropping it is not what ends it


async def cancel_while_it_is_held(llm: AsyncLLM) -> None:
    HELD.append(llm.generate("r", LONG))
    task = asyncio.create_task(read(HELD[-1]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_outside_the_stream(llm: AsyncLLM) -> None:
    async def slow() -> None:
        async for _ in llm.generate("r", LONG):
            await asyncio.sleep(30)

    task = asyncio.create_task(slow())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_the_loop(llm: AsyncLLM) -> None:
    async for _ in llm.generate("r", LONG):
        break


async def close_the_stream(llm: AsyncLLM) -> None:
    stream = llm.generate("r", LONG)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def close_under_a_reader(llm: AsyncLLM) -> None:
    stream = llm.generate("slow:", LONG)
    task = asyncio.create_task(read(stream))
    await asyncio.sleep(0.05)
    await stream.aclose()
    with pytest.raises(AssertionError):  # it ended without a last output
        await asyncio.wait_for(task, 10.0)


async def drop_the_stream(llm: AsyncLLM) -> None:
    stream = llm.generate("r", LONG)
    await anext(stream)
    del stream


async def fail_in_the_loop(llm: AsyncLLM) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in llm.generate("r", LONG):
            _ = 1 / 0


async def time_out(llm: AsyncLLM) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(llm.generate("r", LONG)), 0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "leave",
    [
        cancel,
        cancel_while_it_is_held,
        cancel_outside_the_stream,
        leave_the_loop,
        close_the_stream,
        close_under_a_reader,
        drop_the_stream,
        fail_in_the_loop,
        time_out,
    ],
)
def test_whoever_leaves_frees_at_once(
    form: str, leave: Callable[[AsyncLLM], Coroutine[Any, Any, None]]
) -> None:
    async def body(llm: AsyncLLM) -> None:
        neighbour = asyncio.create_task(read(llm.generate("neighbour", LONG, request_id="n")))
        await leave(llm)
        left = time.monotonic()
        while (await llm.stats())["live"] > 1:
            assert time.monotonic() - left < 5  # of a quarter of an hour
        await llm.abort("n")
        text, output = await neighbour  # untouched until it was told to end
        assert output.outputs[0].finish_reason == "abort" and text == output.outputs[0].text
        assert await freed(llm)

    using(form, body)


@pytest.mark.parametrize("form", FORMS)
def test_errors_keep_their_types(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        with pytest.raises(AdmissionError, match="9000 tokens") as refused:
            await read(llm.generate("refuse:", GREEDY))
        assert refused.value.code == "context_length"
        with pytest.raises(ParameterError):
            await read(llm.generate(b"bytes", GREEDY))  # type: ignore[arg-type]
        with pytest.raises(RequestFailed):
            await read(llm.generate("bug:", GREEDY))
        with pytest.raises(RequestRefused, match="hostile") as template:
            await read(llm.chat([{"role": "user", "content": "hostile"}]))
        assert template.value.kind == "TemplateError"
        stream = llm.generate("refuse:", GREEDY)
        with pytest.raises(AdmissionError):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):  # an error is said once
            await anext(stream)
        with pytest.raises(EngineDeadError, match="out of cheese"):
            await read(llm.generate("raise:", GREEDY))
        assert not llm.is_alive
        with pytest.raises(EngineDeadError, match="out of cheese"):
            await read(llm.generate("hello", GREEDY))

    using(form, body)


def test_a_slow_reader_gets_the_whole_text_in_few_pieces() -> None:
    params = SamplingParams(max_tokens=600)

    async def body(llm: AsyncLLM) -> None:
        text, pieces = "", 0
        async for output in llm.generate("r", params):
            text += output.deltas[0]
            pieces += 1
            await asyncio.sleep(0.05)
        assert text == output.outputs[0].text == expected("r", params).outputs[0].text
        assert pieces < 100

    using("thread", body, model="fake")


@pytest.mark.parametrize("form", FORMS)
def test_the_loop_stays_free(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(read(llm.generate(f"p{i}", LONG))) for i in range(20)]
        late = []
        for _ in range(50):
            started = time.monotonic()
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - started - 0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(late)[len(late) // 2] < 0.1  # the median: others share this machine

    using(form, body)


def test_loading_does_not_block_the_loop() -> None:
    client = make_client("process")

    async def run() -> None:
        llm = AsyncLLM.from_client(client)
        loading = asyncio.create_task(llm.load())
        turns = 0
        while not loading.done():
            await asyncio.sleep(0.002)
            turns += 1
        assert turns > 5 and (await loading).model.family == "fake"
        await llm.close()
        await llm.close()

    asyncio.run(run())


def test_loading_may_be_cancelled() -> None:
    client = make_client("process", "late")

    async def run() -> None:
        async def enter() -> None:
            async with AsyncLLM.from_client(client):
                raise AssertionError("loaded, though it was cancelled")

        task = asyncio.create_task(enter())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert not client.is_alive


def test_the_first_request_loads() -> None:
    async def run() -> None:
        llm = AsyncLLM.from_client(make_client("thread"))
        _, output = await read(llm.generate("hello", GREEDY))
        assert output.outputs[0].finish_reason == "length"
        await llm.close()

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded() -> None:
    async def run() -> None:
        with pytest.raises(EngineStartError, match="did you mean"):
            async with AsyncLLM.from_client(make_client("process", "missing")):
                pass

    asyncio.run(run())


@pytest.mark.parametrize("form", FORMS)
def test_close_ends_every_stream(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(read(llm.generate(f"p{i}", LONG))) for i in range(5)]
        await asyncio.sleep(0.05)
        await llm.close()
        for text, output in await asyncio.wait_for(asyncio.gather(*tasks), 2.0):
            assert output.outputs[0].finish_reason == "abort"
            assert text == output.outputs[0].text

    using(form, body)


def test_options_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        AsyncLLM("smollm2", max_model_length=3)
    with pytest.raises(ConfigError, match="'thread' or 'process'"):
        AsyncLLM("smollm2", client="thred")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_the_real_engine_through_both_forms(form: str, golden_model: Any) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom import LLM

    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=2)
    llm = LLM(str(golden_model))
    (wanted,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    llm.close()

    async def run() -> None:
        async with await AsyncLLM.start(str(golden_model), client=form) as llm:  # type: ignore[arg-type]
            text, output = await read(llm.generate([1, 2, 3], params))
            assert output.outputs == wanted.outputs and text == wanted.outputs[0].text
            assert (await llm.stats())["num_steps"] > 0

    asyncio.run(run())


@pytest.mark.parametrize("form", FORMS)
def test_who_reads_only_the_end_is_sent_only_the_end(form: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=200, temperature=0, seed=1)
        text, last = await read(llm.generate("the end", params))
        outputs = [out async for out in llm.generate("the end", params, final_only=True)]
        (only,) = outputs
        assert only.outputs == last.outputs and only.deltas == (text,)

    using(form, body)


@pytest.mark.parametrize("form", FORMS)
def test_a_request_whose_loop_has_ended_is_aborted(form: str) -> None:
    llm = AsyncLLM.from_client(make_client(form, "paced"))
    left: list[Any] = []  # what keeps the stream alive

    async def first() -> None:
        left.append(llm.generate("hello", LONG))
        await anext(left[0])

    asyncio.run(first())
    try:
        assert asyncio.run(freed(llm))
    finally:
        llm.client.close()
