"""Packed tiles hold exactly the checkpoint's values: rows read back equal quant/'s bits."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import FORMATS, Format, RawWeight
from engineroom.quant.values import dequantise
from tests.counts import count

pytestmark = pytest.mark.cores

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


def bf16_bits(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bits of bf16: those of a trained weight, and what a checkpoint could hold besides."""
    rng = np.random.default_rng(rows * columns)
    normal = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    bits = (normal.view(np.uint32) >> 16).astype("<u2")
    rare = {
        "zeros and subnormals": np.array([0x0000, 0x8000, 0x0001, 0x807F], "<u2"),
        "infinities and NaN": np.array([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF], "<u2"),
        "all patterns": np.arange(65536).astype("<u2"),
    }
    if kind in rare:
        few = rng.random(bits.shape) < (1.0 if kind == "all patterns" else 0.02)
        bits[few] = np.resize(rare[kind], few.sum())
    if kind == "one exception in 8 columns":
        bits[rng.integers(0, rows, -(-columns // 8)), np.arange(0, columns, 8)] = 0x7E01
    if kind == "nothing but one value":
        bits[:] = 0xBF80
    return bits


@pytest.mark.parametrize(
    "kind,ratio",
    [
        ("trained", 0.77),
        ("zeros and subnormals", 0.77),
        ("infinities and NaN", 0.77),
        ("one exception in 8 columns", 0.8),
        ("nothing but one value", 0.77),
        ("all patterns", 1.0),
    ],
)
def test_compact_bf16_holds_every_bit(kind: str, ratio: float) -> None:
    """Bits, not values: of NaN too. What cannot be stored in less stays as it is."""
    fmt = FORMATS["BF16"]
    for rows, columns in [(48, 8), (1, 8), (47, 64), (100, 520), (300, 256), (100, 33), (9, 12)]:
        bits = bf16_bits(kind, rows, columns)
        data = bits.reshape(-1).view(np.uint8)
        for threads in THREADS:
            matrix = _native.pack(fmt.name, data, rows, columns, threads)
            got = read_back(matrix).view(np.uint32)
            np.testing.assert_array_equal(got, bits.astype(np.uint32) << 16)
            plain = _native.pack(fmt.name, data, rows, columns, threads, compact=False)
            if rows >= 48 and columns % 8:
                assert matrix.nbytes == plain.nbytes
            elif columns >= 256:
                assert matrix.nbytes <= ratio * plain.nbytes
                assert (matrix.nbytes == plain.nbytes) == (ratio == 1.0)


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
