"""The overlapped loop beside the plain one: the same answers, bit for bit, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from engineroom import LLM, SamplingParams
from engineroom.engine.runtime.runner import Runner
from tests.counts import count
from tests.engine.late import late_backends

FORMS = {
    "a thread": {"thread": True, "host_sampler": False},
    "on demand": {"thread": False, "host_sampler": False},
    "sampled on the host": {"thread": False, "host_sampler": True},
}


@pytest.fixture(params=FORMS)
def make_late(
    request: pytest.FixtureRequest, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., LLM]]:
    """make_late(**options) -> an LLM whose steps overlap."""
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        with late_backends(monkeypatch, **FORMS[request.param]):
            made.append(LLM(str(golden_model), device="cpu", **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm(device="cpu", max_num_seqs=32)


def damp(tokens: list[int], logits: np.ndarray) -> np.ndarray:
    """A logits processor that reads every token so far."""
    logits[sum(tokens) % len(logits)] += 5.0
    return logits


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 0.8},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1},
    {"no_repeat_ngram_size": 1},
    {"bad_words": ["a", "ab"]},
    {"min_tokens": 4, "stop_token_ids": list(range(0, 250, 3))},
    {"stop_token_ids": list(range(0, 250, 9))},
    {"stop": ["e", "th"]},
    {"allowed_token_ids": list(range(97, 123)), "logit_bias": {101: 2.0}},
    {"logprobs": 3},
    {"prompt_logprobs": 2, "logprobs": 0},
    {"logits_processor": damp},
    {"n": 3},
)


@dataclass
class Asked:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    comes: int  # in which turn
    aborted: int | None  # in which turn
    scored: bool


def draw(rng: random.Random) -> list[Asked]:
    roots = [[rng.randrange(256) for _ in range(40)] for _ in range(2)]
    asked = []
    for i in range(rng.randrange(3, 9)):
        options = rng.choice(OPTIONS) | rng.choice(OPTIONS)
        scored = not options and rng.random() < 0.3
        if scored:
            options = {"prompt_logprobs": 0}
        prompt = [*rng.choice(roots)[: rng.randrange(1, 41)], i]
        params = SamplingParams(
            max_tokens=rng.choice((4, 5, 12, 20)),
            temperature=rng.choice((0.8, 1.2) if "n" in options else (0.0, 0.8, 1.2)),
            seed=rng.randrange(1 << 40),
            **options,
        )
        aborted = rng.randrange(1, 30) if rng.random() < 0.2 else None
        asked.append(
            Asked(
                f"r{i}", prompt, params, rng.choice((0, 0, 1)), rng.randrange(12), aborted, scored
            )
        )
    return asked


def watcher(rows: list[tuple[int, bytes]]) -> Callable[[int, np.ndarray], None]:
    """An observer that notes each row with its position: how rows are chunked does not matter."""
    return lambda first, chunk: rows.extend((first + i, x.tobytes()) for i, x in enumerate(chunk))


def answers(llm: LLM, asked: list[Asked], *, aborts: bool) -> dict[str, tuple]:
    """Each request's answer, and the logprobs that an observer of it was given."""
    engine, out, seen = llm.engine, {}, {}
    texts: dict[tuple[str, int], str] = {}
    turn = 0
    while turn <= 12 or engine.has_work:
        for a in asked:
            if a.comes == turn:
                rows = seen.setdefault(a.request_id, [])
                observer = watcher(rows) if a.scored else None
                engine.add_request(
                    a.request_id, a.prompt, a.params, priority=a.priority, observer=observer
                )
            if aborts and a.aborted == turn:
                engine.abort(a.request_id)
        for output in engine.step():
            assert output.request_id not in out, "heard of after its end"
            for sample, delta in zip(output.outputs, output.deltas, strict=True):
                key = output.request_id, sample.index
                texts[key] = texts.get(key, "") + delta
                assert texts[key] == sample.text
            if output.finished:
                out[output.request_id] = output
        engine.scheduler.check_integrity()
        turn += 1
        assert turn < 2000
    stats = engine.scheduler.stats()
    assert stats.owned_blocks == stats.num_running == stats.num_waiting == 0
    return {rid: (o.outputs, o.prompt_logprobs, sorted(seen[rid])) for rid, o in out.items()}


def check(asked: list[Asked], got: dict[str, tuple], want: dict[str, tuple]) -> None:
    assert got.keys() == want.keys()
    for a in asked:
        for one, whole in zip(got[a.request_id][0], want[a.request_id][0], strict=True):
            if one.finish_reason == "abort":
                assert a.aborted is not None
                assert one.token_ids == whole.token_ids[: len(one.token_ids)], a
                assert whole.text.startswith(one.text)
                assert one.logprobs is None or one.logprobs == whole.logprobs[: len(one.logprobs)]
            else:
                assert one == whole, a
        if got[a.request_id][0][0].finish_reason != "abort":
            assert got[a.request_id][1:] == want[a.request_id][1:], a


TIGHT = {"num_blocks": 20, "block_size": 4, "max_model_len": 72, "max_num_seqs": 6}
ROOMY = {"max_num_seqs": 16, "max_num_batched_tokens": 24}


