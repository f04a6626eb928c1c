"""The native sampler against kernels/sampling.py: every field of every answer, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engineroom.kernels import sampling
from engineroom.kernels.backend import SampleResult, SamplingInputs
from engineroom.kernels.cpu.sampler import CpuLogits, CpuSampler
from tests.counts import count
from tests.kernels.sampling_rows import inputs

pytestmark = pytest.mark.cores

SIZES = (1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 1023, 1025, 3000)


# ---- the specification applied to whole batches, without any backend's help


def specified(x: np.ndarray, rows: SamplingInputs) -> SampleResult:
    count, width = len(x), max(0, int(rows.num_logprobs.max(initial=0)))
    result = SampleResult(
        tokens=np.full(count, sampling.FAILED, np.int32),
        logprobs=np.full(count, np.nan, np.float32),
        ranks=np.zeros(count, np.int32),
        top_ids=np.full((count, width), -1, np.int32),
        top_logprobs=np.full((count, width), np.nan, np.float32),
    )
    with np.errstate(all="ignore"):
        for r in range(count):
            highest = x[r, x[r].argmax()]
            if np.isfinite(highest):
                _specified_row(x[r], highest, rows, r, result)
    return result


def _specified_row(
    x: np.ndarray, highest: np.float32, rows: SamplingInputs, r: int, result: SampleResult
) -> None:
    def draw(stream: int, count: int) -> np.ndarray:
        key = int(rows.seed[r]), int(rows.sample_index[r]), int(rows.position[r])
        return sampling.uniforms(*key, stream, count)

    token = int(rows.target[r])
    if token < 0:
        row = sampling.Row.of(rows, r)
        token = sampling.choose(sampling.adjust(x, row), row, draw)
    result.tokens[r] = token
    wanted = int(rows.num_logprobs[r])
    if wanted < 0:
        return
    logprobs = sampling.log_softmax_row(x, highest)
    if token != sampling.FAILED:
        result.logprobs[r] = logprobs[token]
        result.ranks[r] = 1 + np.count_nonzero(x > x[token])
    top = np.argsort(-x, kind="stable")[:wanted]
    result.top_ids[r, : len(top)] = top
    result.top_logprobs[r, : len(top)] = logprobs[top]


def bits(result: SampleResult) -> dict[str, list[Any]]:
    return {
        field.name: getattr(result, field.name).view(np.uint32).tolist()
        for field in dataclasses.fields(result)
    }


def native(x: np.ndarray, rows: SamplingInputs, threads: int = 1) -> SampleResult:
    return CpuSampler(x.shape[1], threads).run(CpuLogits(x), rows)


# ---- rows

_KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n) * rng.choice([0.5, 3, 10]),
    "coarse": lambda rng, n: rng.integers(-6, 7, n) * 0.5,
    "equal": lambda rng, n: np.full(n, rng.normal()),
    "zeros of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "two": lambda rng, n: rng.integers(0, 2, n) * rng.choice([1.0, 4.0, 24.0]),
    "huge": lambda rng, n: rng.normal(size=n) * 1e4,
    "largest": lambda rng, n: np.clip(rng.normal(size=n) * 2e38, -3.4e38, 3.4e38),
    "subnormal": lambda rng, n: rng.integers(-9, 10, n) * 2.0**-149,
    "peaked": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 15.0, rng.normal(size=n)),
    "far tail": lambda rng, n: -np.abs(rng.normal(size=n)) * 15,
}


def logits(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    with np.errstate(under="ignore"):
        x = _KINDS[kind](rng, size).astype(np.float32)
    if rng.random() < 0.3:
        x[rng.random(size) < rng.choice([0.1, 0.9])] = -np.inf
    if rng.random() < 0.1:
        x[rng.integers(size)] = rng.choice([np.nan, -np.nan, np.inf])
    if rng.random() < 0.03:
        x[:] = -np.inf
    return x


def parameters(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Any mixture of stages, each at ordinary and at extreme values."""

    def some(share: float) -> list[int]:
        return np.flatnonzero(rng.random(vocab) < share).tolist()

    def share() -> float:
        return float(rng.choice([0.0, 1e-9, 0.5, 0.95, 0.9999999, rng.random(), rng.random()]))

    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "top_n_sigma": lambda: {"top_n_sigma": float(rng.choice([1e-6, 0.5, 1, 3, 1e30]))},
        "top_k": lambda: {
            "top_k": int(rng.choice([1, 2, 50, int(rng.integers(1, vocab + 3)), 2**31 - 1]))
        },
        "typical_p": lambda: {"typical_p": share()},
        "top_p": lambda: {"top_p": share()},
        "min_p": lambda: {"min_p": share() ** 2},
        "xtc": lambda: {"xtc_probability": share(), "xtc_threshold": share() ** 2 / 2},
        "penalties": lambda: {
            "repetition_penalty": float(rng.choice([0.01, 1.0, 1.3, 2.0])),
            "presence_penalty": float(rng.choice([0.0, -2.0, 0.7])),
            "frequency_penalty": float(rng.choice([0.0, -1.1, 0.3])),
            "history": {t: int(rng.integers(0, 4)) for t in some(0.3)},
        },
        "bias": lambda: {"bias": {t: float(rng.normal() * 4) for t in some(0.2)}},
        "hard bias": lambda: {"bias": {t: float(rng.choice([3e38, -np.inf])) for t in some(0.1)}},
        "ban": lambda: {"ban": some(rng.choice([0.3, 1.0]))},
        "allowed": lambda: {"allowed": some(rng.choice([0.05, 0.7, 1.0]))},
        "target": lambda: {"target": int(rng.integers(vocab))},
    }
    row: dict[str, Any] = {
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "sample_index": int(rng.integers(0, 2**32)),
        "position": int(rng.integers(0, 2**32)),
        "temperature": float(rng.choice([0.0, 1e-30, 1e-5, 0.7, 1.0, 1.0, 2.5, 100.0, 1e30])),
        "num_logprobs": int(rng.choice([-1, 0, 1, 5, 20, vocab, vocab + 2])) if vocab < 3000 else 5,
    }
    chance = rng.choice([0.0, 0.15, 0.4])
    for stage in stages.values():
        if rng.random() < chance:
            row |= stage()
    return row


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SIZES),
    st.sampled_from(sorted(_KINDS)),
    st.integers(1, 3),
)
@example(536870911, 3, "far tail", 1)  # XTC keeps a score of -2e6, which fp32 rounds to eighths
@settings(max_examples=count(reduced=700, full=15_000), deadline=None)
def test_every_field_equals_the_specification(
    seed: int, size: int, kind: str, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 6))
    x = np.stack([logits(rng, size, kind) for _ in range(num_rows)])
    rows = inputs([parameters(rng, size) for _ in range(num_rows)], size)
    assert bits(native(x, rows, threads)) == bits(specified(x, rows))


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_a_real_vocabulary_equals_the_specification(kind: str) -> None:
    vocab = 49152
    rng = np.random.default_rng(len(kind))
    plain: list[dict[str, Any]] = [
        {"temperature": 0.0, "num_logprobs": 0},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        {"top_k": 20_000, "num_logprobs": 3},
        {"min_p": 1e-4},
    ]
    rows = [{**row, "seed": int(rng.integers(2**63))} for row in plain]
    rows += [parameters(rng, vocab) for _ in range(count(reduced=3, full=60))]
    x = np.stack([logits(rng, vocab, kind) for _ in rows])
    params = inputs(rows, vocab)
    assert bits(native(x, params)) == bits(specified(x, params))


