"""Row-wise operations of every usable CPU unit, against numpy in float64.

Tolerances are in units in the last place of the fp32 result (`ulps`): each bound is the worst that
the formula's own roundings can add up to, with the two that exp and tanh are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from engineroom.kernels.cpu import _native

pytestmark = pytest.mark.cores

UNITS = _native.kernel_tables()
OUTLIER = 32  # kernels.hpp kOutlier
LENGTHS = (1, 15, 16, 17, 33, 64, 576)
HOSTILE_SIZES = [0, 1e-45, 1e-38, 1e-20, 1e-4, 0.5, 1, 3, 10, 30, 80, 86, 88, 90, 200, 1e10, 3e38]
HOSTILE = np.array([s * x for x in (*HOSTILE_SIZES, np.inf, np.nan) for s in (1, -1)], np.float32)
BINARY = ("rms_norm", "add", "silu_mul", "gelu_tanh_mul", "clamped_silu_mul")
OPS = (*BINARY, "scale", "softcap", "bfloat16", "float16", "float32")


def run(
    unit: str, op: str, x: np.ndarray, y: np.ndarray | None = None, a: float = 0, b: float = 0
) -> np.ndarray:
    out = np.full(len(x), 7.0, np.float32)
    _native.rows_test(unit, op, x, x if y is None else y, out, a, b)
    return out


def values(n: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """Largest distance of finite results, in units in the last place; NaN and inf must agree."""
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
    finite = np.isfinite(rounded) & np.isfinite(got)
    special = ~finite & ~np.isnan(got)
    # One of them may be infinite only where the other is next to it.
    assert np.all(np.abs(want[special]) >= 3.4e38)
    assert np.all(np.sign(got[special]) == np.sign(want[special]))
    spacing = np.maximum(np.spacing(np.abs(rounded[finite])), np.float32(1.2e-38) * 2.0**-23)
    if not finite.any():
        return 0.0
    return float(np.max(np.abs(got[finite].astype(np.float64) - want[finite]) / spacing))


def exact_exp(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(x.astype(np.float64))


@pytest.mark.parametrize("unit", UNITS)
def test_exp_as_silu_shows_it(unit: str) -> None:
    # 1 / (exp(-x) + 1) with x far below 0 is exp(x), and -x is exact: silu shows exp's own error
    # beside two roundings of its own.
    x = np.linspace(-87.0, -20.0, 200_003).astype(np.float32)
    one = np.ones_like(x)
    got = run(unit, "silu_mul", x, one)
    assert ulps(got, x.astype(np.float64) * exact_exp(x)) <= 4
    x = np.linspace(-20.0, 20.0, 200_003).astype(np.float32)
    got = run(unit, "silu_mul", x, one)
    assert ulps(got, x.astype(np.float64) / (1 + exact_exp(-x))) <= 4


@pytest.mark.parametrize("unit", UNITS)
def test_tanh_keeps_relative_precision_towards_zero(unit: str) -> None:
    around = np.linspace(-12.0, 12.0, 200_003).astype(np.float32)
    small = np.geomspace(1e-37, 1, 100_003).astype(np.float32)
    x = np.concatenate([around, small, -small])
    assert ulps(run(unit, "softcap", x, a=1.0), np.tanh(x.astype(np.float64))) <= 5
    np.testing.assert_array_equal(
        run(unit, "softcap", np.array([np.inf, -np.inf, 3e38, np.nan], np.float32), a=30.0),
        np.array([30, -30, 30, np.nan], np.float32),
    )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_elementwise(unit: str, n: int) -> None:
    x, y = values(n), values(n, 1)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    np.testing.assert_array_equal(run(unit, "add", x, y), x + y)
    np.testing.assert_array_equal(run(unit, "scale", x, a=0.3), x * np.float32(0.3))
    assert ulps(run(unit, "softcap", x, a=50.0), 50 * np.tanh(wide_x / 50)) <= 6
    assert ulps(run(unit, "silu_mul", x, y), wide_x / (1 + np.exp(-wide_x)) * wide_y) <= 4
    u = np.sqrt(2 / np.pi) * (wide_x + 0.044715 * wide_x**3)
    # exp's argument, up to 2u = 30 here, carries its own roundings: each is worth 2u ulp of exp.
    assert ulps(run(unit, "gelu_tanh_mul", x, y), wide_x / (1 + np.exp(-2 * u)) * wide_y) <= 100
    g, u = np.minimum(wide_x, 7), np.clip(wide_y, -7, 7)
    # 1.702 is rounded to fp32, and so is its product: worth |1.702 g| ulp of exp.
    want = g / (1 + np.exp(-np.float64(np.float32(1.702)) * g)) * (u + 1)
    got = run(unit, "clamped_silu_mul", x, y)
    assert ulps(got[np.abs(u + 1) > 0.1], want[np.abs(u + 1) > 0.1]) <= 40


@pytest.mark.parametrize("unit", UNITS)
def test_activations_meet_hostile_values(unit: str) -> None:
    x, one = HOSTILE, np.ones_like(HOSTILE)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        silu = wide / (1 + np.exp(-wide).astype(np.float32).astype(np.float64))
    got = run(unit, "silu_mul", x, one)
    normal = ~(np.abs(silu) < 1e-36)  # below, exp(-x) is out of fp32's range: 0 or next to it
    assert ulps(got[normal], silu[normal]) <= 4
    assert np.all(np.abs(got[~normal]) < 1e-36)
    assert np.isnan(run(unit, "gelu_tanh_mul", x, one)[np.isnan(x)]).all()
    # -inf times exp(-inf) is no number either, as in torch.
    gated = np.isnan(run(unit, "clamped_silu_mul", x, one))
    np.testing.assert_array_equal(gated, np.isnan(x) | (x == -np.inf))
    gated = np.isnan(run(unit, "clamped_silu_mul", one, x))
    np.testing.assert_array_equal(gated, np.isnan(x))
    beyond = np.where(np.isnan(x), 0, np.copysign(8, x)).astype(np.float32)
    got = run(unit, "clamped_silu_mul", 9 * one, beyond)  # both at their bounds
    assert ulps(got, 7 / (1 + np.exp(-1.702 * 7)) * (np.clip(beyond, -7, 7) + 1.0)) <= 4
    large = np.abs(x) >= 10
    got = run(unit, "gelu_tanh_mul", x, one)
    np.testing.assert_array_equal(got[large & (x > 0)], x[large & (x > 0)])
    assert np.all(np.abs(got[large & (x < 0) & np.isfinite(x)]) < 1e-30)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_rms_norm(unit: str, n: int) -> None:
    x, w = values(n), values(n, 1, 1.0)
    for eps, offset in ((1e-5, 0.0), (1e-6, 1.0)):
        wide = x.astype(np.float64)
        factor = w.astype(np.float64) + offset
        want = wide / np.sqrt(np.mean(wide**2) + np.float32(eps)) * factor
        got = run(unit, "rms_norm", x, w, eps, offset)
        # The sum of n squares has n roundings in 16 lanes, halved by the root; weight + offset may
        # cancel, which is one rounding of the offset's size.
        slack = 2.0**-24 * (n / 32 + 8)
        np.testing.assert_array_less(
            np.abs(got - want), slack * np.abs(want) + 2.0**-23 * np.abs(want / factor) + 1e-30
        )
    zeros = np.zeros(n, np.float32)
    np.testing.assert_array_equal(run(unit, "rms_norm", zeros, w, 1e-5), zeros)
    x[n // 2] = np.nan
    assert np.isnan(run(unit, "rms_norm", x, w, 1e-5)).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("head_dim, pairs", [(64, 32), (64, 16), (80, 10), (8, 4), (6, 1), (2, 1)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_the_formula_bit_for_bit(
    unit: str, head_dim: int, pairs: int, interleaved: bool
) -> None:
    heads = values(5 * head_dim).reshape(5, head_dim)
    angle = values(pairs, 1, 100.0).astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = heads[:, first], heads[:, second]
    want = heads.copy()
    want[:, first], want[:, second] = a * cos - b * sin, b * cos + a * sin
    out = np.zeros(heads.size, np.float32)
    _native.rope_test(unit, heads.ravel(), cos, sin, out, head_dim, interleaved)
    np.testing.assert_array_equal(out.reshape(5, head_dim), want)
    in_place = heads.flatten()
    _native.rope_test(unit, in_place, cos, sin, in_place, head_dim, interleaved)
    np.testing.assert_array_equal(in_place, out)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of x rounded to nearest even, as integers; NaN is not handled."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("unit", UNITS)
def test_rounding_is_to_nearest_even(unit: str) -> None:
    x = np.concatenate([HOSTILE[~np.isnan(HOSTILE)], values(1000), values(50, 2, 1e-6)])
    halves = np.arange(1, 4000, dtype=np.uint32)
    ties = (halves << 15).view(np.float32)
    x = np.concatenate([x, ties, ties + 1, np.float32(1) + halves.astype(np.float32) * 2.0**-12])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(run(unit, "float16", x), x.astype(np.float16))
    want = (to_bfloat16(x).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(run(unit, "bfloat16", x), want)
    np.testing.assert_array_equal(run(unit, "float32", x), x)
    nan = np.array([np.nan, -np.nan, np.float32(np.nan)] * 7, np.float32)
    for op in ("bfloat16", "float16", "float32"):
        assert np.isnan(run(unit, op, nan)).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_bf16_operands(unit: str, n: int) -> None:
    x = values(n)
    out = np.full(-(-n // 32) * 32 + 32, 9, np.uint16)
    _native.to_bf16_test(unit, x, out)
    np.testing.assert_array_equal(out[:n], to_bfloat16(x))
    assert not out[n:].any()


@dataclass(frozen=True)
class Int8:
    """What to_int8 makes of a row of `stride` places; fine_* in the order of fine_group."""

    q: np.ndarray
    scale: np.ndarray
    sum16: np.ndarray
    scaled_sum: np.ndarray
    fine_group: np.ndarray
    fine_q: np.ndarray
    fine_scale: np.ndarray
    fine_sum16: np.ndarray


def to_int8(unit: str, x: np.ndarray, stride: int) -> Int8:
    def full(per: int, dtype: type) -> np.ndarray:
        return np.full(stride // per, 9, dtype)

    f32, i8, i32 = np.float32, np.int8, np.int32
    out = Int8(
        full(1, i8), full(32, f32), full(16, i32), full(32, f32), full(32, i32), full(1, i8),
        full(32, f32), full(16, i32),
    )  # fmt: skip
    count = _native.to_int8_test(unit, x, *vars(out).values())
    return replace(out, fine_group=out.fine_group[:count])


def digit(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q, scale) of groups [G, 32], fp32: of scales eight lie between powers of two; 1 of zeros."""
    most = np.abs(groups).max(1)
    significand, exponent = np.frexp(most * np.float32(1 / 127))  # from 0.5 to 1
    scale = np.ldexp(np.ceil(significand * 16) / 16, exponent).astype(np.float32)
    scale[most == 0] = 1
    return np.rint(groups * (1 / scale)[:, None]).astype(np.int8), scale


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_int8_operands(unit: str, n: int) -> None:
    stride = -(-n // 32) * 32 + 32
    x = values(n)
    if n > 64:
        x[32:64] = 0
        x[64] = -50  # an outlier
    out = to_int8(unit, x, stride)
    padded = np.zeros(stride, np.float32)
    padded[:n] = x
    groups = padded.reshape(-1, 32)
    q, scale = digit(groups)
    np.testing.assert_array_equal(out.scale, scale)
    np.testing.assert_array_equal(out.q.reshape(-1, 32), q)
    np.testing.assert_array_equal(out.sum16, q.astype(np.int32).reshape(-1, 16).sum(1))
    squares = np.square(groups, dtype=np.float64)
    border = OUTLIER * squares.sum() / n
    outlying = squares.max(1) > border
    # What is a matter of rounding may go either way: the border, and a rest of next to nothing.
    rest = np.abs(groups - q * scale[:, None]).max(1)
    clear = (np.abs(squares.max(1) - border) > 1e-5 * border) & (rest > 1e-6 * scale)
    has_fine = np.isin(np.arange(len(groups)), out.fine_group)
    np.testing.assert_array_equal(has_fine[clear], outlying[clear])
    assert (np.diff(out.fine_group) > 0).all()
    if n > 64:
        assert 2 in out.fine_group
    sums = scale * q.astype(np.int32).sum(1).astype(np.float32)
    for j, g in enumerate(out.fine_group):
        rest = groups[g].astype(np.float64) - q[g] * np.float64(scale[g])
        half_step = np.abs(rest).max() / 127 / 2
        fine = out.fine_q[32 * j : 32 * j + 32].astype(np.int32)
        assert np.abs(rest - fine * out.fine_scale[j]).max() <= half_step * 1.01
        halves = [fine[:16].sum(), fine[16:].sum()]
        np.testing.assert_array_equal(out.fine_sum16[2 * j : 2 * j + 2], halves)
        sums[g] += out.fine_scale[j] * np.float32(fine.sum())
    np.testing.assert_array_equal(out.scaled_sum, sums)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_int8_operands_spread_nan(unit: str, bad: float, place: int) -> None:
    x = values(96)
    x[32 + place] = bad
    out = to_int8(unit, x, 96)
    np.testing.assert_array_equal(out.fine_group, [1])
    assert np.isnan(out.fine_scale[0])
    assert np.isfinite(out.scale).all()
    np.testing.assert_array_equal(np.isnan(out.scaled_sum), [False, True, False])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e-37, 1e-36, 1e-25, 1e-24, 1e32, 1e33, 3e38])