@pytest.mark.parametrize("options", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_the_answers_are_the_plain_loops(options: dict, make_late: Any, plain: LLM) -> None:
    llm = make_late(**options)
    for seed in range(count(reduced=15, full=300)):
        rng = random.Random(seed)
        asked = draw(rng)
        want = answers(plain, asked, aborts=False)
        try:
            check(asked, answers(llm, asked, aborts=True), want)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    log = llm.engine.log.records
    assert sum(r.num_preempted for r in log) > 0 or options is ROOMY
    backend = llm.engine.loaded.backend
    host = isinstance(llm.engine._runner._launching, type(None))
    assert backend.num_late == 0 if host else backend.num_late > 100
    assert host or backend.num_host > 10  # steps with a processor or an observer


def planted_sampling_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    launch = Runner.launch

    def launched(self: Runner, *args: Any) -> Any:
        flight = launch(self, *args)
        self.sample(flight)
        return flight

    patch.setattr(Runner, "launch", launched)


def planted_logits_left_for_later(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Runner, "_wanted_by_host", lambda self, plan: False)


@pytest.mark.parametrize("bug", [planted_sampling_before_the_commit, planted_logits_left_for_later])
def test_a_planted_bug_is_found(
    bug: Any, plain: LLM, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with late_backends(monkeypatch, **FORMS["on demand"]):
        llm = LLM(str(golden_model), device="cpu", **ROOMY)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(12):
            asked = draw(random.Random(seed))
            check(asked, answers(llm, asked, aborts=True), answers(plain, asked, aborts=False))
    llm.close()


@pytest.mark.torch
def test_on_tritons_interpreter(golden_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws, penalties and logprobs, beside a prompt in chunks and a row sampled on the host."""
    pytest.importorskip("tests.kernels.triton_device")  # skips where triton is missing
    from engineroom.kernels.triton import backend, embedding

    asked = [
        ([1, 2, 3], {"max_tokens": 5}),
        ([4] * 9, {"max_tokens": 4, "logprobs": 2, "repetition_penalty": 1.3, "top_p": 0.9}),
        ([5, 6], {"max_tokens": 2, "logits_processor": damp}),
    ]
    prompts = [prompt for prompt, _ in asked]
    params = [SamplingParams(seed=i, ignore_eos=True, **o) for i, (_, o) in enumerate(asked)]
    filled, fill_in = [], embedding.fill_in
    monkeypatch.setattr(embedding, "fill_in", lambda *args: filled.append(fill_in(*args)))

    def told(overlaps: bool) -> list[Any]:
        monkeypatch.setattr(backend.TritonBackend, "overlaps", overlaps)
        options = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 8}
        with LLM(str(golden_model), device="cuda", **options) as llm:
            return [o.outputs for o in llm.generate(prompts, params, use_tqdm=False)]

    want = told(overlaps=False)
    assert not filled
    assert told(overlaps=True) == want
    assert len(filled) > 1, "tokens of the step before were not read on the device"


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, seed=0, ignore_eos=True, **options)


def test_a_step_is_launched_while_the_one_before_runs(make_late: Any) -> None:
    llm = make_late()
    engine = llm.engine
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=3))
    assert engine.step() == [] and engine.has_work
    told = [len(o.outputs[0].token_ids) for _ in range(3) for o in engine.step()]
    assert told == [1, 2, 3]
    assert not engine.has_work and engine.step() == []
    records = engine.log.records
    assert [r.num_tokens for r in records] == [3, 1, 1]
    starts = [r.t_start for r in records]
    assert starts == sorted(starts)
    assert all(r.t_execute_s > 0 and r.t_build_s > 0 for r in records)


def test_execution_times_of_overlapping_steps_add_up(make_late: Any) -> None:
    llm = make_late()
    started = llm.engine._clock()
    llm.generate([[1, 2]] * 3, greedy(max_tokens=30), use_tqdm=False)
    wall = llm.engine._clock() - started
    assert sum(r.t_execute_s for r in llm.engine.log.records) <= wall


@pytest.mark.parametrize("place", ["launch", "run", "sample"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_step_that_fails_ends_its_own_requests(place: str, after: int, make_late: Any) -> None:
    llm = make_late(max_num_seqs=4)
    engine, backend = llm.engine, llm.engine.loaded.backend
    want = llm.generate([[1, 2, 3]], greedy(max_tokens=9), use_tqdm=False)[0].outputs[0]
    backend.faults[place] = after
    for i in range(3):
        engine.add_request(f"a{i}", [1, 2, 3], greedy(max_tokens=9))
    ended: dict[str, Any] = {}
    for turn in range(60):
        if turn == 4 + after:  # after the fault, which is not theirs
            engine.add_request("b", [1, 2, 3], greedy(max_tokens=9))
        for output in engine.step():
            if output.finished:
                assert output.request_id not in ended
                ended[output.request_id] = output.outputs[0]
        engine.scheduler.check_integrity()
    for i in range(3):
        one = ended[f"a{i}"]
        assert one.finish_reason == "error" and "injected" in one.error
        assert one.token_ids == want.token_ids[: len(one.token_ids)]
    assert ended["b"] == want
    assert engine.scheduler.stats().owned_blocks == 0 and not engine.has_work


def test_closing_lets_a_step_in_flight_land(make_late: Any) -> None:
    llm = make_late()
    llm.engine.add_request("a", [1, 2, 3], greedy(max_tokens=9))
    llm.engine.step()
    llm.engine.step()
    flight = llm.engine._in_flight[-1].flight
    assert flight.execution is None
    llm.close()
    assert flight.execution is not None and not flight.execution.outcome.errors
    llm.close()


def test_aborted_in_flight(make_late: Any) -> None:
    llm = make_late()
    engine = llm.engine
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    outputs = [o for _ in range(3) for o in engine.step()]
    assert [o.outputs[0].finish_reason for o in outputs] == ["abort"]
    assert not engine.has_work and engine.scheduler.stats().owned_blocks == 0