@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.sampled_from(sorted(_KINDS)))
@settings(max_examples=count(reduced=60, full=2000), deadline=None)
def test_log_softmax_equals_the_specification(seed: int, size: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = np.stack([logits(rng, size, kind) for _ in range(3)])
    got = CpuSampler(size, 2).log_softmax(CpuLogits(x))
    for row, values in zip(got, x, strict=True):
        highest = values[values.argmax()]
        if np.isfinite(highest):
            with np.errstate(all="ignore"):
                expected = sampling.log_softmax_row(values, highest)
            assert row.view(np.uint32).tolist() == expected.view(np.uint32).tolist()
        else:
            assert np.isnan(row).all()


# ---- the numbers of filters where buckets and shortcuts end


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 500])
@pytest.mark.parametrize("grid", [1.0, 0.25, 2.0**-20])
def test_every_top_k_and_every_number_of_logprobs(size: int, grid: float) -> None:
    rng = np.random.default_rng(size)
    row = (rng.integers(-4, 5, size) * grid).astype(np.float32)
    wanted = range(1, size + 2, count(reduced=max(1, size // 40), full=1))
    rows = inputs([{"top_k": k, "num_logprobs": k, "seed": k} for k in wanted], size)
    x = np.repeat(row[None], len(wanted), axis=0)
    assert bits(native(x, rows)) == bits(specified(x, rows))


@pytest.mark.parametrize("filter_name", ["top_p", "typical_p", "min_p", "xtc_threshold"])
def test_shares_across_ties(filter_name: str) -> None:
    rng = np.random.default_rng(3)
    row = np.repeat(rng.permutation(25).astype(np.float32) * np.float32(0.2), 8)
    shares = np.linspace(0, 0.999, count(reduced=120, full=2500))
    chance = 1.0 if filter_name == "xtc_threshold" else 0.0
    rows = inputs(
        [
            {filter_name: float(p), "xtc_probability": chance, "seed": i}
            for i, p in enumerate(shares)
        ],
        len(row),
    )
    x = np.repeat(row[None], len(shares), axis=0)
    assert bits(native(x, rows)) == bits(specified(x, rows))


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_k": 3000}], ids=str)
def test_the_largest_noise_lifts_a_token_exactly_as_far_as_it_reaches(
    filters: dict[str, Any],
) -> None:
    """Noise is drawn only where it could decide; here it does, as far down as it ever can."""
    vocab, key = 40_000, {"seed": 7, "position": 8073}
    lifted, top = 6642, 36406  # of these draws' noise the highest, its word being 0; the lowest
    noise = sampling.gumbel_f32(sampling.uniforms(7, 0, 8073, sampling.STREAM_GUMBEL, vocab))
    assert noise[lifted] == noise.max() > 22.87 and noise[top] == noise.min()
    border = noise[top] - noise[lifted]
    steps = np.arange(-30, 31, dtype=np.float32)
    levels = np.concatenate([border + steps * np.spacing(border), border + steps * 0.05])
    x = np.full((len(levels), vocab), -40, np.float32)
    x[:, top] = 0
    x[:, lifted] = levels
    rows = inputs([{**key, **filters}] * len(levels), vocab)
    got = native(x, rows)
    assert bits(got) == bits(specified(x, rows))
    assert set(got.tokens.tolist()) == {lifted, top}


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}], ids=str)
def test_two_tokens_meet_at_the_last_bit_of_their_noise(filters: dict[str, Any]) -> None:
    """Who wins turns on single bits of exponential_f32 and log_f32, in loops and one by one."""
    vocab, draws, steps = 64, count(reduced=1500, full=40_000), np.arange(-2, 3)
    rng = np.random.default_rng(23)
    a, b = rng.integers(0, 32, draws), rng.integers(32, vocab, draws)
    every = np.arange(draws)
    u = np.stack([sampling.uniforms(31, 0, i, sampling.STREAM_GUMBEL, vocab) for i in every])
    noise = sampling.gumbel_f32(u)
    gap = noise[every, b] - noise[every, a]
    x = np.full((draws, len(steps), vocab), -np.inf, np.float32)
    x[every, :, a] = gap[:, None] + steps.astype(np.float32) * np.spacing(gap)[:, None]
    x[every, :, b] = 0
    x = x.reshape(-1, vocab)
    keys = [{"seed": 31, "position": int(i), **filters} for i in every for _ in steps]
    z = x - x.max(axis=1, keepdims=True)
    expected = (z + np.repeat(noise, len(steps), axis=0)).argmax(axis=1)
    assert native(x, inputs(keys, vocab)).tokens.tolist() == expected.tolist()
    assert 0.2 < np.mean(expected < 32) < 0.8


