"""The sampling program: every stage against an independent oracle, and each row on its own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.kernels import sampling
from engineroom.kernels import sampling_vectors as vectors
from engineroom.kernels.backend import Logits, Sampler, SampleResult
from engineroom.kernels.cpu.sampler import CpuLogits, CpuSampler
from tests.counts import count
from tests.kernels import sampling_oracle as oracle
from tests.kernels.sampling_rows import COLUMNS, inputs

torch = pytest.importorskip("torch", reason="the reference sampler needs torch")

from engineroom.kernels.reference.sampling import (  # noqa: E402
    ReferenceLogits,
    ReferenceSampler,
)

CASES = count(reduced=120, full=3000)
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "reference": ReferenceSampler,
    "cpu": lambda vocab_size: CpuSampler(vocab_size, threads=2),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


def run(logits: np.ndarray, rows: list[dict[str, Any]]) -> SampleResult:
    """The answer that every backend's sampler gives, to the bit."""
    vocab_size = logits.shape[1]
    given_by: dict[str, SampleResult] = {}
    for name, make in SAMPLERS.items():
        sampler = make(vocab_size)
        given_by[name] = sampler.run(sampler.from_numpy(logits), inputs(rows, vocab_size))
    answer = given_by["reference"]
    for name, other in given_by.items():
        for field in dataclasses.fields(SampleResult):
            ours, theirs = getattr(answer, field.name), getattr(other, field.name)
            assert theirs.dtype == ours.dtype and theirs.shape == ours.shape, (name, field.name)
            assert theirs.tobytes() == ours.tobytes(), (name, field.name)
    return answer


def row_bytes(result: SampleResult, r: int) -> tuple[bytes, ...]:
    """Row r's answer, without the padding that a neighbour's longer top-k brings."""
    used = int(np.count_nonzero(result.top_ids[r] >= 0))
    return (
        result.tokens[r].tobytes(),
        result.logprobs[r].tobytes(),
        result.ranks[r].tobytes(),
        result.top_ids[r, :used].tobytes(),
        result.top_logprobs[r, :used].tobytes(),
    )


def fp32(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its numbers as the program gets them."""
    out = {k: COLUMNS[k][1](v).item() if k in COLUMNS else v for k, v in row.items()}
    out["bias"] = {t: float(np.float32(v)) for t, v in dict(row.get("bias", {})).items()}
    return out


def uniform_of(row: Mapping[str, Any], vocab: int) -> Callable[[int], list[float]]:
    key = (row.get("seed", 0), row.get("sample_index", 0), row.get("position", 0))
    return lambda stream: sampling.uniforms(*key, stream, vocab).tolist()


# ---- inputs: coarse grids make ties, fine ones borders


@st.composite
def scores(draw: st.DrawFn, least: int = 1, most: int = 40) -> np.ndarray:
    """fp32 logits: ties, all equal, huge and tiny spreads."""
    size = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "coarse", "equal", "huge", "tiny", "two"]))
    x = {
        "normal": lambda: rng.normal(size=size) * 3,
        "coarse": lambda: rng.integers(-8, 8, size) * 0.5,
        "equal": lambda: np.full(size, rng.normal()),
        "huge": lambda: rng.normal(size=size) * 1e4,
        "tiny": lambda: rng.normal(size=size) * 1e-3,
        "two": lambda: rng.integers(0, 2, size) * 4.0,
    }[kind]()
    return x.astype(np.float32)


SHARES = st.floats(0, 1, width=32)


@st.composite
def parameters(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    """Any mixture of stages for one row of `vocab` logits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def some(share: float) -> list[int]:
        return np.flatnonzero(rng.random(vocab) < share).tolist()

    row: dict[str, Any] = {
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "sample_index": int(rng.integers(0, 128)),
        "position": int(rng.integers(0, 2**20)),
        "temperature": draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.0, 2.5])),
    }
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "top_n_sigma": lambda: {"top_n_sigma": float(rng.uniform(0.1, 3))},
        "top_k": lambda: {"top_k": int(rng.integers(1, vocab + 3))},
        "typical_p": lambda: {"typical_p": float(rng.random())},
        "top_p": lambda: {"top_p": float(rng.random())},
        "min_p": lambda: {"min_p": float(rng.random() ** 2)},
        "xtc": lambda: {"xtc_probability": 0.7, "xtc_threshold": float(rng.random() ** 2 / 2)},
        "penalties": lambda: {
            "repetition_penalty": float(rng.uniform(0.5, 2)),
            "presence_penalty": float(rng.uniform(-2, 2)),
            "frequency_penalty": float(rng.uniform(-2, 2)),
            "history": {t: int(rng.integers(0, 4)) for t in some(0.4)},
        },
        "bias": lambda: {"bias": {t: float(rng.normal() * 4) for t in some(0.3)}},
        "ban": lambda: {"ban": some(0.3)},
        "allowed": lambda: {"allowed": some(0.7)},
    }
    for name in draw(st.sets(st.sampled_from(sorted(stages)), max_size=5)):
        row.update(stages[name]())
    return row


