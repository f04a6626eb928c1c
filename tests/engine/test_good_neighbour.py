"""Hostile requests: a clear answer to each, and a greedy neighbour that never notices."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from engineroom import SamplingParams
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from tests.counts import count

pytestmark = [pytest.mark.cores, pytest.mark.torch]

NEIGHBOUR = list(b"a quiet neighbour")
CALM = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)

FIELDS = [f.name for f in dataclasses.fields(SamplingParams) if f.name != "logits_processor"]
HOSTILE = st.one_of(
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0, 1, 1e-300]
    ),
    st.sampled_from([None, True, False, "", "\x00", "a" * 300, b"x", [], {}, [None], [[None]]]),
    st.sampled_from([{"1": "x"}, {None: None}, {-1: 0}, {259: 1e9}, {260: 1.0}, [2**63], [-1]]),
    st.integers(),
    st.floats(),
    st.lists(st.integers(-5, 300), max_size=5),
    st.lists(st.text(max_size=3), max_size=4),
    st.dictionaries(st.integers(-2, 300), st.floats(-200, 200), max_size=4),
)
PARAMS = st.one_of(  # half of them sound, so that what comes with them is looked at
    st.just({}), st.dictionaries(st.sampled_from(FIELDS), HOSTILE, min_size=1, max_size=4)
)
PROMPT = st.one_of(
    st.lists(st.integers(-2, 262), max_size=12),
    st.text(max_size=20),
    st.sampled_from([[], [2**63], [True], [None], ["a"], [1.5], [0] * 600, "\ud800"]),
    st.sampled_from([None, 5, math.nan, b"ab", {"a": 1}, {1}, [[1]], object()]),
)
AROUND = st.fixed_dictionaries(
    {},
    optional={
        "request_id": st.sampled_from(["", "a" * 257, None, 5, "calm", "\ud800"]),
        "priority": st.sampled_from([None, 2**63, -(2**63), math.nan, True, "1", 1, -1]),
        "cache_salt": st.sampled_from([None, "text", b"x" * 257, 5, b"\x00"]),
    },
)


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(max_num_seqs=8, num_blocks=64)


@pytest.fixture(scope="module")
def undisturbed(llm):
    return llm.generate([NEIGHBOUR], CALM)[0].outputs[0]


@given(options=PARAMS, prompt=PROMPT, around=AROUND)
@settings(
    max_examples=count(reduced=200, full=3000),
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@seed(7)
def test_hostile_requests(options, prompt, around, llm, undisturbed):
    engine = llm.engine
    engine.add_request("calm", NEIGHBOUR, CALM)
    admitted = None
    try:
        params = SamplingParams.from_dict(options)
        params = params.replace(max_tokens=min(params.max_tokens or 4, 4), min_tokens=0)
        around = {"request_id": "hostile", **around}
        admitted = engine.add_request(prompt=prompt, params=params, **around).request_id
    except (ParameterError, AdmissionError) as error:
        assert 10 < len(str(error)) < 2000
    finished: dict = {}
    for _ in range(200):
        for out in engine.step():
            if out.finished:
                assert out.request_id not in finished
                finished[out.request_id] = out
        engine.scheduler.check_integrity()
        if not engine.has_work:
            break
    assert set(finished) == {"calm", admitted or "calm"}
    calm = finished["calm"].outputs[0]
    assert calm.token_ids == undisturbed.token_ids
    assert [{t: e.logprob for t, e in p.items()} for p in calm.logprobs] == [
        {t: e.logprob for t, e in p.items()} for p in undisturbed.logprobs
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_unknown_spelling_is_named(name):
    with pytest.raises(ParameterError, match=name):
        SamplingParams.from_dict({name + "x": 1})
