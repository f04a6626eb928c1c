"""The native sampler against kernels/sampling.py: every field of every answer, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.kernels import sampling
from engineroom.kernels.backend import SampleResult, SamplingInputs
from engineroom.kernels.cpu.sampler import CpuLogits, CpuSampler
from tests.counts import count
from tests.kernels.sampling_rows import inputs

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
        "top_k": lambda: {"top_k": int(rng.choice([1, 2, 50, rng.integers(1, vocab + 3), 2**31 - 1]))},
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
@settings(max_examples=count(reduced=400, full=20_000), deadline=None)
def test_every_field_equals_the_specification(
    seed: int, size: int, kind: str, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 6))
    x = np.stack([logits(rng, size, kind) for _ in range(num_rows)])
    rows = inputs([parameters(rng, size) for _ in range(num_rows)], size)
    assert bits(native(x, rows, threads)) == bits(specified(x, rows))