# ---- each filter against its definition


def kept(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


FILTERS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., oracle.Kept]]] = {
    "top_n_sigma": (sampling.keep_top_n_sigma, oracle.top_n_sigma),
    "typical_p": (sampling.keep_typical, oracle.typical_p),
    "top_p": (sampling.keep_top_p, oracle.top_p),
    "min_p": (sampling.keep_min_p, oracle.min_p),
    "xtc": (sampling.keep_xtc, oracle.xtc),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter_equals_its_definition(name: str) -> None:
    keep, define = FILTERS[name]
    judged = 0

    @given(scores(), SHARES)
    @settings(max_examples=CASES, deadline=None)
    def compare(x: np.ndarray, p: float) -> None:
        nonlocal judged
        value = np.float32(p * 3 if name == "top_n_sigma" else p)
        z = x - x.max()
        mask = keep(z, value)
        assert mask.any()
        if name == "top_n_sigma" and z.min() == 0:
            assert mask.all()
            return
        doubt = oracle.Doubt()
        expected = define(dict(enumerate(z.tolist())), float(value), doubt)
        if doubt.sure:
            judged += 1
            assert kept(mask) == set(expected)

    compare()
    assert judged > CASES / 4, "too few cases that float64 can judge"


@given(scores(), st.integers(1, 50))
@settings(max_examples=CASES, deadline=None)
def test_top_k_equals_its_definition(x: np.ndarray, k: int) -> None:
    z = x - x.max()
    expected = oracle.top_k(dict(enumerate(z.tolist())), k, oracle.Doubt())
    assert kept(sampling.keep_first(np.abs(z), k)) == set(expected)


def test_ties_at_a_border_keep_the_lower_ids() -> None:
    z = np.array([-1, 0, -1, -1, -2, -1], np.float32)
    assert kept(sampling.keep_first(np.abs(z), 3)) == {0, 1, 2}
    assert kept(sampling.keep_top_p(np.zeros(4, np.float32), np.float32(0.5))) == {0, 1}
    assert kept(sampling.keep_top_p(np.zeros(4, np.float32), np.float32(0.51))) == {0, 1, 2}
    assert kept(sampling.keep_typical(np.zeros(4, np.float32), np.float32(0.25))) == {0}
    # XTC: of equals above the threshold the last in order stays.
    assert kept(sampling.keep_xtc(np.zeros(4, np.float32), np.float32(0.2))) == {3}


def test_filters_keep_at_least_one_token() -> None:
    z = np.array([-3, 0, -0.5], np.float32)
    assert kept(sampling.keep_top_p(z, np.float32(0))) == {1}
    assert len(kept(sampling.keep_typical(z, np.float32(0)))) == 1
    assert kept(sampling.keep_min_p(z, np.float32(1))) == {1}
    assert kept(sampling.keep_xtc(z, np.float32(0))) == {0}
    assert kept(sampling.keep_top_n_sigma(z, np.float32(1e-6))) == {1}


def test_xtc_needs_two_choices_above_the_threshold() -> None:
    z = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    z -= z.max()
    for threshold, expected in ((0.5, {0, 1, 2}), (0.2, {1, 2}), (0.05, {2}), (0.7, {0, 1, 2})):
        assert kept(sampling.keep_xtc(z, np.float32(threshold))) == expected


# ---- the whole program


def test_program_equals_the_oracle() -> None:
    judged = failed = 0

    @given(st.data())
    @settings(max_examples=CASES * 2, deadline=None)
    def compare(data: st.DataObject) -> None:
        nonlocal judged, failed
        x = data.draw(scores())
        if data.draw(st.booleans()):
            x[:: data.draw(st.integers(2, 5))] = -np.inf
        row = data.draw(parameters(len(x)))
        token = int(run(x[None], [row]).tokens[0])
        if not np.isfinite(x.max()):
            assert token == sampling.FAILED
            return
        expected, sure = oracle.choose(x.tolist(), fp32(row), uniform_of(row, len(x)))
        failed += expected == oracle.NO_TOKEN
        if sure:
            judged += 1
            assert token == expected

    compare()
    assert judged > CASES, "too few cases that float64 can judge"


@pytest.mark.parametrize("vector", vectors.ROWS, ids=lambda v: f"{v.vocab}-{v.salt}-{v.bits}")
def test_row_vectors(vector: vectors.RowVector) -> None:
    x = vectors.logits(vector.vocab, vector.salt, vector.bits)
    result = run(x[None], [{**vector.row, "num_logprobs": 0}])
    assert result.tokens[0] == vector.token
    assert result.ranks[0] == vector.rank
    if vector.token == sampling.FAILED:
        assert np.isnan(result.logprobs[0])
    else:
        assert result.logprobs.view(np.uint32)[0] == vector.logprob
    if vector.vocab <= 4096:
        row = fp32(vector.row)
        token, sure = oracle.choose(x.tolist(), row, uniform_of(row, vector.vocab))
        assert token == vector.token or not sure


def test_row_vectors_hold_against_the_oracle() -> None:
    sure = 0
    for vector in vectors.ROWS:
        if vector.vocab <= 4096:
            x, row = vectors.logits(vector.vocab, vector.salt, vector.bits), fp32(vector.row)
            sure += oracle.choose(x.tolist(), row, uniform_of(row, vector.vocab))[1]
    assert sure >= 15


def test_filters_after_typical_p_measure_from_what_it_kept() -> None:
    # The top token (0.43) is too predictable to be typical; five of the others (0.07 each) stay.
    x = np.array([[0.0] + [-1.8] * 8], np.float32)
    row = {"typical_p": 0.3, "min_p": 1.0}
    rows = [{**row, "seed": s} for s in range(60)]
    assert set(run(np.repeat(x, 60, axis=0), rows).tokens.tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    "off",
    [
        {"top_k": 10**6},
        {"top_k": 40},
        {"history": {1: 3, 5: 1}},
        {"bias": {0: 0.0, 7: 0.0}},
        {"xtc_threshold": 0.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.9},
        {"allowed": range(40)},
        {"top_n_sigma": 1000.0},
    ],
)
def test_stages_that_change_nothing_leave_the_token_alone(off: dict[str, Any]) -> None:
    x = np.random.default_rng(2).normal(size=(50, 40)).astype(np.float32)
    plain = [{"seed": s, "temperature": 0.7 if s % 2 else 1.0} for s in range(50)]
    expected = run(x, plain)
    assert run(x, [{**row, **off} for row in plain]).tokens.tolist() == expected.tokens.tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    x = np.array([[1, 5, 5, 5], [0, 0, 0, 0], [-np.inf, -2, -1, -1]], np.float32)
    greedy = {"temperature": 0.0}
    assert run(x, [greedy] * 3).tokens.tolist() == [1, 0, 2]
    adjusted = [{**greedy, "ban": [1]}, {**greedy, "bias": {3: 1.0}}, {**greedy, "allowed": [1, 3]}]
    assert run(x, adjusted).tokens.tolist() == [2, 3, 3]
    # Filters and noise have no part in it.
    noisy = {**greedy, "seed": 9, "top_p": 0.1, "xtc_probability": 1.0, "xtc_threshold": 0.0}
    assert run(x, [noisy] * 3).tokens.tolist() == [1, 0, 2]


def test_penalties_by_hand() -> None:
    x = np.array([2.0, -2.0, 1.0, 3.0, 0.5], np.float32)
    row = {
        "repetition_penalty": 2.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "history": {0: 0, 1: 2, 3: 1},
        "bias": {4: 1.5},
        "ban": [2],
    }
    got = sampling.adjust(x, sampling.Row.of(inputs([row], 5), 0))
    # token 0 is in the prompt only: repetition alone; banned 2; biased 4
    assert got.tolist() == [1.0, -4.0 - 0.5 - 0.5, -math.inf, 1.5 - 0.25 - 0.5, 2.0]
    assert x.tolist() == [2.0, -2.0, 1.0, 3.0, 0.5], "the caller's logits stay as they were"
    biased_first = {"repetition_penalty": 2.0, "history": {0: 0}, "bias": {0: -3.0}}
    assert sampling.adjust(x, sampling.Row.of(inputs([biased_first], 5), 0))[0] == -2.0


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_mask_lets_only_its_tokens_through(vocab: int) -> None:
    x = np.zeros((vocab, vocab), np.float32)
    for temperature in (0.0, 1.0):
        rows = [{"temperature": temperature, "allowed": [t], "seed": t} for t in range(vocab)]
        assert run(x, rows).tokens.tolist() == list(range(vocab))
        ban = [{"temperature": temperature, "ban": set(range(vocab)) - {t}} for t in range(vocab)]
        assert run(x, ban).tokens.tolist() == list(range(vocab))


# ---- rows that fail


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad", [[np.nan, 0, 1], [0, np.nan, 1], [np.inf, 0, 1], [-np.inf] * 3, [np.inf, np.nan, 0]]
)
def test_unusable_logits_fail_their_row_alone(bad: list[float], temperature: float) -> None:
    x = np.array([[0, 1, 2], bad, bad, [2, 1, 0]], np.float32)
    row = {"temperature": temperature, "num_logprobs": 2}
    result = run(x, [row, row, {**row, "target": 1}, row])
    alone = run(x[[0, 3]], [row, row])
    assert result.tokens[1] == result.tokens[2] == sampling.FAILED
    assert np.isnan(result.logprobs[1:3]).all() and (result.ranks[1:3] == 0).all()
    assert (result.top_ids[1:3] == -1).all() and np.isnan(result.top_logprobs[1:3]).all()
    assert row_bytes(result, 0) == row_bytes(alone, 0)
    assert row_bytes(result, 3) == row_bytes(alone, 1)
    # A ban cannot hide a NaN: what the model gave is broken.
    hidden = {**row, "ban": [i for i, v in enumerate(bad) if not np.isfinite(v)]}
    assert run(np.array([bad], np.float32), [hidden]).tokens[0] == sampling.FAILED


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_everything_banned_fails_but_reports_its_top(temperature: float) -> None:
    x = np.array([[0, 2, 1]], np.float32)
    row = {"temperature": temperature, "num_logprobs": 2}
    for nothing in ({"ban": [0, 1, 2]}, {"allowed": []}, {"ban": [0], "allowed": [0]}):
        result = run(x, [{**row, **nothing}])
        assert result.tokens[0] == sampling.FAILED
        assert np.isnan(result.logprobs[0]) and result.ranks[0] == 0
        assert result.top_ids[0].tolist() == [1, 2]


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=30),
    st.sampled_from([1e-6, 1e-5, 1e-3, 1.0, 100.0, 1e6, 1e30]),
    st.fixed_dictionaries(
        {},
        optional={
            "top_p": SHARES,
            "typical_p": SHARES,
            "min_p": SHARES,
            "top_n_sigma": st.floats(0, 1000, width=32),
            "xtc_threshold": SHARES,
            "xtc_probability": SHARES,
            "top_k": st.integers(0, 2**31 - 1),
        },
    ),
)
@settings(max_examples=CASES, deadline=None)
def test_hostile_logits_and_temperatures_still_give_a_token(
    logits: list[float], temperature: float, filters: dict[str, Any]
) -> None:
    x = np.array([logits], np.float32)
    row = {"temperature": temperature, "num_logprobs": 5, **filters}
    result = run(x, [row])
    assert 0 <= result.tokens[0] < len(logits)
    assert not np.isnan(result.logprobs[0]) and result.logprobs[0] <= 0
    if temperature <= 1e-5:
        gap = x[0].max() - x[0][x[0] < x[0].max()].max(initial=-np.inf)
        if gap > 1e-3 and not set(filters) & {"typical_p", "xtc_probability"}:
            assert x[0, result.tokens[0]] == x[0].max(), "cold sampling is greedy"