def test_int8_operands_of_extreme_sizes_stay_in_range(unit: str, size: float) -> None:
    x = np.full(32, size, np.float32)
    x[1::2] *= -1
    out = to_int8(unit, x, 32)
    values = out.q * out.scale
    if len(out.fine_group):  # scales beyond the first digit's are the second's
        assert not out.q.any()
        assert not out.fine_sum16.any()
        values = out.fine_q * out.fine_scale
    np.testing.assert_allclose(values, x, rtol=0.01, atol=1e-36)
    assert not out.sum16.any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("op", OPS)
def test_an_elements_bits_do_not_depend_on_its_place(unit: str, op: str) -> None:
    x, y = values(100), values(100, 1)
    if op == "rms_norm":  # a row's statistics are its own: only its place in memory may vary
        whole = run(unit, op, x, y, 1e-5)
        for start in range(1, 20):
            memory = np.zeros(200, np.float32)
            memory[start : start + 100] = x
            moved = run(unit, op, memory[start : start + 100], y, 1e-5)
            np.testing.assert_array_equal(moved, whole)
        return
    whole = run(unit, op, x, y, 20.0)
    for start in range(20):
        for stop in (start + 1, start + 15, start + 17, 100):
            part = run(unit, op, x[start:stop], y[start:stop], 20.0)
            np.testing.assert_array_equal(part, whole[start:stop])


def test_bad_arguments_are_refused() -> None:
    x, short = values(8), values(4)
    with pytest.raises(ValueError, match="unit"):
        run("abacus", "add", x)
    with pytest.raises(ValueError, match="operation"):
        run("generic", "subtract", x)
    with pytest.raises(ValueError, match="as long as"):
        run("generic", "add", x, short)
    with pytest.raises(ValueError, match="whole heads"):
        _native.rope_test("generic", x, short[:1], short[:1], x, 3, False)
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.to_bf16_test("generic", x, np.zeros(8, np.uint16))
