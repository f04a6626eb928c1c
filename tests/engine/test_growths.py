"""Growths: what a stream of text gains, told without a whole output for every token."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engineroom.engine import wire
from engineroom.engine.async_llm import AsyncLLM
from engineroom.engine.child import Outbox
from engineroom.engine.child import _Server as Server
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.answers import Growth, RequestOutput
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.engine import Engine
from engineroom.engine.mailbox import Mailbox
from tests.data import data_path
from tests.engine.client_tools import LONG, make_client, until
from tests.engine.fake import FakeEngine
from tests.load.stories260k import convert

FORMS = ["thread", "process"]
FORTY = SamplingParams(temperature=0.0, seed=1, max_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = data_path("stories260K/stories260K.bin").parent
    return convert(folder, tmp_path_factory.mktemp("stories260K"))["hf"]


def whole(model: Path, params: SamplingParams, *, growths: bool) -> tuple[RequestOutput, int, str]:
    """The last output of "Once", beside another request; how many growths there were, and the
    text as it was told."""
    engine = Engine.from_model(str(model), EngineConfig(model=str(model), max_num_seqs=2))
    engine.add_request("a", "Once", params, growths=growths)
    engine.add_request("b", "Then", FORTY)
    text, ids, number, last = "", [], 0, None
    while engine.has_work:
        mine: list[Growth] = []
        outputs = engine.step(mine.extend)
        mine += engine.take_growths()
        assert not (mine and any(o.request_id == "a" for o in outputs))
        for growth in mine:
            assert growth.request_id == "a" and last is not None
            text += growth.text
            ids += growth.token_ids
            number += 1
        for output in (o for o in outputs if o.request_id == "a"):
            last = output
            text += output.deltas[0]
            known = [*output.outputs[0].token_ids]
            assert not number or known[:-1] == ids  # the last step's comes with the output
            ids = known
    engine.close()
    assert last is not None and last.finished
    assert text == last.outputs[0].text and ids == [*last.outputs[0].token_ids]
    return last, number, text


@pytest.mark.parametrize(
    "params",
    [
        FORTY,
        SamplingParams(temperature=0.8, seed=7, max_tokens=40),
        SamplingParams(temperature=0.0, seed=1, max_tokens=60, stop=("little girl",)),
        SamplingParams(temperature=0.0, seed=1, max_tokens=40, echo=True),
        SamplingParams(temperature=0.0, seed=1, max_tokens=1),
    ],
    ids=["greedy", "drawn", "stopped", "echoed", "one token"],
)
def test_growths_add_up_to_what_outputs_tell(model: Path, params: SamplingParams) -> None:
    plain, none, text = whole(model, params, growths=False)
    grown, some, same = whole(model, params, growths=True)
    assert (grown.outputs, grown.usage, same) == (plain.outputs, plain.usage, text)
    assert none == 0
    assert some >= min(10, len(plain.outputs[0].token_ids) - 2)


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": 1}, {"prompt_logprobs": 1}], ids=str)
def test_what_a_growth_cannot_tell_is_told_whole(model: Path, more: dict[str, int]) -> None:
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=12, **more)
    assert whole(model, params, growths=True)[1] == 0


def merged(items: list[RequestOutput | Growth]) -> tuple[list[RequestOutput], list[Growth]]:
    outbox = Outbox()
    for item in items:
        if isinstance(item, Growth):
            outbox.grow([item])
        else:
            outbox.output(item)
    outputs, growths, _ = outbox.take()
    return outputs, growths


def test_growths_are_told_before_the_books_of_their_step_are_kept(model: Path) -> None:
    engine = Engine.from_model(str(model), EngineConfig(model=str(model), max_num_seqs=2))
    engine.add_request("a", "Once", FORTY, growths=True)
    before, told = 0, []

    def tell(growths: Sequence[Growth]) -> None:
        told.extend(growths)
        assert engine.log.num_steps == before

    while engine.has_work:
        before = engine.log.num_steps
        engine.step(tell)
    assert len(told) > 30
    engine.close()


def test_what_waits_is_merged_and_loses_nothing() -> None:
    """Wherever a parent falls behind: what it is sent then adds up to the same text, in order."""
    engine = FakeEngine(EngineConfig(model="fake"))
    engine.add_request("a", "hello", SamplingParams(max_tokens=9), growths=True)
    items: list[RequestOutput | Growth] = []
    while engine.has_work:
        items += engine.step()
        items += engine.take_growths()
    assert [type(i) for i in items] == [RequestOutput, *[Growth] * 7, RequestOutput]
    expected = items[-1].outputs[0].text  # type: ignore[union-attr]
    for cut in range(len(items) + 1):
        text = ""
        for part in (items[:cut], items[cut:]):
            outputs, growths = merged(part)
            assert len(outputs) <= 1 and len(growths) <= 1
            text += "".join(o.deltas[0] for o in outputs) + "".join(g.text for g in growths)
        assert text == expected


class Half:
    """A push that takes this share of what it is offered. `told`: the text in the order it came."""

    def __init__(self, share: float) -> None:
        self._rng = random.Random(5)
        self._share = share
        self.pushed = 0
        self.told = ""

    def __call__(self, growth: Growth) -> bool:
        if self._rng.random() >= self._share:
            return False
        self.pushed += 1
        self.told += growth.text
        return True


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_whatever_a_reader_takes_pushed_the_rest_comes_as_outputs(form: str, share: float) -> None:
    async def run() -> None:
        async with AsyncLLM.from_client(make_client(form)) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=200)
            plain = [o async for o in llm.generate("hello", params)][-1]
            push, outputs = Half(share), []
            async for output in llm.generate("hello", params, push=push):
                outputs.append(output)
                push.told += output.deltas[0]
                if len(outputs) % 5 == 0:
                    await asyncio.sleep(0.003)  # a slow one
            assert push.told == plain.outputs[0].text
            assert outputs[-1].outputs == plain.outputs
            assert outputs[-1].usage == plain.usage
            texts = [o.outputs[0].text for o in outputs]
            assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
            if form == "process":  # a thread's outputs come from another thread, and are not pushed
                assert (push.pushed > 0) == (share > 0)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_nothing_is_pushed_before_what_still_waits() -> None:
    """A thread that reads in the loop's stead leaves something, and the loop reads on at once."""

    async def run() -> None:
        pushed: list[str] = []

        def push(growth: Growth) -> bool:
            pushed.append(growth.text)
            return True

        mailbox = Mailbox(asyncio.get_running_loop(), push)
        engine = FakeEngine(EngineConfig(model="fake"))
        engine.add_request("a", "hello", SamplingParams(max_tokens=9))
        (first,) = engine.step()
        mailbox.put(first)
        assert await mailbox.take() is first
        taking = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        mailbox.grow(Growth("a", (1,), "one "))
        thread = threading.Thread(target=mailbox.grow, args=(Growth("a", (2,), "two "),))
        thread.start()
        thread.join()
        mailbox.grow(Growth("a", (3,), "three "))
        output = await taking
        assert pushed == ["one "]
        assert isinstance(output, RequestOutput) and output.deltas == ("two three ",)
        assert output.outputs[0].token_ids[-3:] == (1, 2, 3)

    asyncio.run(run())