def test_penalties_that_overflow_fail_the_row_and_not_the_step() -> None:
    x = np.array([[3e38, 1.0, 0.0], [2.0, 1.0, 0.0]], np.float32)
    hot = {"repetition_penalty": 0.01, "history": {0: 1}, "temperature": 0.0}
    assert run(x, [hot, {"temperature": 0.0}]).tokens.tolist() == [sampling.FAILED, 0]


# ---- logprobs


@given(scores(), st.integers(0, 50), st.data())
@settings(max_examples=CASES, deadline=None)
def test_logprobs_ranks_and_top_against_float64(x: np.ndarray, k: int, data: st.DataObject) -> None:
    row = data.draw(parameters(len(x)))
    target = data.draw(st.integers(-1, len(x) - 1))
    result = run(x[None], [{**row, "num_logprobs": k, "target": target}])
    exact = np.array(oracle.logprobs(x.tolist()))
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]
    assert result.top_ids[0].tolist() == order + [-1] * (k - len(order))
    np.testing.assert_allclose(result.top_logprobs[0, : len(order)], exact[order], 3e-7, 2e-6)
    assert np.isnan(result.top_logprobs[0, len(order) :]).all()
    token = int(result.tokens[0])
    if target >= 0:
        assert token == target
    if token != sampling.FAILED:  # of the raw logits, whatever bias and penalties did
        np.testing.assert_allclose(result.logprobs[0], exact[token], 3e-7, 2e-6)
        assert result.ranks[0] == 1 + sum(v > x[token] for v in x)
        for make in SAMPLERS.values():
            sampler = make(len(x))
            whole = sampler.log_softmax(sampler.from_numpy(x[None]))
            assert whole[0, token].tobytes() == result.logprobs[0].tobytes()
            assert whole[0, order].tobytes() == result.top_logprobs[0, : len(order)].tobytes()


