"""Sampling on the device, on Triton's interpreter: every field of every answer is the native
sampler's, bit for bit, which test_cpu_sampler.py holds to kernels/sampling.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engineroom.kernels import sampling
from engineroom.kernels.backend import SampleResult, SamplingInputs
from engineroom.kernels.cpu.sampler import CpuLogits, CpuSampler
from tests.counts import FULL, count
from tests.kernels.sampling_rows import inputs
from tests.kernels.test_cpu_sampler import _KINDS, bits, logits, parameters
from tests.kernels.triton_device import TritonBackend, torch

from engineroom.kernels.triton.executor import TritonLogits  # isort: skip

KINDS = sorted(_KINDS)
SIZES = (1, 511, 512, 513, 2048, 2049)  # a chunk holds 2048


def on_device(x: np.ndarray, rows: SamplingInputs) -> SampleResult:
    sampler = TritonBackend(threads=1).sampler(x.shape[1])
    with np.errstate(all="ignore"):
        return sampler.run(TritonLogits(torch.from_numpy(x)), rows)


def on_host(x: np.ndarray, rows: SamplingInputs) -> SampleResult:
    return CpuSampler(x.shape[1], 1).run(CpuLogits(x), rows)


def mixed(
    rng: np.random.Generator, size: int, rows: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    x = np.stack([logits(rng, size, rng.choice(KINDS)) for _ in range(rows)])
    chosen: list[dict[str, Any]] = [parameters(rng, size) for _ in range(rows)]
    for row in chosen:
        row["num_logprobs"] = min(row["num_logprobs"], 20)
    return x, chosen


@pytest.mark.parametrize("size", SIZES)
def test_every_field_equals_the_native_samplers(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(count(reduced=1, full=60)):
        x, chosen = mixed(rng, size, int(rng.integers(1, 5)))
        rows = inputs(chosen, size)
        assert bits(on_device(x, rows)) == bits(on_host(x, rows)), chosen


FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "none": {},
    "top_k": {"top_k": 7},
    "top_k of most": {"top_k": 1200},
    "top_k beyond all": {"top_k": 2**31 - 1},
    "top_p": {"top_p": 0.6},
    "top_p of nothing": {"top_p": 0.0},
    "top_p of nearly all": {"top_p": 0.9999999},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.3},
    "typical_p of nothing": {"typical_p": 0.0},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "xtc": {"xtc_probability": 0.7, "xtc_threshold": 0.001},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "history": {i: i % 3 for i in range(0, 1300, 2)},
    },
    "bias, bans and mask": {
        "bias": {3: 6.5, 9: -100.0, 1290: 2.125},
        "ban": [1, 2, 2, 1291],
        "allowed": range(0, 1300, 3),
    },
    "all at once": {
        "temperature": 0.7,
        "top_n_sigma": 3.0,
        "top_k": 200,
        "typical_p": 0.95,
        "top_p": 0.9,
        "min_p": 0.001,
        "xtc_probability": 0.9,
        "xtc_threshold": 0.01,
        "repetition_penalty": 1.1,
        "history": {i: i % 4 for i in range(0, 1300, 97)},
    },
    "nothing left": {"ban": range(1300)},
    "target": {"target": 17},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("grid", [6, 2.0**20] if FULL else [6])
def test_each_filter_alone(name: str, grid: float) -> None:
    """Over a coarse grid, full of ties, and a fine one."""
    rng = np.random.default_rng(len(name))
    x = np.round(rng.normal(size=(2, 1300)) * 2.5 * grid) / grid
    x = x.astype(np.float32)
    keys = [{"seed": 9, "position": i, "num_logprobs": 3 * i} for i in range(2)]
    rows = inputs([FILTERS[name] | key for key in keys], 1300)
    assert bits(on_device(x, rows)) == bits(on_host(x, rows))


@pytest.mark.parametrize("seed", range(count(reduced=1, full=12)))
def test_borders_among_equal_tokens_are_exact(seed: int) -> None:
    """The token that wins where it is kept is the last one kept, or the first one dropped."""
    noise = sampling.gumbel_f32(sampling.uniforms(seed, 0, 0, sampling.STREAM_GUMBEL, 256))
    winner = int(noise.argmax())
    assert winner > 0, "a filter of no tokens is off"
    kept = {True: winner + 1, False: winner}
    filters: list[dict[str, Any]] = [{"top_k": n} for n in kept.values()]
    for name in ("top_p", "typical_p"):
        filters += [{name: n / 256} for n in kept.values()]
    rows = inputs([{"seed": seed, **one} for one in filters], 256)
    tokens = on_device(np.zeros((len(filters), 256), np.float32), rows).tokens
    assert (tokens == winner).tolist() == [True, False] * 3


def test_a_real_vocabulary() -> None:
    rng = np.random.default_rng(5)
    plain: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 50, "top_p": 0.95}]
    plain += [{"temperature": 0.8}, {"top_p": 0.99, "min_p": 1e-4}, {"num_logprobs": 5}][
        : count(reduced=0, full=3)
    ]
    rows = inputs([row | {"seed": 2**63 + i} for i, row in enumerate(plain)], 49152)
    x = (rng.normal(size=(len(plain), 49152)) * 3).astype(np.float32)
    assert bits(on_device(x, rows)) == bits(on_host(x, rows))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    x, chosen = mixed(rng, 700, 9)
    for row in chosen:
        row["num_logprobs"] = 2  # one width: a longer list beside a row pads its own
    expected = bits(on_device(x, inputs(chosen, 700)))
    for size in range(1, 10, count(reduced=7, full=1)):
        order = rng.permutation(9)[:size]
        got = bits(on_device(x[order], inputs([chosen[r] for r in order], 700)))
        for name, values in expected.items():
            assert got[name] == [values[r] for r in order], name


def test_an_answer_can_be_read_after_the_next_launch() -> None:
    sampler = TritonBackend(threads=1).sampler(300)
    x = np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)
    kinds = ({"temperature": 0.0, "num_logprobs": 2}, {"seed": 4}, {"top_k": 5, "seed": 4})
    steps = [inputs([kind] * 3, 300) for kind in kinds]
    pending = []
    for rows in steps:
        pending.append(sampler.launch(TritonLogits(torch.from_numpy(x)), rows))
        assert pending[-1].tokens.tolist() == on_host(x, rows).tokens.tolist()
    for launched, rows in zip(pending, steps, strict=True):
        assert bits(launched.result()) == bits(on_host(x, rows))


def test_logits_of_a_processor_are_sampled_on_the_host() -> None:
    sampler = TritonBackend(threads=1).sampler(300)
    x = np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)
    rows = inputs([{"seed": 1, "num_logprobs": 1}] * 3, 300)
    launched = sampler.launch(sampler.from_numpy(x), rows)
    assert bits(launched.result()) == bits(on_host(x, rows))
    assert launched.tokens.tolist() == on_host(x, rows).tokens.tolist()


@pytest.mark.parametrize("size", [1, 513, 2049])
def test_log_softmax(size: int) -> None:
    rng = np.random.default_rng(size)
    x = np.stack([logits(rng, size, kind) for kind in KINDS[:4]])
    x[1, 0], x[2] = np.nan, -np.inf
    sampler = TritonBackend(threads=1).sampler(size)
    with np.errstate(all="ignore"):
        got = sampler.log_softmax(TritonLogits(torch.from_numpy(x)))
    assert np.isnan(got[1:3]).all()
    assert got.tobytes() == CpuSampler(size, 1).log_softmax(CpuLogits(x)).tobytes()


def test_no_rows_and_what_does_not_fit() -> None:
    sampler = TritonBackend(threads=1).sampler(8)
    none = sampler.run(TritonLogits(torch.zeros(0, 8)), inputs([], 8))
    assert none.tokens.shape == (0,) and none.top_ids.shape == (0, 0)
    assert sampler.log_softmax(TritonLogits(torch.zeros(0, 8))).shape == (0, 8)
    with pytest.raises(ValueError, match=r"\[2, 7\].*\[R, 8\]"):
        sampler.run(TritonLogits(torch.zeros(2, 7)), inputs([{}] * 2, 8))
    with pytest.raises(ValueError, match="2 rows of logits for sampling parameters of 3 rows"):
        sampler.run(TritonLogits(torch.zeros(2, 8)), inputs([{}] * 3, 8))
    with pytest.raises(ValueError, match=r"token ids are 0\.\.7"):
        sampler.run(TritonLogits(torch.zeros(1, 8)), inputs([{"ban": [8]}], 8))
