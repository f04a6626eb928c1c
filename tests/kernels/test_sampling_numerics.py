"""The sampling program's arithmetic: test vectors, error bounds, exact sums, order-free results."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.kernels import sampling
from engineroom.kernels import sampling_vectors as vectors
from tests.counts import count

CASES = count(reduced=100, full=2000)


def floats(bits: list[int]) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)


def bits(values: np.ndarray) -> list[int]:
    return np.asarray(values, dtype=np.float32).view(np.uint32).tolist()


def worst_ulp(got: np.ndarray, exact: np.ndarray) -> float:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(got.astype(np.float64) - exact) / spacing).max())


@pytest.mark.parametrize(
    ("function", "table"),
    [
        (sampling.exp_f32, vectors.EXP),
        (sampling.log_f32, vectors.LOG),
        (sampling.exponential_f32, vectors.EXPONENTIAL),
        (sampling.gumbel_f32, vectors.GUMBEL),
    ],
)
def test_functions_give_their_vectors(
    function: Callable[[np.ndarray], np.ndarray], table: tuple[tuple[int, int], ...]
) -> None:
    got = bits(function(floats([x for x, _ in table])))
    assert [hex(b) for b in got] == [hex(y) for _, y in table]


def test_exp_error_and_edges() -> None:
    lowest, highest = np.float32(2.0**-30).view(np.int32), np.float32(87.0).view(np.int32)
    x = -np.arange(lowest, highest + 1, count(reduced=499, full=17)).astype(np.int32).view("f4")
    assert worst_ulp(sampling.exp_f32(x), np.exp(x.astype(np.float64))) < 0.98
    edges = np.array([0.0, -0.0, -87.0, np.nextafter(np.float32(-87), -np.inf), -np.inf], "f4")
    got = sampling.exp_f32(edges)
    assert got[0] == got[1] == 1.0
    assert got[2] > np.finfo(np.float32).tiny  # normal: flushing subnormals changes nothing
    assert got[3] == got[4] == 0.0


def test_log_error() -> None:
    step = count(reduced=499, full=17)
    for exponent in range(-33, 63):
        mantissa = np.arange(0, 1 << 23, 1 if exponent in (-1, 0) and step == 17 else step)
        x = (mantissa + ((127 + exponent) << 23)).astype(np.int32).view(np.float32)
        assert worst_ulp(sampling.log_f32(x), np.log(x.astype(np.float64))) < 0.86, exponent
    assert sampling.log_f32(np.ones(1, np.float32))[0] == 0.0


def test_noise_error_and_range() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 32, count(reduced=200_000, full=4_000_000), dtype=np.uint64)
    words = words.astype(np.uint32)
    for tail in (words, words >> 8, words >> 16, words >> 24, ~(words >> 8), ~(words >> 16)):
        u = sampling.uniform_of_word(tail)
        exact = -np.log1p(-u.astype(np.float64))
        got = sampling.exponential_f32(u)
        assert worst_ulp(got, exact) < 2.4
        assert got.min() > 0
        noise = sampling.gumbel_f32(u)
        assert np.abs(noise + np.log(exact)).max() < 1.1e-6
    ends = sampling.gumbel_f32(floats([0x2F000000, 0x3F7FFFFF]))  # 2^-33 and 1 - 2^-24
    assert ends[1] > -2.82 and ends[0] < 22.88


def test_uniforms_are_inside_the_open_interval() -> None:
    got = sampling.uniform_of_word(np.array([w for w, _ in vectors.UNIFORM_OF_WORD], np.uint32))
    assert [hex(b) for b in bits(got)] == [hex(b) for _, b in vectors.UNIFORM_OF_WORD]
    assert got.min() > 0 and got.max() < 1
    assert np.all(np.diff(got) >= 0)  # the vectors ascend


@given(st.integers(0, 2**63 - 1), st.floats(0, 1, width=32))
@settings(max_examples=CASES, deadline=None)
def test_share_is_the_exact_ceiling_and_fits_int64(total: int, p: float) -> None:
    steps = round(Fraction(p) * 2**24)  # ties to even, as rint
    assert sampling.share(total, np.float32(p)) == math.ceil(Fraction(total) * steps / 2**24)
    in_int64 = (np.int64(total) >> 24) * np.int64(steps)
    in_int64 += ((np.int64(total) & 0xFFFFFF) * np.int64(steps) + 0xFFFFFF) >> 24
    assert int(in_int64) == sampling.share(total, np.float32(p)) <= total


def test_weights_are_bounded_so_that_sums_are_exact() -> None:
    w = sampling.weights(np.array([0, -1e-7, -1, -28.3, -28.5, -1e9, -np.inf], np.float32))
    assert w[0] == sampling.WEIGHT_ONE == w.max()
    assert w[3] == 1 and w[4:].tolist() == [0, 0, 0]
    assert sampling.MAX_VOCAB * sampling.WEIGHT_ONE < 2**63
    # The second moment of top-n-sigma and the entropy's numerator, at their largest.
    assert sampling.MAX_VOCAB * (1 << 2 * sampling.SIGMA_BITS) < 2**63
    assert sampling.WEIGHT_ONE * math.exp(-1) * sampling.MAX_VOCAB < 2**63


@given(st.integers(0, 2**32), st.integers(1, 300))
@settings(max_examples=CASES, deadline=None)
def test_sums_do_not_depend_on_order(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=size) * rng.choice([0.1, 3, 30])).astype(np.float32)
    z -= z.max()
    order = rng.permutation(size)
    assert sampling.sigma(z[order]).tobytes() == sampling.sigma(z).tobytes()
    here, there = (sampling.log_sum(sampling.weights(v)) for v in (z, z[order]))
    assert here.tobytes() == there.tobytes()


@pytest.mark.parametrize("size", [1, 2, 1000, 262144])
@pytest.mark.parametrize("spread", [1e-35, 1e-3, 3.0, 1e6, 1e37])
def test_sigma_against_float64(size: int, spread: float) -> None:
    rng = np.random.default_rng(size)
    d = (rng.normal(size=size) * spread).astype(np.float32)
    d -= d.max()
    assert float(sampling.sigma(d)) == pytest.approx(d.astype(np.float64).std(), rel=1e-5)
    assert sampling.sigma(np.zeros(size, np.float32)) == 0


def test_log_sum_exp_against_float64() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 2, 1000, 262144):
        for spread in (0.0, 1.0, 8.0, 1000.0):
            z = (rng.normal(size=size) * spread).astype(np.float32)
            z -= z.max()
            exact = math.log(math.fsum(np.exp(z.astype(np.float64)).tolist()))
            assert abs(float(sampling.log_sum(sampling.weights(z))) - exact) < 1e-6