def test_logprobs_only_where_wanted() -> None:
    x = np.random.default_rng(4).normal(size=(4, 9)).astype(np.float32)
    wanted = [-1, 0, 3, 1]
    result = run(x, [{"temperature": 0.0, "num_logprobs": k} for k in wanted])
    assert np.isnan(result.logprobs).tolist() == [True, False, False, False]
    assert result.ranks.tolist() == [0, 1, 1, 1]
    assert (result.top_ids >= 0).sum(axis=1).tolist() == [0, 0, 3, 1]
    none = run(x, [{"temperature": 0.0}] * 4)
    assert none.top_ids.shape == none.top_logprobs.shape == (4, 0)
    for field in dataclasses.fields(SampleResult):
        dtype = np.float32 if "logprobs" in field.name else np.int32
        assert getattr(result, field.name).dtype == dtype, field.name


@every_sampler
def test_log_softmax_of_rows_that_fail_is_nan(make: Callable[[int], Sampler]) -> None:
    sampler = make(3)
    x = np.array([[0, 0, -np.inf], [np.nan, 0, 0], [-np.inf] * 3, [np.inf, 0, 0]], np.float32)
    got = sampler.log_softmax(sampler.from_numpy(x))
    np.testing.assert_allclose(got[0], [-math.log(2), -math.log(2), -np.inf], 1e-6)
    assert np.isnan(got[1:]).all()


