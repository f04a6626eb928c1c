"""Making GGUF blocks: what the gguf package reads of them, their errors, and importance."""

from __future__ import annotations

import numpy as np
import pytest

from engineroom.kernels.weights import Q4_0, Q4_K, Q6_K, Q8_0, Format, RawWeight
from engineroom.quant import ggml_rounding
from engineroom.quant.ggml_rounding import quantise_ggml
from engineroom.quant.gguf import dequantise

FORMATS = [Q8_0, Q4_0, Q4_K, Q6_K]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=[f.name for f in FORMATS])
# Of normal values, the error's root mean square: what so many levels leave, and a tenth.
NORMAL = {"Q8_0": 0.0060, "Q4_0": 0.090, "Q4_K": 0.079, "Q6_K": 0.020}


def read(data: bytes, fmt: Format, shape: tuple[int, int]) -> np.ndarray:
    return dequantise(RawWeight("w", fmt, shape, {"data": np.frombuffer(data, np.uint8)}))


@formats
def test_normal_values(fmt: Format) -> None:
    w = np.random.default_rng(1).standard_normal((16, 512)).astype(np.float32)
    made = read(quantise_ggml(w, fmt), fmt, w.shape)
    assert np.sqrt(np.square(made - w).mean()) < NORMAL[fmt.name]


@formats
def test_the_gguf_package_reads_the_same_values(fmt: Format) -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle is the gguf package, which is absent")
    w = np.random.default_rng(2).standard_normal((8, 512)).astype(np.float32)
    data = quantise_ggml(w, fmt)
    rows = np.frombuffer(data, np.uint8).reshape(8, -1)
    theirs = gguf.dequantize(rows, gguf.GGMLQuantizationType[fmt.name])
    np.testing.assert_array_equal(read(data, fmt, w.shape), theirs)
    if fmt in (Q8_0, Q4_0):  # those that it can make
        made = gguf.quantize(w, gguf.GGMLQuantizationType[fmt.name])
        other = gguf.dequantize(made, gguf.GGMLQuantizationType[fmt.name])
        wrong = [np.square(v - w).sum() for v in (theirs, other)]
        assert wrong[0] <= wrong[1] * 1.001


@formats
def test_hostile_rows_stay_finite_and_zeros_zeros(fmt: Format) -> None:
    w = np.random.default_rng(3).standard_normal((7, 512)).astype(np.float32)
    w[0], w[1], w[2, 300] = 0, 2.5, 10_000
    w[3], w[4] = np.abs(w[3]) + 1, -np.abs(w[4]) - 1
    w[5] *= 1e-20
    w[6, 256:] = 0
    made = read(quantise_ggml(w, fmt), fmt, w.shape)
    assert np.isfinite(made).all()
    assert not made[0].any() and not made[6, 256:].any()
    np.testing.assert_allclose(made[1], 2.5, rtol=0.02)


@formats
def test_what_cannot_be_made_is_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match="is not a whole number of them"):
        quantise_ggml(np.zeros((1, 16), np.float32), fmt)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantise_ggml(np.full((1, 512), np.nan, np.float32), fmt)


@pytest.mark.parametrize("fmt", [Q4_0, Q4_K, Q6_K], ids=["Q4_0", "Q4_K", "Q6_K"])
def test_importance_lowers_the_error_where_it_counts(fmt: Format) -> None:
    rng = np.random.default_rng(4)
    w = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.where(rng.random(512) < 0.1, 100.0, 1.0)
    wrong = [
        (np.square(read(quantise_ggml(w, fmt, i), fmt, w.shape) - w) * importance).sum()
        for i in (None, importance)
    ]
    assert wrong[1] < 0.85 * wrong[0]


@formats
def test_importance_that_is_all_zero_or_huge_is_only_relative(fmt: Format) -> None:
    w = np.random.default_rng(7).standard_normal((4, 512)).astype(np.float32)
    plain = quantise_ggml(w, fmt)
    assert quantise_ggml(w, fmt, np.zeros(512)) == plain
    size = np.random.default_rng(8).uniform(1, 3, 512)
    once = read(quantise_ggml(w, fmt, size), fmt, w.shape)
    assert np.sqrt(np.square(once - w).mean()) < NORMAL[fmt.name]
    np.testing.assert_array_equal(read(quantise_ggml(w, fmt, size * 2.0**60), fmt, w.shape), once)


@pytest.mark.parametrize("fmt", [Q4_0, Q4_K, Q6_K], ids=["Q4_0", "Q4_K", "Q6_K"])
def test_turns_of_floats_and_integers_lower_the_weighted_error(
    fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 1 % and more, of columns that count unequally; of Q4_0, without such integers, by less."""
    rng = np.random.default_rng(6)
    w = (rng.standard_t(5, (64, 1024)) * 0.02).astype(np.float32)
    importance = np.exp(rng.normal(0, 1, 1024))

    def error() -> float:
        made = read(quantise_ggml(w, fmt, importance), fmt, w.shape)
        return float((np.square(made - w) * importance).sum())

    fitted = error()
    monkeypatch.setattr(ggml_rounding, "_TURNS", 0)
    assert fitted < (0.9995 if fmt is Q4_0 else 0.99) * error()