def test_a_pushed_part_wakes_nobody() -> None:
    """Of a stream that is pushed, the reader sees the first output and the last."""

    async def run() -> list[RequestOutput]:
        async with AsyncLLM.from_client(make_client("process")) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=300)
            return [o async for o in llm.generate("hello", params, push=lambda growth: True)]

    outputs = asyncio.run(asyncio.wait_for(run(), 20))
    assert len(outputs) < 30  # until the loop reads the socket itself it cannot be pushed


def test_so_far_counts_what_was_pushed() -> None:
    async def run() -> None:
        async with AsyncLLM.from_client(make_client("process")) as llm:
            pushed = []

            def push(growth: Growth) -> bool:
                pushed.append(growth.text)
                shown = stream.so_far()  # may be asked from here
                assert shown is not None and shown.outputs[0].text.endswith(growth.text)
                return True

            stream = llm.generate("hello", LONG, push=push)
            assert stream.so_far() is None
            first = await anext(stream)

            async def read() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.ensure_future(read())
            while len(pushed) < 20:
                await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.wait({reading})
            last = stream.so_far()
            assert last is not None
            assert last.outputs[0].text.startswith(first.outputs[0].text)
            assert last.outputs[0].text.endswith("".join(pushed[-3:]))
            assert last.usage.completion_tokens == len(last.outputs[0].token_ids) > 20
            assert last.timings.decode_s > first.timings.decode_s

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_push_that_fails_ends_its_own_request() -> None:
    async def run() -> None:
        client = make_client("process")
        async with AsyncLLM.from_client(client) as llm:

            def push(growth: Growth) -> bool:
                raise ZeroDivisionError

            stream = llm.generate("hello", LONG, push=push)
            await anext(stream)

            async def read() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.ensure_future(read())
            beside = [o async for o in llm.generate("other", FORTY)]
            assert beside[-1].finished
            while (await llm.stats())["live"]:  # until the time is over
                await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.wait({reading})

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.fixture
def child_s_logging() -> Iterator[None]:
    """A child sends its log records to its parent; here it is a thread of this process."""
    logger = logging.getLogger("engineroom")
    before = logger.level, logger.propagate, [*logger.handlers]
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]