def test_a_share_rounds_up_to_whole_weights() -> None:
    """2^40 of 2^40 + 65537 is just short of a share of 1 - 2^-24: the second token stays."""
    vocab, lifted, top = 40_000, 6642, 36406  # as above: the second token, where kept, wins
    near = np.float32(-np.log(2.0**40 / 65537))
    candidates = near + np.arange(-40, 41, dtype=np.float32) * np.spacing(near)
    second = candidates[sampling.weights(candidates) == 65537][0]
    share = np.float32(1 - 2.0**-24)
    assert sampling.share(2**40 + 65537, share) == 2**40 + 1
    x = np.full((2, vocab), -1000, np.float32)
    x[:, top], x[:, lifted] = 0, second
    key = {"seed": 7, "position": 8073}
    rows = inputs([{**key, "top_p": share}, {**key, "top_p": np.nextafter(share, 0)}], vocab)
    assert native(x, rows).tokens.tolist() == [lifted, top]
    assert specified(x, rows).tokens.tolist() == [lifted, top]


# ---- rows, threads and memory


def _mixed(vocab: int, num_rows: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    rng = np.random.default_rng(17)
    kinds = sorted(_KINDS)
    x = np.stack([logits(rng, vocab, kinds[r % len(kinds)]) for r in range(num_rows)])
    return x, [parameters(rng, vocab) for _ in range(num_rows)]


def test_threads_and_order_of_rows_do_not_show() -> None:
    x, rows = _mixed(997, 60)
    expected = native(x, inputs(rows, 997))
    for threads in (2, 3, 7):
        sampler = CpuSampler(997, threads)
        for _ in range(count(reduced=3, full=30)):
            assert bits(sampler.run(CpuLogits(x), inputs(rows, 997))) == bits(expected)
    order = np.random.default_rng(1).permutation(60)
    shuffled = native(x[order], inputs([rows[r] for r in order], 997), threads=3)
    for name, values in bits(expected).items():
        assert bits(shuffled)[name] == [values[r] for r in order], name


def test_one_sampler_called_from_several_threads_at_once() -> None:
    x, rows = _mixed(500, 24)
    params, sampler = inputs(rows, 500), CpuSampler(500, 2)
    expected = bits(native(x, params))
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: sampler.run(CpuLogits(x), params), range(40)):
            assert bits(result) == expected


