"""Packed tiles hold exactly the checkpoint's values: rows read back equal quant/'s bits."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import FORMATS, Format, RawWeight
from engineroom.quant.values import dequantise
from tests.counts import count

THREADS = [1, 2, 3]


def values(fmt: Format, data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return dequantise(RawWeight("w", fmt, (rows, columns), {"data": data}))


def read_back(matrix: _native.PackedMatrix) -> np.ndarray:
    out = np.full(matrix.shape, np.nan, np.float32)
    for i in range(len(out)):
        matrix.row(i, out[i])
    return out


def assert_same_values(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits; where both are NaN the payload is free (processors differ on it)."""
    free = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[~free], want.view(np.uint32)[~free])


def columns_of(fmt: Format) -> list[int]:
    return [1, 7, 33, 96] if fmt.is_float else [fmt.block_elements, 3 * fmt.block_elements]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("rows", [1, 47, 48, 49, 100])
def test_any_bytes(fmt: Format, rows: int) -> None:
    """Uniform bytes: every scale, infinite and NaN ones too, and every quant."""
    for columns in columns_of(fmt):
        for seed in range(count(reduced=2, full=50)):
            rng = np.random.default_rng(seed)
            data = rng.integers(0, 256, rows * fmt.row_bytes(columns), np.uint8)
            matrix = _native.pack(fmt.name, data, rows, columns, 1)
            assert (matrix.shape, matrix.format) == ((rows, columns), fmt.name)
            assert_same_values(read_back(matrix), values(fmt, data, rows, columns))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_hostile_blocks(fmt: Format) -> None:
    """All bits clear, all set, and one byte apart: bits that land at a neighbour show."""
    rows, columns = 50, 2 * fmt.block_elements
    size = rows * fmt.row_bytes(columns)
    one = np.zeros(size, np.uint8)
    one[size // 2] = 0xFF
    for data in (np.zeros(size, np.uint8), np.full(size, 0xFF, np.uint8), one, ~one):
        matrix = _native.pack(fmt.name, data, rows, columns, 2)
        assert_same_values(read_back(matrix), values(fmt, data, rows, columns))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_one_row_among_zeros(fmt: Format) -> None:
    """A row's bits do not reach the rows beside it: rows 0, 2, 4 ... share bytes of bit planes."""
    rows, columns = 49, fmt.block_elements * (1 if not fmt.is_float else 32)
    row_bytes = fmt.row_bytes(columns)
    for row in (0, 1, 46, 47, 48):
        data = np.zeros(rows * row_bytes, np.uint8)
        mine = data[row * row_bytes : (row + 1) * row_bytes]
        mine[:] = np.random.default_rng(row).integers(0, 60, row_bytes, np.uint8)
        matrix = _native.pack(fmt.name, data, rows, columns, 1)
        assert_same_values(read_back(matrix), values(fmt, data, rows, columns))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_threads_unaligned_and_read_only_bytes(fmt: Format) -> None:
    """Large enough that every thread gets tiles, from wherever the file says."""
    rows, columns = 500, 4 * fmt.block_elements * (1 if not fmt.is_float else 256)
    data = np.random.default_rng(1).integers(0, 256, 3 + rows * fmt.row_bytes(columns), np.uint8)
    data.flags.writeable = False
    want = values(fmt, data[3:].copy(), rows, columns)
    for threads in THREADS:
        assert_same_values(
            read_back(_native.pack(fmt.name, data[3:], rows, columns, threads)), want
        )


def test_matrices_own_their_memory() -> None:
    """Matrices share one mapping; each lives as long as it is held, whatever the others do."""
    fmt = FORMATS["Q8_0"]
    rows, columns = 96, 64
    size = rows * fmt.row_bytes(columns)
    kept = []
    for seed in range(20):
        data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        matrix = _native.pack(fmt.name, data, rows, columns, 1)
        if seed % 3 == 0:
            kept.append((matrix, data))
        del matrix
    gc.collect()
    for matrix, data in kept:
        assert_same_values(read_back(matrix), values(fmt, data, rows, columns))


def test_nbytes_is_what_the_layout_says() -> None:
    fmt = FORMATS["Q4_0"]
    data = np.zeros(49 * fmt.row_bytes(64), np.uint8)
    # Two tiles of 2 groups: 192 bytes of scales, 1536 of nibbles.
    assert _native.pack("Q4_0", data, 49, 64, 1).nbytes == 2 * (192 + 1536)


def test_refusals() -> None:
    data = np.zeros(18, np.uint8)
    with pytest.raises(
        ValueError, match=r"no tile layout for format 'Q9'; known: F32, .*Q6_K, INT8, INT4"
    ):
        _native.pack("Q9", data, 1, 32, 1)
    with pytest.raises(ValueError, match="Q4_0 stores blocks of 32 elements; a row of 33"):
        _native.pack("Q4_0", data, 1, 33, 1)
    with pytest.raises(ValueError, match=r"needs rows and columns, not \[0, 32\]"):
        _native.pack("Q4_0", data, 0, 32, 1)
    with pytest.raises(ValueError, match=r"of shape \[2, 32\] takes 36 bytes, data has 18"):
        _native.pack("Q4_0", data, 2, 32, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        _native.pack("Q4_0", data, 1, 32, 0)
    with pytest.raises(TypeError):
        _native.pack("Q4_0", np.zeros(18, np.int32), 1, 32, 1)
    matrix = _native.pack("Q4_0", data, 1, 32, 1)
    out = np.zeros(32, np.float32)
    for bad in (-1, 1):
        with pytest.raises(ValueError, match=f"row {bad} of a matrix of 1 rows"):
            matrix.row(bad, out)
    with pytest.raises(ValueError, match="a row has 32 values, out has 31"):
        matrix.row(0, out[:-1])


def test_every_format_has_a_layout() -> None:
    for fmt in FORMATS.values():
        data = np.zeros(fmt.row_bytes(fmt.block_elements), np.uint8)
        assert _native.pack(fmt.name, data, 1, fmt.block_elements, 1).format == fmt.name