# ---- law 2: a row on its own


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(8)
    vocab, pool = 997, 64
    x = (rng.normal(size=(pool, vocab)) * 3).astype(np.float32)
    x[5] = np.round(x[5])  # ties
    x[6, 7] = np.nan
    rows = []
    for r in range(pool):
        row: dict[str, Any] = {
            "seed": r,
            "position": int(rng.integers(0, 9)),
            "num_logprobs": r % 4,
        }
        optional = {
            "temperature": float(rng.choice([0.0, 0.5, 1.0])),
            "top_k": int(rng.integers(1, 60)),
            "top_p": float(rng.random()),
            "min_p": float(rng.random() * 0.1),
            "typical_p": float(rng.random()),
            "top_n_sigma": 1.5,
            "xtc_probability": 0.5,
            "repetition_penalty": 1.2,
            "history": {int(t): 1 for t in rng.choice(vocab, 9, replace=False)},
            "bias": {int(t): 2.0 for t in rng.choice(vocab, 4, replace=False)},
            "ban": rng.choice(vocab, 5, replace=False).tolist(),
            "allowed": rng.choice(vocab, 500, replace=False).tolist(),
            "target": int(rng.integers(0, vocab)) if r % 9 == 0 else -1,
        }
        row |= {name: value for name, value in optional.items() if rng.random() < 0.4}
        rows.append(row)
    alone = [row_bytes(run(x[r : r + 1], [rows[r]]), 0) for r in range(pool)]
    for size in range(1, pool + 1, count(reduced=3, full=1)):
        chosen = rng.permutation(pool)[:size]
        result = run(x[chosen], [rows[r] for r in chosen])
        for place, r in enumerate(chosen):
            assert row_bytes(result, place) == alone[r], (size, place, r)


