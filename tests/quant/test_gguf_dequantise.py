"""Dequantisation of the GGUF formats equals the gguf package's, bit for bit, on any block."""

import warnings

import gguf
import numpy as np
import pytest

from engineroom.engine.load.gguf import GgufFile
from engineroom.kernels.weights import FILE_FORMATS, Format, RawWeight
from engineroom.quant.gguf import block_dtype, dequantise, dequantise_rows
from tests.counts import FULL, count
from tests.data import model_path
from tests.load.writers import quantise_q4_1, quantise_q8_0, to_bf16

QUANTISED = [f for f in FILE_FORMATS.values() if not f.is_float]
HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xC000, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]
HALVES += [0x7E00, 0xFE01]  # quiet NaN


def raw_weight(fmt: Format, shape: tuple[int, ...], raw: bytes) -> RawWeight:
    return RawWeight("w", fmt, shape, {"data": np.frombuffer(raw, np.uint8)})


def package(fmt: Format, raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it computes with infinities without saying so
        rows = np.frombuffer(raw, np.uint8).reshape(-1, fmt.row_bytes(shape[-1]))
        kind = gguf.GGMLQuantizationType[fmt.name]
        return gguf.quants.dequantize(rows, kind).reshape(shape).astype(np.float32)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def blocks_of(fmt: Format, n: int, seed: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(n * fmt.block_bytes), block_dtype(fmt))


@pytest.mark.parametrize("fmt", FILE_FORMATS.values(), ids=FILE_FORMATS)
def test_random_blocks(fmt: Format) -> None:
    for seed in range(count(reduced=3, full=100)):
        rng = np.random.default_rng(seed)
        shape = [(5, 768), (2, 3, 256), (512,)][seed % 3]
        blocks = blocks_of(fmt, int(np.prod(shape)) // fmt.block_elements, seed).copy()
        for name, kind, _ in fmt.layout:  # finite scales of every size; the rest fully random
            if kind == "f2":
                values = rng.standard_normal(blocks[name].shape) * 10.0 ** rng.integers(-6, 4)
                blocks[name] = values.astype(np.float16)
        raw = blocks.tobytes()
        assert_same_bits(dequantise(raw_weight(fmt, shape, raw)), package(fmt, raw, shape))


@pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)
def test_hostile_blocks(fmt: Format) -> None:
    """Zero, denormal, largest, infinite and NaN scales in every pairing, over extreme quants."""
    halves = np.array(HALVES, np.uint16).view(np.float16)
    scales = [name for name, kind, _ in fmt.layout if kind == "f2"]
    others = [name for name, kind, _ in fmt.layout if kind != "f2"]
    for fill in (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, None):
        blocks = blocks_of(fmt, len(halves) ** len(scales), seed=7).copy()
        grid = np.meshgrid(*[halves] * len(scales))
        for name, values in zip(scales, grid, strict=True):
            blocks[name] = values.reshape(-1, 1)
        for name in others if fill is not None else []:
            blocks[name].view(np.uint8)[...] = fill
        raw, shape = blocks.tobytes(), (len(blocks), fmt.block_elements)
        ours = dequantise(raw_weight(fmt, shape, raw))
        assert_same_bits(ours, package(fmt, raw, shape))
    if scales:
        assert np.isnan(ours).any() and np.isinf(ours).any(), "hostile scales must propagate"


def test_every_exponent_of_mxfp4() -> None:
    fmt = FILE_FORMATS["MXFP4"]
    blocks = np.zeros(256, block_dtype(fmt))
    blocks["exponent"][:, 0] = np.arange(256)
    blocks["nibbles"] = np.arange(16) | np.arange(16)[::-1] << 4
    raw, shape = blocks.tobytes(), (256, 32)
    assert_same_bits(dequantise(raw_weight(fmt, shape, raw)), package(fmt, raw, shape))


def test_more_blocks_than_one_chunk() -> None:
    fmt, shape = FILE_FORMATS["Q8_0"], (70_001, 32)
    raw = quantise_q8_0(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    assert_same_bits(dequantise(raw_weight(fmt, shape, raw)), package(fmt, raw, shape))


def test_the_order_of_elements_and_groups_in_a_block() -> None:
    """One lit element at a time comes out at its own place: written out, not compared."""
    q4 = np.zeros(1, block_dtype(FILE_FORMATS["Q4_0"]))
    q4["d"], q4["nibbles"] = 1, 0x88
    q4["nibbles"][0, 3] = 0x98  # the high nibble of byte 3 is element 19
    values = dequantise(raw_weight(FILE_FORMATS["Q4_0"], (32,), q4.tobytes()))
    assert np.flatnonzero(values).tolist() == [19] and values[19] == 1
    q6 = np.zeros(1, block_dtype(FILE_FORMATS["Q6_K"]))
    q6["d"], q6["scales"] = 1, np.arange(16)
    q6["high_bits"] = 0xAA  # every q is 32, so 0 after the shift
    q6["low_nibbles"][0, 64 + 5] = 0x01
    values = dequantise(raw_weight(FILE_FORMATS["Q6_K"], (256,), q6.tobytes()))
    assert np.flatnonzero(values).tolist() == [133] and values[133] == 133 // 16


def test_floats_are_exact_and_new() -> None:
    x = np.float32([1.5, -2.0, 3.25])
    for name, raw in {
        "F32": x.tobytes(),
        "F16": x.astype("<f2").tobytes(),
        "BF16": to_bf16(x),
    }.items():
        out = dequantise(raw_weight(FILE_FORMATS[name], (3,), raw))
        assert_same_bits(out, x)
        out[0] = 9  # writable, not the checkpoint's bytes


def test_rows_equal_the_rows_of_the_whole() -> None:
    shape = (6, 512)
    for fmt in FILE_FORMATS.values():
        raw = blocks_of(fmt, int(np.prod(shape)) // fmt.block_elements, 3).tobytes()
        weight = raw_weight(fmt, shape, raw)
        assert_same_bits(dequantise_rows(weight, 2, 5), dequantise(weight)[2:5])
    for start, stop in ((-1, 2), (2, 2), (0, 7)):
        with pytest.raises(ValueError, match="does not lie in it"):
            dequantise_rows(weight, start, stop)
    with pytest.raises(ValueError, match="has no rows"):
        dequantise_rows(raw_weight(FILE_FORMATS["F32"], (2,), bytes(8)), 0, 1)


def test_an_unknown_format_is_named() -> None:
    fmt = Format("NF9", 1, 4, (("value", "f4", 1),))
    with pytest.raises(ValueError, match=r"format NF9 .*known: F32, F16, BF16, Q4_0"):
        dequantise(raw_weight(fmt, (1,), bytes(4)))


def test_layouts_fill_their_blocks() -> None:
    for fmt in FILE_FORMATS.values():
        assert block_dtype(fmt).itemsize == fmt.block_bytes, fmt.name


@pytest.mark.parametrize("bits", [4, 8])
def test_the_test_quantisers_stay_within_half_a_step(bits: int) -> None:
    x = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
    x[0, :32] = 0
    fmt, raw = (
        (FILE_FORMATS["Q8_0"], quantise_q8_0(x))
        if bits == 8
        else (FILE_FORMATS["Q4_1"], quantise_q4_1(x))
    )
    blocks = x.reshape(-1, 32)
    step = np.ptp(blocks, axis=1) / 15 if bits == 4 else np.abs(blocks).max(axis=1) / 127
    error = np.abs(dequantise(raw_weight(fmt, x.shape, raw)) - x).reshape(-1, 32).max(axis=1)
    # half a step, and what rounding the scales to half precision moves (15 or 127 steps of 2^-11)
    assert (error <= step * (0.5 + 2 ** (bits - 10)) + 2e-3 * (bits == 4)).all()


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_real_tensors(name: str) -> None:
    file, seen = GgufFile(model_path(name)), {}
    for info in file.tensors.values():
        kind = info.format.name
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= (100 if FULL else 2):
            weight = file.tensor(info.name)
            if len(info.shape) == 2 and info.shape[0] > 4096:
                weight = weight.rows(0, 4096)
            raw = weight.data.tobytes()
            assert_same_bits(dequantise(weight), package(weight.format, raw, weight.shape))
    assert len(seen) >= 3
