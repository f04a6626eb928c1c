"""FP8 and NF4 as they are made: equal to the format's own library, and to the native kernels."""

from __future__ import annotations

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import FP8, NF4, NF4_CODEBOOK, SMALL_FLOATS, RawWeight
from engineroom.quant.small_floats import e4m3_values, quantise_fp8, quantise_nf4
from engineroom.quant.values import block_dtype, dequantise, row_dtype
from tests.counts import count

from .test_integers import hostile

QUANTISERS = {"FP8": quantise_fp8, "NF4": quantise_nf4}


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("columns", [64, 192, 576])
def test_native_bytes_are_the_specifications(name: str, columns: int) -> None:
    for seed in range(count(reduced=3, full=60)):
        x = hostile(columns, seed)
        want = np.frombuffer(QUANTISERS[name](x), np.uint8)
        for threads in (1, 3):
            got = np.full(want.size, 0xAA, np.uint8)
            data = x.reshape(-1).view(np.uint8)
            assert _native.quantise("F32", data, len(x), columns, name, got, threads) == -1
            np.testing.assert_array_equal(got, want)


def test_every_code_of_fp8_is_its_own_nearest() -> None:
    """Of a row whose largest value is 448 the scale is 1: codes come back, ties go to even ones."""
    table = e4m3_values()
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    row = np.concatenate([table[finite], np.full(2, 448)]).astype(np.float32)[None]
    made = np.frombuffer(quantise_fp8(row), row_dtype(FP8, row.size))
    assert made["scale"][0, 0] == 1
    assert made["blocks"]["values"].reshape(-1)[:-2].tolist() == finite
    size = table[:0x7F].astype(np.float64)
    middles = ((size[:-1] + size[1:]) / 2).astype(np.float32)
    row = np.concatenate([middles, np.full(2, 448)]).astype(np.float32)[None]
    codes = np.frombuffer(quantise_fp8(row), row_dtype(FP8, row.size))["blocks"]["values"]
    want = [code + code % 2 for code in range(0x7E)]
    assert codes.reshape(-1)[:-2].tolist() == want


@pytest.mark.parametrize("columns", [64, 576])
def test_fp8_is_off_by_half_a_step(columns: int) -> None:
    """Of 3 bits of significand: 1 part in 16, or half of the least step, 2^-10 scales."""
    x = hostile(columns)
    data = np.frombuffer(quantise_fp8(x), np.uint8)
    values = dequantise(RawWeight("w", FP8, x.shape, {"data": data})).astype(np.float64)
    scale = data.view(row_dtype(FP8, columns))["scale"].astype(np.float64)
    bound = np.maximum(np.abs(x.astype(np.float64)) / 16, scale * 2.0**-10) * (1 + 2.0**-20)
    tiny = np.abs(x).max(axis=1, keepdims=True) < 448 * 2.0**-126
    assert (np.abs(values - x) <= np.where(tiny, 448 * 2.0**-126, bound)).all()


@pytest.mark.torch
@pytest.mark.parametrize("columns", [64, 576])
def test_nf4_is_byte_for_byte_that_of_bitsandbytes(columns: int) -> None:
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    for seed in range(count(reduced=4, full=100)):
        x = hostile(columns, seed)
        table = np.array(NF4_CODEBOOK, np.float32)
        x[19, :64] = 1
        x[19, :15] = (table[:-1] + table[1:]) / 2  # ties
        packed, state = functional.quantize_4bit(
            torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=False
        )
        blocks = np.frombuffer(quantise_nf4(x), block_dtype(NF4))
        np.testing.assert_array_equal(blocks["absmax"].reshape(-1), state.absmax.numpy())
        np.testing.assert_array_equal(blocks["nibbles"].reshape(-1, 1), packed.numpy())
        theirs = functional.dequantize_4bit(packed, state).numpy()
        ours = dequantise(RawWeight("w", NF4, x.shape, {"data": blocks.view(np.uint8)}))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_value_that_is_not_finite_is_found(name: str) -> None:
    x = np.ones((20, 64), np.float32)
    x[13, 5] = np.nan
    out = np.empty(20 * SMALL_FLOATS[name].row_bytes(64), np.uint8)
    assert _native.quantise("F32", x.reshape(-1).view(np.uint8), 20, 64, name, out, 2) == 13
