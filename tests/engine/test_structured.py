"""Structured output through the engine: valid in any budget, pure, and beside everything else."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")
pytest.importorskip("jsonschema_rs", reason="jsonschema-rs is not installed")

import jsonschema_rs

from engineroom import LLM, ParameterError, SamplingParams, StructuredOutput
from engineroom.engine.client import EngineClient
from engineroom.engine.features.grammar_form import GrammarForm
from tests.counts import count
from tests.engine.client_tools import Collector, make_client, submit
from tests.engine.late import late_backends
from tests.features.forms import schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS = (
    StructuredOutput.json(PERSON),
    StructuredOutput(json_object=True),
    StructuredOutput(regex="[a-f]{2,20}(;[0-9]+)*"),
    StructuredOutput(choice=("yes", "no", "perhaps not")),
    StructuredOutput(grammar='start: "<" /[a-z]+/ ">" %json {"type": "integer"}'),
)


@pytest.fixture(scope="module")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm(device="cpu", max_num_seqs=8)


def said(llm: LLM, prompt: list[int] | str, **options: Any) -> Any:
    (out,) = llm.generate([prompt], SamplingParams(**options), use_tqdm=False)
    return out.outputs[0]


@pytest.mark.parametrize("seed", range(count(reduced=5, full=150)))
def test_an_output_is_valid_wherever_it_is_cut(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    wanted = PERSON if seed % 3 == 0 else schema(rng)
    form = StructuredOutput.json(wanted)
    prompt = [rng.randrange(256) for _ in range(rng.randint(1, 9))]
    for budget in (rng.randint(1, 8), rng.randint(8, 30), rng.randint(30, 120)):
        try:
            out = said(
                llm,
                prompt,
                temperature=rng.choice([0.0, 0.8, 2.0]),
                max_tokens=budget,
                seed=seed,
                structured=form,
            )
        except ParameterError as error:
            assert error.field == "max_tokens" and f"max_tokens={budget}" in str(error)
            shortest = int(re.findall(r"shortest has (\d+) tokens", str(error))[0])
            assert shortest > budget
            continue
        assert out.complete and len(out.token_ids) <= budget
        value = json.loads(out.text, parse_float=lambda t: 0.5, parse_int=lambda t: int(t[:15]))
        jsonschema_rs.validator_for(wanted).validate(value)


def test_the_smallest_budget_is_named_and_is_enough(llm: LLM) -> None:
    form = StructuredOutput.json(PERSON)
    with pytest.raises(ParameterError, match="the shortest has 19 tokens") as refused:
        said(llm, "x", max_tokens=18, structured=form)
    assert refused.value.field == "max_tokens"
    out = said(llm, "x", max_tokens=19, temperature=0, structured=form)
    jsonschema_rs.validator_for(PERSON).validate(json.loads(out.text))
    assert out.finish_reason == "length" and out.complete


def test_a_complete_output_that_nothing_may_follow_ends_by_itself(llm: LLM) -> None:
    out = said(
        llm, "x", temperature=0, max_tokens=200, structured=StructuredOutput(regex="[ab]{7}")
    )
    assert re.fullmatch("[ab]{7}", out.text) and len(out.token_ids) == 7
    assert out.finish_reason == "stop" and out.stop_reason is None and out.complete


def test_no_form_has_no_flag(llm: LLM) -> None:
    assert said(llm, "x", max_tokens=3).complete is None


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"logprobs": 2},
    {"repetition_penalty": 1.4, "presence_penalty": 0.7},
    {"frequency_penalty": 0.5, "dry_multiplier": 1.0},
    {"top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {"logit_bias": {34: 3.0, 125: -9.0}},
    {"n": 3},
    {"ignore_eos": True},
    {"stop": ["e"]},
    {"logits_processor": lambda tokens, logits: logits[::-1].copy()},
)


def requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    root = [rng.randrange(256) for _ in range(40)]
    made = []
    for index in range(8):
        extra = rng.choice(EXTRAS)
        options = {"temperature": 0.9, "seed": rng.randrange(1 << 40), **extra}
        form = rng.choice([*FORMS, None])
        budget = rng.choice((20, 33, 70))
        params = SamplingParams(max_tokens=budget, structured=form, **options)
        made.append(([*root[: rng.randint(1, 40)], index], params))
    return made


def bits(output: Any) -> list[Any]:
    return [
        (c.token_ids, c.text, c.finish_reason, c.stop_reason, c.complete, c.logprobs, c.error)
        for c in output.outputs
    ]


@pytest.mark.parametrize("seed", range(count(reduced=1, full=20)))
def test_an_output_is_the_same_alone_and_in_any_batch(
    llm: LLM, make_llm: Callable[..., LLM], seed: int
) -> None:
    asked = requests(seed)
    prompts, params = [p for p, _ in asked], [p for _, p in asked]
    alone = [bits(llm.generate([p], s, use_tqdm=False)[0]) for p, s in asked]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [bits(out) for out in together] == alone
    # Few blocks: requests are preempted and computed anew, in steps of few tokens.
    cramped = make_llm(
        device="cpu", max_num_seqs=6, num_blocks=9, max_num_batched_tokens=16, max_model_len=128
    )
    was_preempted = seed == 0  # by others' lengths, which the seed says
    preempted = cramped.generate(prompts, params, use_tqdm=False)
    assert [bits(out) for out in preempted] == alone
    assert cramped.stats().scheduler.num_preemptions > 0 or not was_preempted


@pytest.fixture(params=[True, False], ids=["a thread", "on demand"])
def late(
    request: pytest.FixtureRequest, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    with late_backends(monkeypatch, thread=request.param, host_sampler=False):
        made = LLM(str(golden_model), device="cpu", max_num_seqs=8)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(count(reduced=1, full=10)))
def test_an_output_is_the_same_on_a_backend_that_overlaps(llm: LLM, late: LLM, seed: int) -> None:
    asked = requests(seed)
    prompts, params = [p for p, _ in asked], [p for _, p in asked]
    plain = llm.generate(prompts, params, use_tqdm=False)
    overlapped = late.generate(prompts, params, use_tqdm=False)
    assert [bits(out) for out in overlapped] == [bits(out) for out in plain]


def test_a_tight_budget_is_kept_on_a_backend_that_overlaps(llm: LLM, late: LLM) -> None:
    params = [
        SamplingParams(temperature=2.0, seed=i, max_tokens=20 + i % 6, structured=FORMS[0])
        for i in range(count(reduced=2, full=8))
    ]
    prompts = [[i] for i in range(len(params))]
    plain = llm.generate(prompts, params, use_tqdm=False)
    for out, twin in zip(late.generate(prompts, params, use_tqdm=False), plain, strict=True):
        assert bits(out) == bits(twin) and out.outputs[0].complete
        jsonschema_rs.validator_for(PERSON).validate(json.loads(out.outputs[0].text))


def test_masks_are_made_while_the_step_is_on_its_way(
    golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first: its rows are built with its step."""
    with late_backends(monkeypatch, thread=False, host_sampler=False):
        late = LLM(str(golden_model), device="cpu", max_model_len=512)
    stream, under_way = late.engine.loaded.backend.stream, []
    mask = GrammarForm.mask

    def watched(form: GrammarForm) -> Any:
        under_way.append(bool(stream._waiting))
        return mask(form)

    monkeypatch.setattr(GrammarForm, "mask", watched)
    params = SamplingParams(
        temperature=0, max_tokens=400, structured=StructuredOutput(regex="[a-z]{20}")
    )
    late.generate([[1, 2, 3]], params, use_tqdm=False)
    late.close()
    assert len(under_way) >= 20 and not under_way[0] and all(under_way[1:])


