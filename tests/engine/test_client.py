"""What both forms of client promise: outputs, endings, refusals, aborts, closing, no leaks."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine import wire
from engineroom.engine.child import Outbox
from engineroom.engine.client import (
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineStartError,
    RequestFailed,
    RequestRefused,
    merge,
)
from engineroom.engine.client_process import ProcessClient
from engineroom.engine.client_thread import ThreadClient
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.answers import RequestOutput
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.sampling_params import SamplingParams
from tests.engine.client_tools import CHILD, GREEDY, LONG, Collector, make_client, submit, until
from tests.engine.fake import VOCAB, FakeEngine, Panic, fake_engine

FORMS = ["thread", "process"]
Make = Callable[..., EngineClient]


@pytest.fixture(scope="module", params=FORMS)
def client(request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    """A client that no test harms."""
    with make_client(request.param) as client:
        yield client


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[EngineClient] = []

    def start(form: str, model: str = "paced", **options: Any) -> EngineClient:
        made.append(make_client(form, model, **options))
        made[-1].start()
        return made[-1]

    yield start
    for client in made:
        client.close()


def expected(prompt: Any, params: SamplingParams) -> RequestOutput:
    """The last output of an engine that is asked directly."""
    engine = FakeEngine(EngineConfig(model="fake"))
    engine.add_request("r", prompt, params)
    while True:
        (output,) = engine.step()
        if output.finished:
            return output


def comparable(output: RequestOutput) -> tuple[Any, ...]:
    return (
        output.prompt,
        output.prompt_token_ids,
        output.prompt_logprobs,
        output.outputs,
        output.finished,
        output.usage,
        output.timings,
    )


# ------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ("hello", GREEDY),
        ([5, 6, 7], GREEDY),
        ("hé", SamplingParams(n=3, seed=9, max_tokens=20, logprobs=2)),
        ("rows", SamplingParams(prompt_logprobs=3, logprobs=0, max_tokens=5)),
        (5 * list(range(VOCAB)), SamplingParams(prompt_logprobs=1, max_tokens=2)),
        ("one", SamplingParams(max_tokens=1)),
    ],
)
def test_outputs_are_the_engines(client: EngineClient, prompt: Any, params: SamplingParams) -> None:
    collector = submit(client, "same", prompt, params)
    output = collector.output()
    assert comparable(output) == comparable(expected(prompt, params))
    for i, completion in enumerate(output.outputs):
        assert "".join(o.deltas[i] for o in collector.outputs) == completion.text
    assert collector.endings == 1
    assert [o.finished for o in collector.outputs[:-1]] == [False] * (len(collector.outputs) - 1)


def test_many_at_once(client: EngineClient) -> None:
    collectors = {f"m{i}": submit(client, f"m{i}", f"prompt {i}") for i in range(50)}
    for i, collector in enumerate(collectors.values()):
        assert comparable(collector.output()) == comparable(expected(f"prompt {i}", GREEDY))


def test_merged_outputs_lose_no_text() -> None:
    engine = FakeEngine(EngineConfig(model="fake"))
    engine.add_request("r", "hello", SamplingParams(n=2, seed=1, max_tokens=9))
    waiting = None
    while waiting is None or not waiting.finished:
        (output,) = engine.step()
        waiting = merge(waiting, output)
    assert waiting.deltas == tuple(c.text for c in waiting.outputs)


def test_info_and_stats(client: EngineClient) -> None:
    info = client.start()  # again: the same answer
    assert info.config.model == "paced" and info.model.family == "fake"
    assert (info.pid == os.getpid()) == isinstance(client, ThreadClient)
    submit(client, "counted").wait()
    stats = client.stats()
    assert stats["live"] == 0 and stats["steps"] > 0


def test_chat_is_rendered(client: EngineClient) -> None:
    ids = client.render_chat([{"role": "user", "content": "hi"}], tools=[1])
    assert bytes(ids).decode() == "user:hi;[('tools', [1])]"
    with pytest.raises(RequestRefused, match="hostile messages") as refused:
        client.render_chat([{"role": "user", "content": "hostile"}])
    assert refused.value.kind == "TemplateError"


# ----------------------------------------------------------------------------------------- refusals


def test_the_door_refuses_with_its_own_error(client: EngineClient) -> None:
    error = submit(client, "refused", "refuse:").error()
    assert isinstance(error, RequestRefused)
    cause = error.unwrap()
    assert isinstance(cause, AdmissionError) and cause.code == "context_length"
    assert "9000 tokens exceed the 4096" in str(error)
    assert submit(client, "refused").output().finished  # the id is free, the engine lives


@pytest.mark.parametrize("word", ["bug", "panic"])
def test_a_failure_at_the_door_is_one_requests(client: EngineClient, word: str) -> None:
    neighbour = submit(client, "neighbour")
    error = submit(client, "bad", f"{word}:").error()
    assert isinstance(error, RequestFailed) and "door" in str(error)
    assert comparable(neighbour.output()) == comparable(expected("hello", GREEDY))
    assert client.is_alive


def test_a_forgotten_request_ends(client: EngineClient) -> None:
    assert isinstance(submit(client, "lost", "vanish:").error(), RequestFailed)
    assert client.is_alive


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"request_id": 7}, "request_id"),
        ({"prompt": b"bytes"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"params": {"temperature": 1}}, "params"),
        ({"cache_salt": "text"}, "cache_salt"),
        ({"cache_salt": b"x" * 257}, "cache_salt"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a" * 257}, "request_id"),
        ({"priority": "1"}, "priority"),
        ({"priority": None}, "priority"),
        ({"priority": float("nan")}, "priority"),
        ({"priority": 2**63}, "priority"),
    ],
)
def test_wrong_types_are_refused_at_once(
    client: EngineClient, change: dict[str, Any], field: str
) -> None:
    arguments: dict[str, Any] = {"request_id": "t", "prompt": "p", "params": GREEDY} | change
    with pytest.raises(ParameterError) as refused:
        client.submit(**arguments, sink=Collector())
    assert refused.value.field == field
    assert submit(client, "t").output().finished  # the engine lives


@pytest.mark.parametrize("ids", [[None], [1.5], [True], ["a"], [[1]], [-1], [2**63], [2**70]])
def test_what_is_no_token_id_is_refused_at_once(client: EngineClient, ids: list[Any]) -> None:
    with pytest.raises(AdmissionError, match="prompt token 0 is") as refused:
        submit(client, "t", ids)
    assert refused.value.code == "token_id"
    assert submit(client, "t").output().finished


@pytest.mark.parametrize("messages", [None, 5, [5], [None], [{1: 2}], [{"role": object()}]])
def test_hostile_messages_end_nobody(client: EngineClient, messages: Any) -> None:
    with contextlib.suppress(ParameterError, EngineError):  # the fake's template takes a good deal
        client.render_chat(messages)
    assert client.is_alive
    assert submit(client, "t").output().finished


def test_an_id_that_runs_is_taken(client: EngineClient) -> None:
    first = submit(client, "taken", params=LONG)
    with pytest.raises(AdmissionError, match="'taken'") as refused:
        submit(client, "taken")
    assert refused.value.code == "duplicate_id"
    client.abort("taken")
    first.output()
    assert submit(client, "taken").output().finished


# ------------------------------------------------------------------------------------------- aborts


def test_abort_at_each_stage(client: EngineClient) -> None:
    early = submit(client, "early", params=LONG)
    client.abort("early")  # perhaps before the engine has heard of it
    running = submit(client, "running", params=LONG)
    running.wait_first()
    for _ in range(3):
        client.abort("running")
    for collector in (early, running):
        output = collector.output()
        assert output.finished and output.outputs[0].finish_reason == "abort"
        assert collector.text == output.outputs[0].text
    done = submit(client, "done")
    done.output()
    client.abort("done")  # after its end
    client.abort("never heard of")
    assert client.stats()["live"] == 0
    assert [c.endings for c in (early, running, done)] == [1, 1, 1]


def test_a_sink_that_fails_ends_its_request_alone(
    client: EngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(item: RequestOutput | EngineError) -> None:
        raise RuntimeError("no reader")

    neighbour = submit(client, "next to it")
    submit(client, "unread", params=LONG, sink=broken)
    assert neighbour.output().outputs[0].finish_reason == "length"
    assert until(lambda: client.stats()["live"] == 0)
    assert client.is_alive and "sink failed" in caplog.text


# ---------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("form", FORMS)
def test_a_displaced_request_is_refused_as_the_door_would(make: Make, form: str) -> None:
    client = make(form)
    waits = submit(client, "waits", params=LONG)
    waits.wait_first()
    assert submit(client, "comes", "displace:waits").output().outputs[0].token_ids
    refused = waits.wait()
    assert isinstance(refused, RequestRefused) and isinstance(refused.error, AdmissionError)
    assert refused.error.code == "queue_full" and "most requests waiting" in str(refused)
    assert waits.endings == 1
    assert submit(client, "waits").output().finished  # the id is free again


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_step_ends_everybody_with_the_reason(make: Make, form: str) -> None:
    client = make(form)
    neighbour = submit(client, "neighbour", params=LONG)
    neighbour.wait_first()
    failing = submit(client, "failing", "raise:")
    for collector in (neighbour, failing):
        error = collector.error(2.0)
        assert isinstance(error, EngineDeadError) and "out of cheese" in str(error)
        assert collector.endings == 1
    assert not client.is_alive
    with pytest.raises(EngineDeadError, match="out of cheese"):
        submit(client, "too late")
    with pytest.raises(EngineDeadError, match="out of cheese"):
        client.stats()
    client.abort("neighbour")
    client.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_waits_hears_of_the_failure_too(make: Make, form: str) -> None:
    client = make(form)
    submit(client, "r", "hang:0.5", params=LONG)
    submit(client, "failing", "raise:")  # perhaps in a later step; the call waits for either
    with pytest.raises(EngineDeadError, match="out of cheese"):
        while True:
            client.stats(5.0)


@pytest.mark.parametrize("form", FORMS)
def test_close_aborts_what_runs(make: Make, form: str) -> None:
    client = make(form)
    running = submit(client, "running", params=LONG)
    running.wait_first()
    client.close()
    assert running.output(0.1).outputs[0].finish_reason == "abort"
    assert not client.is_alive
    client.close()
    with pytest.raises(EngineDeadError, match="closed"):
        submit(client, "too late")
    with pytest.raises(EngineDeadError, match="closed"):
        client.render_chat([])


@pytest.mark.parametrize("form", FORMS)
def test_close_may_drain(make: Make, form: str) -> None:
    client = make(form)
    running = submit(client, "running", params=SamplingParams(max_tokens=200))
    client.close(drain=True)
    assert running.output(0.1).outputs[0].finish_reason == "length"


@pytest.mark.parametrize("form", FORMS)
def test_draining_ends_by_its_timeout(make: Make, form: str) -> None:
    client = make(form)
    running = submit(client, "running", params=LONG)
    running.wait_first()
    started = time.monotonic()
    client.close(drain=True, timeout=0.3)
    assert time.monotonic() - started < 3.0
    running.wait(0.1)
    assert running.endings == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_cannot_be_loaded(form: str) -> None:
    client = make_client(form, "missing")
    with pytest.raises(EngineStartError, match="did you mean 'fake'") as failed:
        client.start()
    assert (failed.value.kind, failed.value.field) == ("ConfigError", "model")
    assert not client.is_alive
    with pytest.raises(EngineDeadError, match="could not be loaded"):
        submit(client, "too late")
    client.close()


@pytest.mark.parametrize("form", FORMS)
def test_use_before_start(form: str) -> None:
    client = make_client(form)
    for use in (lambda: submit(client, "early"), client.stats, lambda: client.render_chat([])):
        with pytest.raises(EngineError, match="start"):
            use()
    client.abort("early")
    client.close()
    with pytest.raises(EngineDeadError, match="closed"):
        client.start()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_leaked(form: str) -> None:
    def used() -> tuple[int, set[str]]:
        names = {t.name for t in threading.enumerate() if t.name.startswith("engineroom")}
        return len(os.listdir("/proc/self/fd")), names

    with make_client(form) as warm:
        submit(warm, "warm").wait()
    fds, names = used()
    for end in (EngineClient.close, lambda c: submit(c, "x", "raise:").wait()):
        client = make_client(form)
        client.start()
        submit(client, "r", params=LONG).wait_first()
        end(client)
        client.close()
        assert until(lambda: used()[0] <= fds, 2.0), os.listdir("/proc/self/fd")
        assert used()[1] == names


@pytest.mark.parametrize("form", FORMS)
def test_a_forgotten_client_ends_its_engine(form: str) -> None:
    client = make_client(form)
    client.start()
    collector = submit(client, "r", params=LONG)
    collector.wait_first()
    del client
    gc.collect()
    assert collector.output(3.0).outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("form", FORMS)
def test_the_interpreter_ends_with_a_client_open(form: str, tmp_path: Path) -> None:
    script = (
        "from tests.engine.client_tools import *\n"
        f"client = make_client({form!r})\n"
        "print(client.start().pid)\n"
        "c = submit(client, 'r', params=LONG)\n"
        "c.wait_first()\n"
        "print(time.monotonic())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    pid, last = done.stdout.split()
    assert time.monotonic() - float(last) < 8.0
    assert until(lambda: not os.path.exists(f"/proc/{pid}"), 5.0)


# ------------------------------------------------------------------------------- the thread's form


def test_an_idle_engine_sleeps_and_wakes_at_once(make: Make) -> None:
    client = make("thread", "fake")
    submit(client, "warm").wait()
    cpu, wall = time.process_time(), time.monotonic()
    time.sleep(0.3)
    assert time.process_time() - cpu < 0.1 * (time.monotonic() - wall)
    waits = []
    for i in range(20):
        asked = time.monotonic()
        collector = submit(client, f"r{i}", params=SamplingParams(max_tokens=1))
        collector.wait()
        waits.append(collector.ended_at - asked)
    assert sorted(waits)[5] < 0.02  # others share this machine; one that polled would be seen


def test_the_engine_is_closed_after_its_last_step() -> None:
    engines = []

    def factory() -> FakeEngine:
        engines.append(FakeEngine(EngineConfig(model="fake")))
        return engines[-1]

    with ThreadClient(factory) as client:
        submit(client, "r").wait()
        assert not engines[0].closed
    assert engines[0].closed


def test_a_factorys_panic_is_told() -> None:
    def factory() -> FakeEngine:
        raise Panic("a Rust library's")

    client = ThreadClient(factory)
    with pytest.raises(EngineStartError, match="Rust library") as failed:
        client.start()
    assert isinstance(failed.value.__cause__, Panic)


# ------------------------------------------------------------------------------ the process's form


def test_a_callable_does_not_cross(make: Make) -> None:
    client = make("process")
    with pytest.raises(ParameterError, match="library face only") as refused:
        submit(client, "r", params=SamplingParams(logits_processor=lambda *a: a))
    assert refused.value.field == "logits_processor"
    with pytest.raises(ParameterError, match="cannot be sent"):
        submit(client, "r", "\ud800")
    with pytest.raises(ParameterError, match="cannot be sent"):
        client.render_chat([{"role": object()}])
    assert submit(client, "r").output().finished


def test_the_child_is_heard(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    words: list[str] = []
    client = make("process", on_progress=words.append)
    assert "making a fake of paced" in words
    with caplog.at_level(logging.WARNING):
        submit(client, "logs", "log:").wait()
        submit(client, "prints", "print:").wait()
        assert until(lambda: "printed by the child" in caplog.text)
    records = [r for r in caplog.records if r.name == "engineroom.fake"]
    assert [r.getMessage() for r in records] == ["a word of warning"]


def test_options_reach_the_child() -> None:
    config = EngineConfig(model="fake", max_num_seqs=7, memory_budget="1GiB", threads=2)
    with ProcessClient(config, command=CHILD) as client:
        assert client.start().config == config


def test_a_parent_that_reads_slowly_gets_the_whole_text(make: Make) -> None:
    client = make("process", "fake")
    collector = Collector()

    def slow(item: RequestOutput | EngineError) -> None:
        if not collector.outputs:
            time.sleep(0.5)  # on the reader's thread: the socket fills meanwhile
        collector(item)

    params = SamplingParams(max_tokens=1500, logprobs=20)
    submit(client, "r", "hello", params, sink=slow)
    assert comparable(collector.output()) == comparable(expected("hello", params))
    assert collector.text == collector.outputs[-1].outputs[0].text
    assert len(collector.outputs) < 1500  # some were merged on the way


def test_what_waits_for_a_parent_is_bounded() -> None:
    engine, outbox = FakeEngine(EngineConfig(model="fake")), Outbox()
    for rid in "ab":
        engine.add_request(rid, "hello", SamplingParams(max_tokens=100))
    while engine.has_work:
        for output in engine.step():
            outbox.output(output)
    for i in range(5000):
        outbox.message(wire.Log(level=30, logger="x", text=str(i)))
    outbox.message(wire.Pong(ticket=1, stalled_s=0.0))
    outbox.wait()
    outputs, growths, others = outbox.take()
    assert not growths
    assert [(o.request_id, o.finished) for o in outputs] == [("a", True), ("b", True)]
    assert all(o.deltas[0] == o.outputs[0].text for o in outputs)
    assert sum(isinstance(m, wire.Pong) for m in others) == 1
    assert len(others) < 1100 and "4000 log records were lost" in others[-1].text
    outbox.end()
    outbox.wait()
    assert outbox.ending and outbox.take() == ([], [], [])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_watchdog_that_cannot_be(value: float) -> None:
    with pytest.raises(ValueError, match="watchdog"):
        ProcessClient(EngineConfig(model="fake"), watchdog=value)


def test_a_listener_that_fails_harms_nothing(make: Make) -> None:
    def broken(text: str) -> None:
        raise RuntimeError("not listening")

    assert submit(make("process", on_progress=broken), "r").output().finished


def test_the_fake_is_an_engine() -> None:
    assert fake_engine(EngineConfig(model="fake"), lambda text: None).model_config.vocab_size
