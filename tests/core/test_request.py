"""SamplingParams, admission of token ids, and Request's own rules."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.checks import AdmissionError, check_token_ids
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.request import Request, RequestState
from engineroom.engine.core.sampling_params import SamplingParams
from tests.counts import count

FIELDS = {f.name: f for f in dataclasses.fields(SamplingParams)}
NUMERIC = [n for n, f in FIELDS.items() if "int" in f.type or "float" in f.type]
LISTS = [n for n, f in FIELDS.items() if "tuple" in f.type or "Mapping" in f.type]
SCALARS = [n for n in NUMERIC if n not in LISTS]
# Fields that are refused alone, and what makes them valid.
WITH = {
    "best_of": {"temperature": 1.0},
    "min_tokens": {"max_tokens": None},
    "max_tokens": {"echo": True},
    "temperature": {},
}


def set_(name, value):
    return SamplingParams(**{**WITH.get(name, {}), name: value})


def test_every_numeric_field_has_a_bound_and_every_list_a_limit():
    assert set(NUMERIC) == set(SamplingParams.BOUNDS)
    assert set(LISTS) == set(SamplingParams.LIMITS)
    assert set(FIELDS) - set(NUMERIC) - set(LISTS) == {
        "include_stop_str_in_output",
        "ignore_eos",
        "echo",
        "skip_special_tokens",
        "structured",
        "logits_processor",
    }


@pytest.mark.parametrize("name", SCALARS)
def test_bounds_hold(name):
    low, high = SamplingParams.BOUNDS[name]
    stored = {-1: 0} if name == "top_k" else {}
    for good in (low, high):
        assert getattr(set_(name, good), name) == stored.get(good, good)
    beyond = (low - 1, high + 1, 2**63, -(2**63), 10**400, -(10**400))
    for bad in (*(b for b in beyond if not low <= b <= high), math.nan, math.inf, -math.inf):
        with pytest.raises(ParameterError) as caught:
            set_(name, bad)
        assert caught.value.field == name
        assert f"{low}..{high}" in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "logits_processor"])
@pytest.mark.parametrize(
    "bad", [True, "1", "", [[]], [None], {}, b"x", object(), [1, "x"], 1j, {"a": 1}]
)
def test_wrong_types_are_refused(name, bad):
    if FIELDS[name].type == "bool" and bad is True:
        return
    if name == "logit_bias" and bad == {}:
        return
    if "str" in FIELDS[name].type and bad == "1":
        return
    with pytest.raises(ParameterError) as caught:
        set_(name, bad)
    assert caught.value.field == name


@pytest.mark.parametrize("name", FIELDS)
def test_none_is_refused_where_it_has_no_meaning(name):
    if FIELDS[name].default is None or name == "max_tokens":
        assert getattr(set_(name, None), name) is None
    else:
        with pytest.raises(ParameterError, match=name):
            set_(name, None)


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_capped(name):
    number, length = SamplingParams.LIMITS[name]
    if name == "logit_bias":
        full = dict.fromkeys(range(number), 1.0)
        over = dict.fromkeys(range(number + 1), 1.0)
    elif length is None:
        full, over = list(range(number)), list(range(number + 1))
    else:
        full, over = ["x" * length] * number, ["x"] * (number + 1)
        with pytest.raises(ParameterError, match=str(length)):
            SamplingParams(**{name: ["x" * (length + 1)]})
        for bad in ("", "\ud800"):
            with pytest.raises(ParameterError, match=name):
                SamplingParams(**{name: [bad]})
    assert len(getattr(SamplingParams(**{name: full}), name)) == number
    with pytest.raises(ParameterError, match=str(number)):
        SamplingParams(**{name: over})


def test_values_inside_lists_are_bounded():
    for bad in (-1, 2**31, True, 1.0, None, math.nan):
        with pytest.raises(ParameterError, match="stop_token_ids"):
            SamplingParams(stop_token_ids=[bad])
        with pytest.raises(ParameterError, match="logit_bias"):
            SamplingParams(logit_bias={bad: 1})
    for bad in (-100.5, 101, math.nan, None, "1"):
        with pytest.raises(ParameterError, match="logit_bias"):
            SamplingParams(logit_bias={3: bad})
    for bad in ("01", "-1", "+1", " 1", "1_0", "٣", "9" * 5000):
        with pytest.raises(ParameterError, match="logit_bias"):
            SamplingParams(logit_bias={bad: 1})
    with pytest.raises(ParameterError, match="twice"):
        SamplingParams(logit_bias={"3": 1, 3: 2})
    assert SamplingParams(logit_bias={"3": 1}).logit_bias == {3: 1.0}


def test_freezing():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], top_k=-1, logit_bias={1: 2})
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2) and params.top_k == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert hash(params) == hash(params.replace())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"best_of": 2, "temperature": 0}, "best_of"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1e-30}, "temperature"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
    ],
)
def test_combinations_are_refused(options, field):
    with pytest.raises(ParameterError) as caught:
        SamplingParams.from_dict(options)
    assert caught.value.field == field


def test_unknown_names_get_their_nearest():
    with pytest.raises(ParameterError, match="did you mean 'temperature'") as caught:
        SamplingParams.from_dict({"temprature": 1})
    assert caught.value.field == "temprature"
    assert "top_p" in str(caught.value)
    with pytest.raises(ParameterError, match="did you mean 'top_p'"):
        SamplingParams().replace(top_pp=1)
    for bad in (None, [], "n", 3):
        with pytest.raises(ParameterError):
            SamplingParams.from_dict(bad)
    for key in (None, 3, "x" * 100_000):
        with pytest.raises(ParameterError) as caught:
            SamplingParams.from_dict({key: 1})
        assert len(str(caught.value)) < 1000


def test_dict_round_trip():
    params = SamplingParams(
        n=2,
        stop=["a"],
        logit_bias={5: -1},
        seed=2**64 - 1,
        dry_sequence_breakers=[],
        max_tokens=None,
    )
    assert SamplingParams.from_dict(params.to_dict()) == params
    assert SamplingParams().to_dict() == {}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=count(reduced=300, full=5000), deadline=None)
@given(st.dictionaries(st.sampled_from(list(FIELDS)), json_like, max_size=4))
def test_hostile_values_give_a_parameter_error_or_valid_parameters(options):
    options.pop("logits_processor", None)
    try:
        params = SamplingParams.from_dict(options)
    except ParameterError as error:
        assert error.field in FIELDS and len(str(error)) < 500
        return
    for name in SCALARS:
        value = getattr(params, name)
        low, high = SamplingParams.BOUNDS[name]
        assert value is None or low <= value <= high
    assert SamplingParams.from_dict(params.to_dict()) == params


def test_replayable():
    assert SamplingParams().replayable
    assert not SamplingParams(logits_processor=print).replayable


class TestTokenIds:
    def test_good(self):
        params = SamplingParams(stop_token_ids=[9], allowed_token_ids=[0], logit_bias={9: 1})
        check_token_ids(params, [0, 9], 10, bad_word_ids=[(9, 0)])

    @pytest.mark.parametrize("bad", [-1, 10, 2**63, True, 1.0, None, "1", 10**4000])
    def test_prompt(self, bad):
        with pytest.raises(AdmissionError, match="prompt token 2") as caught:
            check_token_ids(SamplingParams(), [0, 1, bad], 10)
        assert caught.value.code == "token_id"
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(
        "options",
        [{"stop_token_ids": [10]}, {"allowed_token_ids": [1, 10]}, {"logit_bias": {10: 1}}],
    )
    def test_parameters(self, options):
        with pytest.raises(ParameterError) as caught:
            check_token_ids(SamplingParams(**options), [0], 10)
        assert caught.value.field in options

    def test_bad_words(self):
        with pytest.raises(ParameterError, match="bad_words"):
            check_token_ids(SamplingParams(), [0], 10, bad_word_ids=[(1,), (2, 10)])


class TestRequest:
    def make(self, **options):
        defaults = {
            "request_id": "r",
            "prompt_token_ids": [1, 2],
            "params": SamplingParams(),
            "max_tokens": 4,
            "seed": 0,
        }
        return Request(**{**defaults, **options})

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"request_id": ""}, "request_id"),
            ({"request_id": "x" * 257}, "request_id"),
            ({"request_id": 3}, "request_id"),
            ({"priority": 2**31}, "priority"),
            ({"priority": True}, "priority"),
            ({"priority": 1.5}, "priority"),
            ({"arrival": math.nan}, "arrival"),
            ({"cache_salt": "text"}, "cache_salt"),
            ({"cache_salt": b"x" * 257}, "cache_salt"),
            ({"params": SamplingParams(min_tokens=5, max_tokens=None)}, "min_tokens"),
        ],
    )
    def test_refusals(self, options, field):
        with pytest.raises(ParameterError) as caught:
            self.make(**options)
        assert caught.value.field == field

    def test_views(self):
        request = self.make()
        assert request.key == ("r", 0)
        assert request.prompt_token_ids == (1, 2) and request.output_token_ids == ()
        request.token_ids += [7, -1]
        request.num_pending = 1
        assert request.num_tokens == 4 and request.num_output_tokens == 1
        assert request.output_token_ids == (7,) and request.known_token_ids == [1, 2, 7]
        request.finish(FinishReason.ABORT, 0.0)
        assert request.state is RequestState.FINISHED and request.is_finished
        assert request.token_ids == [1, 2, 7]
        assert "finished" in repr(request)

    def test_timings_sum(self):
        request = self.make()
        request.accept(1, 10.0)
        request.start([0], 0, 0, 11.0)
        request.fall_back(11.5)
        request.start([0], 0, 0, 12.0)
        request.first_token_ns = request.timeline.mark("decode", 14.0)
        request.finish(FinishReason.STOP, 15.0)
        t = request.timings()
        assert (t.queued_s, t.prefill_s, t.decode_s) == (1.5, 2.5, 1.0)
        assert t.queued_s + t.prefill_s + t.decode_s == t.total_s == 5.0
        assert t.time_to_first_token_s == 4.0

    def test_admission_codes_are_closed(self):
        with pytest.raises(ValueError, match="never_fits"):
            AdmissionError("nope", "x")