def test_an_aborted_output_is_a_prefix(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, structured=FORMS[0])
    (whole,) = llm.generate(["x"], params, use_tqdm=False)
    stream = llm.stream("x", params)
    seen = [next(stream) for _ in range(5)][-1].outputs[0]
    stream.close()
    assert whole.outputs[0].token_ids[: len(seen.token_ids)] == seen.token_ids
    assert not seen.complete
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("rest", ["[ab]{3}", ""])
def test_a_stop_string_cuts_and_the_output_says_that_it_is_not_whole(llm: LLM, rest: str) -> None:
    form = StructuredOutput(regex="[ab]{3}stop" + rest)
    out = said(llm, "x", temperature=0, max_tokens=30, stop="stop", structured=form)
    assert re.fullmatch("[ab]{3}", out.text)
    assert out.finish_reason == "stop" and out.stop_reason == "stop" and out.complete is False


def test_a_stop_token_is_no_part_of_the_output(llm: LLM) -> None:
    form = StructuredOutput(regex="[ab]{3}c[ab]{3}")
    out = said(llm, "x", temperature=0, max_tokens=30, stop_token_ids=[99], structured=form)
    assert re.fullmatch("[ab]{3}", out.text) and out.stop_reason == 99 and out.complete is False


@pytest.mark.parametrize(
    "option",
    [
        {"min_tokens": 2},
        {"allowed_token_ids": [97]},
        {"bad_words": ["a"]},
        {"no_repeat_ngram_size": 2},
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ParameterError, match="cannot be combined with structured") as refused:
        SamplingParams(structured=StructuredOutput(json_object=True), **option)
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "0 forms are given"),
        ({"regex": "a", "choice": ["b"]}, "2 forms are given"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": "[1]"}, "an object, or true"),
        ({"json_schema": "false"}, "an object, or true"),
        ({"json_schema": '{"minimum": NaN}'}, "no JSON number"),
        ({"json_schema": '{"items": ' * 70 + "true" + "}" * 70}, "deeper than 64"),
        ({"json_schema": "[" * 100_000}, "deeper than 64"),
        ({"json_schema": '"' + "x" * (1 << 18) + '"'}, "at most 262144"),
        ({"regex": "a" * 20_000}, "at most 16384"),
        ({"regex": ""}, "not empty"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"choice": []}, "at least one text"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": ["a"] * 5000}, "at most 4096"),
        ({"json_object": 1}, "True or False"),
        ({"json": "{}"}, "unknown form 'json'"),
    ],
)
def test_a_form_beyond_its_limits_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(words)) as refused:
        SamplingParams.from_dict({"structured": values})
    assert refused.value.field == "structured" and len(str(refused.value)) < 400