@pytest.mark.usefixtures("child_s_logging")
def test_a_parent_that_does_not_read_holds_up_no_step_and_gets_all_in_the_end() -> None:
    """The engine's thread sends what its step brought, as far as the socket takes it."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    engine = FakeEngine(EngineConfig(model="fake"))
    server = Server(theirs, lambda config, progress: engine)
    threading.Thread(target=server.run, daemon=True).start()
    configure = wire.Configure(model="fake", options={}, log_level=50)
    ours.sendall(wire.encode(configure))
    for number in range(4):
        ours.sendall(wire.encode(submission(f"r{number}", 300)))
    assert until(lambda: engine.steps >= 300), "steps wait for a parent"
    texts: dict[str, str] = {}
    ended: dict[str, int] = {}
    frames = wire.Frames()
    while len(ended) < 4:
        for payload in frames.feed(ours.recv(1 << 16)):
            message = wire.decode_to_parent(payload)
            if isinstance(message, wire.Growths):
                for growth in message.growths:
                    texts[growth.request_id] += growth.text
            elif isinstance(message, wire.Output):
                (choice,) = message.choices
                told = choice.text if choice.delta is None else choice.delta
                texts[message.request_id] = texts.get(message.request_id, "") + told
                if message.finished:
                    ended[message.request_id] = message.usage.completion_tokens
    ours.close()
    assert set(ended.values()) == {300}
    assert [text.count(" ") for text in texts.values()] == [300] * 4


def submission(request_id: str, max_tokens: int) -> wire.Submit:
    return wire.Submit(
        request_id=request_id,
        prompt="hello" * 400,  # all of it in the first step's frame: more than the socket takes
        params=wire.pack_params(SamplingParams(max_tokens=max_tokens)),
        priority=0,
        cache_salt=b"",
        growths=True,
    )


def test_growths_cross_the_wire() -> None:
    growths = [Growth("a", (1, 2), "é"), Growth("b", (), "")]
    frame = wire.encode(wire.Growths(growths=growths))
    (payload,) = wire.Frames().feed(frame)
    message = wire.decode_to_parent(payload)
    assert isinstance(message, wire.Growths) and message.growths == growths