def test_the_caller_gets_the_same_bits_from_any_memory_layout() -> None:
    wide = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    rows = inputs([{"seed": s, "num_logprobs": 3, "top_p": 0.9} for s in range(6)], 100)
    sampler = ReferenceSampler(100)
    strided = sampler.run(ReferenceLogits(wide[:, 50:150]), rows)
    column = sampler.run(ReferenceLogits(wide[:, 50:150].t().contiguous().t()), rows)
    packed = sampler.run(ReferenceLogits(wide[:, 50:150].contiguous()), rows)
    for r in range(6):
        assert row_bytes(strided, r) == row_bytes(column, r) == row_bytes(packed, r)


# ---- what is drawn


def test_draws_follow_softmax() -> None:
    # 0.999 quantile of chi-square with 7 degrees of freedom is 24.3; the seeds are fixed.
    z = np.array([0, -0.5, -1, -1, -2, -3, -4, -5], np.float32)
    p = np.exp(z.astype(np.float64))
    p /= p.sum()
    draws = count(reduced=60_000, full=1_000_000)
    counter = np.zeros((draws, 2, 4), dtype=np.uint32)
    counter[:, :, 0], counter[:, :, 2] = [0, 1], np.arange(draws)[:, None]
    for seed in (1, 2**40):
        words = sampling.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(draws, 8)
        tokens = (z + sampling.gumbel_f32(sampling.uniform_of_word(words))).argmax(axis=1)
        seen = np.bincount(tokens, minlength=8)
        assert ((seen - draws * p) ** 2 / (draws * p)).sum() < 24.3
        rows = [{"seed": seed, "position": i} for i in range(300)]
        logits = np.repeat(z[None] + 3, 300, axis=0)
        assert run(logits, rows).tokens.tolist() == tokens[:300].tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_reach_the_far_tail(name: str) -> None:
    # Half the mass sits in 2^16 tokens of probability 2^-17 each.
    vocab = 1 + (1 << 16)
    z = np.full(vocab, -math.log(1 << 16), np.float32)
    z[0] = 0.0
    draws = count(reduced=150, full=2000)
    rows = [{"seed": 5, "position": i} for i in range(draws)]
    logits: dict[str, Logits] = {  # one row's memory for all of them
        "reference": ReferenceLogits(torch.from_numpy(z).expand(draws, vocab)),
        "cpu": CpuLogits(np.broadcast_to(z, (draws, vocab))),
    }
    tokens = SAMPLERS[name](vocab).run(logits[name], inputs(rows, vocab)).tokens
    tail = np.count_nonzero(tokens)
    assert abs(tail - draws / 2) < 4 * (draws / 4) ** 0.5
    assert len(set(tokens[tokens > 0].tolist())) > 0.99 * tail


def test_seed_sample_and_position_all_matter() -> None:
    x = np.zeros((1, 5000), np.float32)
    keys = list(itertools.product((0, 1, 2**32, 2**64 - 1), (0, 1, 2), (0, 1, 2)))
    rows = [{"seed": s, "sample_index": n, "position": p} for s, n, p in keys]
    tokens = run(np.repeat(x, len(rows), axis=0), rows).tokens.tolist()
    assert len(set(tokens)) >= len(rows) - 2  # birthday: 36 of 5000
    assert run(np.repeat(x, len(rows), axis=0), rows).tokens.tolist() == tokens


def test_xtc_acts_as_often_as_asked() -> None:
    x = np.log(np.array([[0.6, 0.4]], np.float32))
    draws = count(reduced=1000, full=10_000)
    rows = [
        {"seed": 3, "position": i, "xtc_probability": 0.25, "xtc_threshold": 0.1}
        for i in range(draws)
    ]
    first = np.count_nonzero(run(np.repeat(x, draws, axis=0), rows).tokens == 0) / draws
    assert abs(first - 0.75 * 0.6) < 4 * (0.45 * 0.55 / draws) ** 0.5


# ---- the faces refuse what does not fit