def test_logits_of_any_layout_give_the_same_bits() -> None:
    x, rows = _mixed(100, 12)
    params = inputs(rows, 100)
    expected = bits(native(x, params))
    wide = np.full((12, 300), np.nan, np.float32)
    wide[:, 50:150] = x
    raw = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(x.shape)
    unaligned[:] = x
    readonly = x.copy()
    readonly.flags.writeable = False
    layouts = {
        "slice of wider rows": wide[:, 50:150],
        "column by column": np.asfortranarray(x),
        "every other row": np.repeat(x, 2, axis=0)[::2],
        "rows backwards": x[::-1].copy()[::-1],
        "unaligned": unaligned,
        "read only": readonly,
    }
    for name, layout in layouts.items():
        assert layout.tobytes() == x.tobytes()
        assert bits(native(layout, params)) == expected, name
    one = np.repeat(x[:1], 5, axis=0)
    spread = np.broadcast_to(x[:1], (5, 100))
    five = inputs([rows[0]] * 5, 100)
    assert bits(native(spread, five)) == bits(native(one, five))


def test_parameters_need_not_be_contiguous_but_of_their_dtypes() -> None:
    x, rows = _mixed(64, 8)
    params = inputs(rows, 64)
    apart = dataclasses.replace(params, top_p=np.repeat(params.top_p, 3)[::3])
    assert bits(native(x, apart)) == bits(native(x, params))
    with pytest.raises(TypeError):
        native(x, dataclasses.replace(params, top_p=params.top_p.astype(np.float64)))
    with pytest.raises(ValueError, match="rows: 7 instead of 8"):
        native(x, dataclasses.replace(params, seed=params.seed[:7]))
    with pytest.raises(ValueError, match="history_count"):
        native(x, dataclasses.replace(params, history_count=params.history_count[:-1]))


def test_the_logits_stay_as_they_were() -> None:
    x, rows = _mixed(300, 30)
    before = x.tobytes()
    native(x, inputs(rows, 300), threads=2)
    assert x.tobytes() == before
