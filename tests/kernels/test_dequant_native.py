"""The native dequantisation equals quant/ bit for bit, and refuses what does not fit."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import FORMATS, Format, RawWeight
from engineroom.quant.values import dequantise
from tests.counts import count


def elements_of(fmt: Format, data: np.ndarray) -> int:
    return (data.size - fmt.header_bytes) // fmt.block_bytes * fmt.block_elements


def native(fmt: Format, data: np.ndarray) -> np.ndarray:
    out = np.full(elements_of(fmt, data), np.nan, dtype=np.float32)
    _native.dequantise(fmt.name, data, out)
    return out


def specification(fmt: Format, data: np.ndarray) -> np.ndarray:
    elements = elements_of(fmt, data)
    return dequantise(RawWeight("w", fmt, (elements,), {"data": data}))


def assert_same_values(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits; where both are NaN the payload is free (processors differ on it)."""
    free = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[~free], want.view(np.uint32)[~free])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("blocks", [0, 1, 3, 37])
def test_any_bytes(fmt: Format, blocks: int) -> None:
    """Uniform bytes: scales of every size, infinite and NaN ones too."""
    for seed in range(count(reduced=20, full=500)):
        count_of = blocks + bool(fmt.header_bytes)  # there is no header without a row
        size = fmt.row_bytes(count_of * fmt.block_elements)
        data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        assert_same_values(native(fmt, data), specification(fmt, data))


@pytest.mark.parametrize("name", ["INT8", "INT4", "Q5_K", "FP8", "FP8_128", "NF4"])
def test_rows_with_headers(name: str) -> None:
    fmt, columns = FORMATS[name], 512
    data = np.random.default_rng(3).integers(0, 256, 7 * fmt.row_bytes(columns), np.uint8)
    out = np.empty(7 * columns, np.float32)
    _native.dequantise(name, data, out, columns)
    want = dequantise(RawWeight("w", fmt, (7, columns), {"data": data}))
    assert_same_values(out, want.reshape(-1))
    with pytest.raises(ValueError, match="elements in rows of 511"):
        _native.dequantise(name, data, out, 511)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float(name: str) -> None:
    data = np.arange(65536, dtype=np.uint16).view(np.uint8)
    assert_same_values(native(FORMATS[name], data), specification(FORMATS[name], data))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_unaligned_and_read_only_bytes(fmt: Format, tmp_path: Path) -> None:
    """A tensor lies in the mapped file wherever the file says."""
    size = fmt.row_bytes(5 * fmt.block_elements)
    blocks = np.random.default_rng(7).integers(0, 256, size, np.uint8)
    (tmp_path / "f").write_bytes(b"abc" + blocks.tobytes())
    with (
        open(tmp_path / "f", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        view = np.frombuffer(mapped, np.uint8)[3:]
        assert not view.flags.writeable
        assert_same_values(native(fmt, view), specification(fmt, blocks))
        del view


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_sizes_must_match(fmt: Format) -> None:
    data = np.zeros(fmt.row_bytes(2 * fmt.block_elements), np.uint8)
    out = np.zeros(2 * fmt.block_elements, np.float32)
    for bad in (
        (data[:-1], out),
        (data[: fmt.block_bytes], out),
        (data, out[:-1]),
        (data, out[: fmt.block_elements]),
        (data, np.zeros(3 * fmt.block_elements, np.float32)),
    ):
        with pytest.raises(ValueError, match=f"{fmt.name} stores {fmt.block_elements} elements"):
            _native.dequantise(fmt.name, *bad)
    with pytest.raises(
        ValueError,
        match=r"unknown format 'Q9'; supported: F32, F16, .*INT8, INT4, I4G32, .*FP8_128, NF4",
    ):
        _native.dequantise("Q9", data, out)


def test_arrays_are_never_converted_behind_the_callers_back() -> None:
    """A silent copy of `out` would lose the result."""
    data, out = np.zeros(4, np.uint8), np.zeros(2, np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for bad in (
        (data, out.astype(np.float64)),
        (data, np.zeros(4, np.float32)[::2]),
        (data, out.reshape(1, 2)),
        (data, frozen),
        (np.zeros(8, np.uint8)[::2], out),
        (data.view(np.int8), out),
    ):
        with pytest.raises(TypeError):
            _native.dequantise("F16", *bad)


def test_cpu_features() -> None:
    features = _native.cpu_features()
    assert all(type(k) is str and type(v) is bool for k, v in features.items())
    listed = _features_of_proc()
    if listed is None:
        pytest.skip("/proc/cpuinfo does not name this processor's features")
    names = {"avx", "avx2", "f16c", "fma", "sse4_2", "avx512f", "avx512bw", "avx_vnni"}
    assert {n for n in names if features[n]} == names & listed


def _features_of_proc() -> set[str] | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((set(line.split()) for line in lines if line.startswith("flags")), None)