def test_a_form_that_the_grammar_refuses_is_refused_at_the_door(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="unclosed group") as refused:
        said(llm, "x", max_tokens=9, structured=StructuredOutput(regex="(a"))
    assert refused.value.field == "structured"


def test_a_schema_of_pydantic_s_is_taken_as_it_is() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return PERSON

    assert StructuredOutput.json(Model) == StructuredOutput.json(PERSON)
    assert json.loads(StructuredOutput.json(PERSON).json_schema or "") == PERSON


# ------------------------------------------------------------------- compiled beside the steps


@pytest.fixture(params=["thread", "process"])
def client(request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    with make_client(request.param) as made:
        yield made


def asking(grammar: str, max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, structured=StructuredOutput(grammar=grammar))


def test_others_do_not_wait_for_a_grammar_that_is_compiled(client: EngineClient) -> None:
    submit(client, "warm").wait()
    slow = submit(client, "slow", params=asking("slow"))
    for index in range(3):
        submit(client, f"quick{index}").wait()
    assert not slow.outputs  # its compiling takes a second
    assert slow.output().finished
    again = time.monotonic()
    submit(client, "again", params=asking("slow")).wait()
    assert time.monotonic() - again < 0.9  # it is compiled


def test_a_refused_grammar_ends_its_request_alone(client: EngineClient) -> None:
    error = submit(client, "bad", params=asking("bad")).error()
    assert "it is bad" in str(error) and getattr(error, "field", "") == "structured"
    assert submit(client, "r").output().finished


def test_a_request_aborted_while_it_is_compiled_ends(client: EngineClient) -> None:
    slow: Collector = submit(client, "slow", params=asking("slow", 1_000_000))
    client.abort("slow")
    assert slow.output().outputs[0].finish_reason == "abort"


def test_draining_waits_for_what_is_compiled() -> None:
    client = make_client("thread")
    client.start()
    slow = submit(client, "slow", params=asking("slow"))
    client.close(drain=True, timeout=10)
    assert slow.output().outputs[0].finish_reason == "length"


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engineroom.engine.client_thread.PREPARE_SECONDS", 0.1)
    with make_client("thread") as client:
        error = submit(client, "r", params=asking("slow")).error()
        assert "longer than 0.1 s" in str(error)
        assert submit(client, "other").output().finished
