"""Rounding to grids, GPTQ and AWQ: on layers whose inputs are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engineroom.quant.calibrate import (
    Factor,
    awq,
    awq_scales,
    folded_norm,
    gptq,
    relative_error,
)
from engineroom.quant.rounding import (
    Integers,
    e4m3_codes,
    fit,
    fp8_blocks,
    fp8_rows,
    round_to_nearest,
    to_bfloat16,
)
from engineroom.quant.small_floats import e4m3_values

GRIDS = [Integers(4, 32, True), Integers(4, 64, False), Integers(8, -1, True)]


def layer(rows: int = 48, columns: int = 192) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and inputs of few directions with some columns much larger: as real ones are."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    mixed = rng.standard_normal((2000, 24)) @ rng.standard_normal((24, columns))
    x = (mixed + 0.1 * rng.standard_normal((2000, columns))).astype(np.float32)
    x[:, :6] *= 20
    return w, x


def hostile() -> np.ndarray:
    """Groups of zeros, of one value, one outlier, all positive, all negative, tiny, large."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    w[0] = 0
    w[1] = 3.5
    w[2, 7] = 1000
    w[3], w[4] = np.abs(w[3]) + 1, -np.abs(w[4]) - 1
    w[5] *= 1e-20
    w[6] *= 1e20
    return w


@pytest.mark.parametrize("grid", GRIDS)
def test_values_move_by_at_most_half_a_step_of_their_range_in_the_mean(grid: Integers) -> None:
    """The grid that is kept has no larger squared error than that of the whole range."""
    w = hostile()
    made = round_to_nearest(w, grid)
    assert made.q.min() >= grid.low and made.q.max() <= grid.high
    groups = w.reshape(len(w), grid.groups(w.shape[1]), -1)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    span = np.maximum(high, -low) / grid.high if grid.symmetric else (high - low) / 15
    wrong = (made.values() - w).reshape(groups.shape).astype(np.float64)
    # Half a step, the zero point's own rounding, and the scale's to bfloat16 over the whole range.
    bound = span * (0.5 + 0.5 * (not grid.symmetric) + (grid.high - grid.low) / 512)
    assert (np.sqrt((wrong**2).mean(axis=2)) <= bound.astype(np.float64) + 1e-28).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zeros(grid: Integers) -> None:
    assert not round_to_nearest(np.zeros((2, 64), np.float32), grid).values().any()


def test_rows_of_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 48 columns are no whole groups of 32"):
        round_to_nearest(np.ones((1, 48), np.float32), GRIDS[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_is_nearer_than_rounding_on_what_it_was_calibrated_for(grid: Integers) -> None:
    w, x = layer()
    hessian = (x.T @ x).astype(np.float64)
    nearest = relative_error(w, round_to_nearest(w, grid).values(), hessian)
    solved = relative_error(w, gptq(w, Factor.of(hessian), grid).values(), hessian)
    assert solved < 0.5 * nearest


def test_gptq_of_inputs_that_are_alike_is_rounding_to_nearest() -> None:
    """With H = 1 no column can make up for another."""
    w, _ = layer()
    grid = Integers(4, 32, True)
    solved = gptq(w, Factor.of(np.eye(w.shape[1])), grid)
    np.testing.assert_array_equal(solved.values(), round_to_nearest(w, grid).values())


def test_gptq_survives_columns_that_are_never_used() -> None:
    w, x = layer()
    x[:, 10:30] = 0
    made = gptq(w, Factor.of((x.T @ x).astype(np.float64)), GRIDS[0])
    assert not made.values()[:, 10:30].any()
    made = gptq(w, Factor.of(np.zeros((w.shape[1],) * 2)), GRIDS[0])
    assert np.isfinite(made.values()).all()


def test_awq_is_nearer_than_rounding_where_a_few_columns_are_large() -> None:
    w, x = layer()
    hessian = (x.T @ x).astype(np.float64)
    grid = Integers(4, 32, True)
    by = awq_scales([w], hessian, np.abs(x).mean(axis=0), grid)
    nearest = relative_error(w, round_to_nearest(w, grid).values(), hessian)
    scaled = relative_error(w, awq(w, np.diag(hessian), grid, by).values() / by, hessian)
    assert by.std() > 0
    assert scaled < 0.7 * nearest


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_folded_norm_divides_by_exactly_what_the_columns_are_multiplied_by(offset: float) -> None:
    rng = np.random.default_rng(5)
    norm = to_bfloat16(rng.standard_normal(64).astype(np.float32))
    by = rng.uniform(0.2, 5, 64).astype(np.float32)
    folded, real = folded_norm(norm, offset, by)
    np.testing.assert_array_equal(folded, to_bfloat16(folded))
    gain = norm + np.float32(offset)
    np.testing.assert_allclose((folded + np.float32(offset)) * real, gain, rtol=3e-7)
    # Near 1 / by; a norm stored less its offset loses more to its rounding.
    assert np.median(np.abs(real / by - 1)) < 0.01


def test_e4m3_codes_are_of_the_nearest_number_ties_to_even() -> None:
    values = e4m3_values()
    finite = np.flatnonzero(~np.isnan(values))
    back = values[e4m3_codes(values[finite])]
    np.testing.assert_array_equal(back, values[finite])
    grid = values[:127]
    between = (grid[1:] + grid[:-1]) / 2
    assert (e4m3_codes(between) % 2 == 0).all()
    assert (e4m3_codes(np.nextafter(between, 0)) == np.arange(126)).all()
    assert (e4m3_codes(np.nextafter(between, np.float32(1e9))) == np.arange(1, 127)).all()
    assert e4m3_codes(np.array([1e9, -1e9], np.float32)).tolist() == [0x7E, 0xFE]


def test_fp8_scales_bring_the_largest_value_to_448() -> None:
    w, _ = layer(200, 256)
    for codes, scale in (fp8_rows(w), fp8_blocks(w)):
        each = scale if scale.shape[1] == 1 else scale.repeat(128, 0)[:200].repeat(128, 1)
        made = e4m3_values()[codes] * each
        # Half a unit of four bits; 448 itself may be passed by the scale's own rounding.
        assert (np.abs(made - w) <= np.abs(w) / 16 + each * 2.0**-10 + np.abs(w) / 256).all()
        assert np.abs(e4m3_values()[codes]).max() == 448


def test_rows_are_rounded_alone() -> None:
    """What a fused tensor is made of may be rounded together or apart."""
    w, x = layer()
    hessian = (x.T @ x).astype(np.float64)
    grid = replace(GRIDS[0])
    np.testing.assert_array_equal(
        gptq(w, Factor.of(hessian), grid).values()[:16],
        gptq(w[:16], Factor.of(hessian), grid).values(),
    )


def test_gptq_is_the_method_of_its_paper() -> None:
    """Column by column by the inverse of what is left, in float64: equal but for near ties."""
    w, x = layer(rows=16)
    hessian = (x.T @ x).astype(np.float64)
    grid = Integers(4, 32, True)
    scale, zero = fit(w, grid, np.diag(hessian))
    left, q = w.astype(np.float64), np.zeros(w.shape)
    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(order))
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        s = scale[:, column // 32].astype(np.float64)
        q[:, column] = np.clip(np.rint(left[:, column] / s), grid.low, grid.high)
        error = (left[:, column] - s * q[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    made = gptq(w, Factor.of(hessian), grid)
    assert not zero.any()
    assert (made.q == q).mean() > 0.98