@every_sampler
def test_mismatched_shapes_and_ids_are_refused_with_numbers(
    make: Callable[[int], Sampler],
) -> None:
    sampler = make(8)
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="2 rows of logits for sampling parameters of 3 rows"):
        sampler.run(sampler.from_numpy(x), inputs([{}] * 3, 8))
    with pytest.raises(ValueError, match=r"\[2, 7\].*\[R, 8\]"):
        sampler.run(sampler.from_numpy(x[:, :7]), inputs([{}] * 2, 8))
    for bad in ({"bias": {8: 1.0}}, {"ban": [-1]}, {"history": {9: 1}}, {"target": 8}):
        with pytest.raises(ValueError, match=r"token ids are 0\.\.7"):
            sampler.run(sampler.from_numpy(x), inputs([{}, bad], 8))
    short = dataclasses.replace(inputs([{}] * 2, 8), mask_table=np.zeros((1, 0), np.uint32))
    with pytest.raises(ValueError, match="8 tokens need 1"):
        sampler.run(sampler.from_numpy(x), short)
    good = inputs([{"history": {1: 1, 2: 1}}, {"allowed": [1]}], 8)
    for bad_start in ([0, 3, 2], [-1, 0, 2], [0, 2, 3]):
        start = np.array(bad_start, np.int32)
        with pytest.raises(ValueError, match="history_start does not ascend within 0..2"):
            sampler.run(sampler.from_numpy(x), dataclasses.replace(good, history_start=start))
    for bad_row in (-1, 2):
        mask_row = np.array([0, bad_row], np.int32)
        with pytest.raises(ValueError, match=r"mask_row spans .*; mask_table has 2 rows"):
            sampler.run(sampler.from_numpy(x), dataclasses.replace(good, mask_row=mask_row))
    for vocab in (0, sampling.MAX_VOCAB + 1):
        with pytest.raises(ValueError, match="1 to 4194304"):
            make(vocab)


def test_logits_of_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        ReferenceLogits(torch.zeros(2, 8, dtype=torch.float64))
    for bad in (np.zeros((2, 8)), np.zeros(8, np.float32)):
        with pytest.raises(ValueError, match="float32"):
            CpuLogits(bad)


@every_sampler
def test_rows_at_the_next_position_are_those_made_anew(make: Callable[[int], Sampler]) -> None:
    """Whatever a sampler keeps of the rows before; and a bad array among known ones is seen."""
    x = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    sampler, asked = make(64), {"temperature": 1.0, "seed": 5, "num_logprobs": 2}
    rows = inputs([asked, {**asked, "bias": {3: 2.0}}], 64)
    kept = [sampler.run(sampler.from_numpy(x), rows.at(np.full(2, p, np.uint32))) for p in range(6)]
    for position, result in enumerate(kept):
        anew = inputs([{**asked, "position": position}] * 2, 64)
        anew = dataclasses.replace(
            anew, bias_start=rows.bias_start, bias_ids=rows.bias_ids, bias_values=rows.bias_values
        )
        fresh = make(64)
        expected = fresh.run(fresh.from_numpy(x), anew)
        assert [row_bytes(result, r) for r in (0, 1)] == [row_bytes(expected, r) for r in (0, 1)]
    bad = dataclasses.replace(rows, bias_ids=np.array([64], np.int32))
    with pytest.raises(ValueError, match=r"token ids are 0\.\.63"):
        sampler.run(sampler.from_numpy(x), bad)
    with pytest.raises(ValueError, match="1 rows of logits"):
        sampler.run(sampler.from_numpy(x[:1]), rows)


@every_sampler
def test_no_rows_give_no_answers(make: Callable[[int], Sampler]) -> None:
    sampler = make(8)
    result = sampler.run(sampler.from_numpy(np.zeros((0, 8), np.float32)), inputs([], 8))
    assert result.tokens.shape == (0,) and result.top_ids.shape == (0, 0)
    assert sampler.log_softmax(sampler.from_numpy(np.zeros((0, 8), np.float32))).shape == (0, 8)


def test_logits_come_to_the_host_as_a_copy() -> None:
    logits = ReferenceLogits(torch.zeros(1, 4))
    logits.numpy()[0, 0] = 1.0
    assert logits.tensor[0, 0] == 0
    memory = np.zeros((1, 4), np.float32)
    CpuLogits(memory).numpy()[0, 0] = 1.0
    assert memory[0, 0] == 0
    assert np.shares_memory(CpuLogits(memory).view(), memory)
