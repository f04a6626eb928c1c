"""Law 2 as equalities: a request's tokens and logprobs, bit for bit, whatever runs beside it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from engineroom import SamplingParams
from tests.counts import count
from tests.engine import golden

pytestmark = pytest.mark.cores

EXAMPLES = count(reduced=8, full=100)
RUN = {
    "deadline": None,
    "max_examples": EXAMPLES,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}

PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=70)
SAMPLED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "top_k": st.sampled_from([0, 20]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.integers(1, 24),
    }
)
REQUEST = st.tuples(PROMPTS, SAMPLED)


def run(llm: Any, requests: list[tuple[list[int], dict]]) -> list[tuple]:
    """Each request's token ids and the bytes of its logprobs (chosen and top 3)."""
    params = [SamplingParams(logprobs=3, ignore_eos=True, **p) for _, p in requests]
    outputs = llm.generate([ids for ids, _ in requests], params, use_tqdm=False)
    return [bits(out) for out in outputs]


def bits(out: Any) -> tuple:
    sample = out.outputs[0]
    assert sample.error is None, sample.error
    logprobs = [
        (token, struct.pack("<d", entry.logprob), entry.rank)
        for position in sample.logprobs
        for token, entry in position.items()
    ]
    return sample.token_ids, tuple(logprobs)


@pytest.fixture(scope="module", params=["cpu", pytest.param("reference", marks=pytest.mark.torch)])
def make(make_llm: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """make(**options) -> an LLM of the golden model on the device of this run of the tests."""
    if request.param == "reference":
        pytest.importorskip("torch", reason="the reference backend needs torch")
    return partial(make_llm, device=request.param)


@pytest.fixture(scope="module")
def alone(make):
    """The yardstick: one request at a time, no prefix cache, prompts in one piece."""
    llm = make(enable_prefix_caching=False, max_num_batched_tokens=512, block_size=16)
    return lambda request: run(llm, [request])[0]


@given(requests=st.lists(REQUEST, min_size=2, max_size=24))
@settings(**RUN)
@seed(1)
def test_neighbours_change_nothing(requests, alone, crowd):
    assert run(crowd, requests) == [alone(r) for r in requests]


@pytest.fixture(scope="module")
def crowd(make):
    return make(max_num_seqs=64)


@pytest.mark.parametrize("neighbours", count(reduced=[63], full=[1, 2, 7, 15, 16, 17, 31, 63]))
def test_a_crowd_of_random_neighbours(neighbours, alone, crowd):
    request = ([5, 6, 7] * 9, {"temperature": 0.8, "seed": 11, "max_tokens": 16})
    others = [
        ([i % 251, 3] * (1 + i % 30), {"temperature": 1.0, "seed": i, "max_tokens": 1 + i % 20})
        for i in range(neighbours)
    ]
    mixed = [*others[: neighbours // 2], request, *others[neighbours // 2 :]]
    assert run(crowd, mixed)[neighbours // 2] == alone(request)


@given(requests=st.lists(REQUEST, min_size=1, max_size=6), budget=st.sampled_from([1, 3, 16, 33]))
@settings(**RUN)
@seed(2)
def test_chunking_changes_nothing(requests, budget, alone, chunked):
    assert run(chunked(budget), requests) == [alone(r) for r in requests]


@pytest.fixture(scope="module")
def chunked(make):
    made: dict[int, Any] = {}

    def llm(budget: int) -> Any:
        if budget not in made:
            made[budget] = make(
                max_num_batched_tokens=budget, max_num_seqs=4, enable_prefix_caching=False
            )
        return made[budget]

    return llm


@given(request=REQUEST, repeats=st.integers(2, 3))
@settings(**RUN)
@seed(3)
def test_a_prefix_hit_changes_nothing(request, repeats, alone, crowd):
    prompt, params = request
    long = (prompt * 60)[:60]
    expected = alone((long, params))
    hits = 0
    for _ in range(repeats):
        out = crowd.generate(
            [long], SamplingParams(logprobs=3, ignore_eos=True, **params), use_tqdm=False
        )[0]
        hits += out.usage.cached_tokens
        assert bits(out) == expected
    assert hits >= 48 * (repeats - 1)


@given(requests=st.lists(REQUEST, min_size=3, max_size=8))
@settings(**RUN)
@seed(4)
def test_preemption_changes_nothing(requests, alone, cramped):
    assert run(cramped, requests) == [alone(r) for r in requests]


def test_the_cramped_pool_does_preempt(cramped):
    cramped.generate([[1] * 40] * 6, SamplingParams(max_tokens=40, ignore_eos=True, seed=1))
    assert sum(record.num_preempted for record in cramped.engine.log.records) > 0


@pytest.fixture(scope="module")
def cramped(make):
    """Eight blocks: three requests of this size cannot all stay."""
    return make(num_blocks=8, block_size=16, max_model_len=128, max_num_seqs=8)


@given(request=REQUEST, block_size=st.sampled_from([1, 8, 32, 64]))
@settings(**RUN)
@seed(5)
def test_block_size_changes_nothing(request, block_size, alone, blocked):
    assert run(blocked(block_size), [request])[0] == alone(request)


@pytest.fixture(scope="module")
def blocked(make):
    made: dict[int, Any] = {}

    def llm(size: int) -> Any:
        if size not in made:
            made[size] = make(block_size=size, max_model_len=256, max_num_seqs=4)
        return made[size]

    return llm


def test_threads_change_nothing(alone, make):
    request = ([9, 8, 7] * 20, {"temperature": 0.9, "seed": 5, "max_tokens": 24})
    expected = alone(request)
    for threads in (1, 2):
        assert run(make(threads=threads), [request])[0] == expected


def test_the_golden_tokens(make):
    """The engine's greedy tokens are those of a float64 forward pass written independently."""
    prompt = list(b"The engine room")
    expected, margin = golden.greedy(prompt, 24)
    assert margin > 1e-3, "the golden model has a near-tie; its seed must change"
    out = make().generate([prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    assert list(out[0].outputs[0].token_ids) == expected
