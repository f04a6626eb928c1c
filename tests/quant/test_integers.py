"""INT8 and INT4: bounds that follow from how they are chosen, and native bytes equal to numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import F32, FORMATS, INT4, INT8, RawWeight
from engineroom.quant.integers import quantise_int4, quantise_int8
from engineroom.quant.values import dequantise, row_dtype
from tests.counts import count

QUANTISERS = {"INT8": quantise_int8, "INT4": quantise_int4}
names = pytest.mark.parametrize("name", QUANTISERS)


def hostile(columns: int, seed: int = 0) -> np.ndarray:
    """Rows that break careless quantisers: zeros, constants, an outlier, one sign, a wide range."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, columns), np.float32)
    x[0] = 0
    x[1], x[2] = 0.7, -0.3
    x[3, columns // 2] = 1000
    x[4], x[5] = np.abs(x[4]), -np.abs(x[5])
    x[6, 32:] = 0
    x[7] = 0
    x[7, 5] = 1
    x[8] *= np.logspace(-12, 0, columns, dtype=np.float32)
    x[9] = np.where(np.arange(columns) % 2, 1, -1)
    x[10] = 5 + x[10] / 1000
    x[11] = -5 + x[11] / 1000
    x[12] *= np.float32(1e-30)
    x[13] *= np.float32(1e30)
    x[14] *= np.float32(1e-40)  # subnormal
    x[15] = np.float32(1e-45)
    x[16] = np.float32(2.0**120) * (1 - 2.0**-24)
    x[17, ::2] = -0.0
    x[18] = np.repeat(rng.standard_normal(columns // 32, np.float32), 32)
    return x


def values_of(name: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    raw = RawWeight("w", FORMATS[name], shape, {"data": np.frombuffer(data, np.uint8)})
    return dequantise(raw)


@pytest.mark.parametrize("columns", [32, 64, 96, 576])
def test_int8_is_off_by_half_a_step(columns: int) -> None:
    """Beyond it: three roundings (of x / d, d q, d) of numbers up to 127 steps."""
    x = hostile(columns)
    data = quantise_int8(x)
    d = np.frombuffer(data, row_dtype(INT8, columns))["d"].astype(np.float64)
    error = np.abs(values_of("INT8", data, x.shape) - x.astype(np.float64))
    tiny = np.abs(x).max(axis=1, keepdims=True) < 127 * 2.0**-126
    assert (error <= np.where(tiny, 127 * 2.0**-126, d * (0.5 + 3 * 127 * 2.0**-24))).all()
    assert (d[~tiny] > 0).all() and (d[tiny] == 0).all()


@pytest.mark.parametrize("columns", [32, 64, 96, 576])
def test_int4_errs_no_more_than_an_even_grid(columns: int) -> None:
    """The search keeps the best of grids of which one is even: 15 steps over the group's range.

    There every value is off by at most half a step, span / 30, and so is the weighted root mean
    square of the best. Rounding scale and minimum to bytes moves a value by at most 15 d / 2 and
    dmin / 2 more, before it takes its nearest level. The search's own sums are float32: errors are
    told apart only down to 1e-5 of the squares.
    """
    x = hostile(columns)
    data = quantise_int4(x)
    rows = np.frombuffer(data, row_dtype(INT4, columns))
    d, dmin = (rows[f].astype(np.float64) for f in ("d", "dmin"))
    exact = x.astype(np.float64)
    error = (values_of("INT4", data, x.shape) - exact).reshape(len(x), -1, 32)
    groups = exact.reshape(len(x), -1, 32)
    root = np.sqrt((groups**2).mean(axis=2, keepdims=True))
    weight = root + np.abs(groups) + 1e-300
    total = weight.sum(axis=2)
    off = np.sqrt((weight * error**2).sum(axis=2) / total)
    span = groups.max(axis=2) - np.minimum(groups.min(axis=2), 0)
    noise = np.sqrt(1e-5 * (weight * groups**2).sum(axis=2) / total)
    subnormal = 16 * 255 * 2.0**-149  # what rounding d and dmin to subnormals costs
    assert (off <= span / 30 + noise + 7.5 * d + 0.5 * dmin + subnormal).all()
    assert (values_of("INT4", data, x.shape)[0] == 0).all()


def test_int4_finds_a_grid_that_is_there() -> None:
    """Values of 14 steps: the search tries that many, an even grid of 15 would miss them."""
    u = np.random.default_rng(5).integers(0, 15, (6, 96))
    u[:, ::32], u[:, 1::32] = 0, 14
    x = (0.02 * u - 0.15).astype(np.float32)
    error = np.abs(values_of("INT4", quantise_int4(x), x.shape) - x)
    assert error.max() < 0.001  # of an even grid 0.009


@names
def test_native_bytes_equal_numpys(name: str) -> None:
    for seed in range(count(reduced=2, full=40)):
        for columns in (32, 96, 288, 1056):
            x = hostile(columns, seed)
            want = np.frombuffer(QUANTISERS[name](x), np.uint8)
            for threads in (1, 3):
                got = np.full(want.size, 0xAA, np.uint8)
                data = x.reshape(-1).view(np.uint8)
                assert _native.quantise("F32", data, len(x), columns, name, got, threads) == -1
                np.testing.assert_array_equal(got, want)


@names
@pytest.mark.parametrize("source", ["F16", "BF16", "Q8_0", "Q5_K", "INT8"])
def test_native_quantises_any_format(name: str, source: str) -> None:
    """By its values: what a row of any format means, quantised."""
    fmt, shape = FORMATS[source], (50, 256)
    values = np.random.default_rng(2).standard_normal(shape, np.float32)
    if source == "INT8":
        data = np.frombuffer(quantise_int8(values), np.uint8)
    elif fmt.is_float:
        bits = values.astype(np.float16) if source == "F16" else values.view(np.uint32) >> 16
        data = bits.astype(bits.dtype if source == "F16" else np.uint16).reshape(-1).view(np.uint8)
    else:
        data = np.random.default_rng(2).integers(0, 60, 50 * fmt.row_bytes(256), np.uint8)
    raw = RawWeight("w", fmt, shape, {"data": data})
    want = np.frombuffer(QUANTISERS[name](dequantise(raw)), np.uint8)
    got = np.empty(want.size, np.uint8)
    assert _native.quantise(source, data, *shape, name, got, 2) == -1
    np.testing.assert_array_equal(got, want)


@names
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**120, -(2.0**121)])
def test_what_is_not_finite_is_refused_with_its_row(name: str, value: float) -> None:
    x = np.ones((40, 64), np.float32)
    x[30, 63] = value
    with pytest.raises(ValueError, match="row 30 holds a NaN, an infinity or 2\\^120"):
        QUANTISERS[name](x)
    x[37, 0] = value
    out = np.empty(40 * FORMATS[name].row_bytes(64), np.uint8)
    for threads in (1, 2, 3):
        found = _native.quantise("F32", x.reshape(-1).view(np.uint8), 40, 64, name, out, threads)
        assert found == 30


def test_refusals() -> None:
    for quantise in QUANTISERS.values():
        with pytest.raises(ValueError, match=r"whole groups of 32.*shape \[2, 33\]"):
            quantise(np.zeros((2, 33), np.float32))
    data, out = np.zeros(4 * 64, np.uint8), np.zeros(2 * INT8.row_bytes(32), np.uint8)

    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(ValueError, match=message):
            _native.quantise(*arguments)  # type: ignore[arg-type]

    refused("unknown format 'Q9'", "Q9", data, 2, 32, "INT8", out, 1)
    refused(
        "nothing quantises to Q8_0; known: INT8, INT4, FP8, NF4", "F32", data, 2, 32, "Q8_0", out, 1
    )
    refused(r"F32 of shape \[3, 32\] takes 384 bytes", "F32", data, 3, 32, "INT8", out, 1)
    refused("INT8 of shape .* takes 72 bytes, .* has 71", "F32", data, 2, 32, "INT8", out[1:], 1)
    refused("blocks of 32", "F32", data, 4, 16, "INT8", out, 1)
    refused("must be at least 1", "F32", data, 2, 32, "INT8", out, 0)


def test_a_row_is_its_header_and_its_blocks() -> None:
    assert (INT8.row_bytes(64), INT4.row_bytes(64)) == (4 + 64, 8 + 2 * 18)
    rows = np.arange(3 * INT4.row_bytes(64), dtype=np.uint8)
    raw = RawWeight("w", INT4, (3, 64), {"data": rows})
    part = raw.rows(1, 3)
    assert (raw.nbytes, part.nbytes, part.shape) == (132, 88, (2, 64))
    np.testing.assert_array_equal(dequantise(part), dequantise(raw)[1:])
    marked = RawWeight("w", F32, (3, 64), {"data": np.zeros(768, np.uint8)}, INT4)
    assert (marked.packed_nbytes, marked.rows(0, 2).packed_nbytes) == (132, 88)
    assert marked.rows(0, 2).packed_format is INT4 and raw.packed_format is INT4
