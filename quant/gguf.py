"""What the block formats of GGUF mean: dequantisation in readable numpy, the specification.

Formats: ggml-quants.c and ggml-common.h of ggml (MIT) as the description of the bytes and of the
order of the float operations, which is kept exactly: products and sums are float32, one rounding
each, so that every backend can be held to these values bit for bit.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..kernels.weights import Format, RawWeight

# Twice the values of 4-bit floats (a sign, 2 bits of exponent, 1 of significand), by code.
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_CHUNK_BLOCKS = 1 << 15  # blocks unpacked at a time, so that the temporaries stay in the cache


def dequantise(weight: RawWeight) -> np.ndarray:
    """The weight's values, a new float32 array of `weight.shape`.

    Errors: ValueError for a format that is not described here.
    """
    unpack = _UNPACK.get(weight.format.name)
    if unpack is None:
        raise ValueError(
            f"tensor {weight.name!r}: format {weight.format.name} has no dequantisation "
            f"(known: {', '.join(_UNPACK)})"
        )
    blocks = weight.data.view(block_dtype(weight.format))
    out = np.empty((len(blocks), weight.format.block_elements), np.float32)
    # An infinite or NaN scale is a value like any other here: it propagates.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            part = slice(start, start + _CHUNK_BLOCKS)
            out[part] = unpack(blocks[part])
    return out.reshape(weight.shape)


def dequantise_rows(weight: RawWeight, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a weight of at least 2 dimensions, float32 [stop - start, ...].

    Errors: ValueError where the rows do not lie within the weight.
    """
    if len(weight.shape) < 2:
        raise ValueError(f"tensor {weight.name!r} of shape {list(weight.shape)} has no rows")
    return dequantise(weight.rows(start, stop))


def block_dtype(fmt: Format) -> np.dtype:
    """One block as a structured dtype, little endian, from the format's own layout."""
    return np.dtype(_fields(fmt.layout))


def row_dtype(fmt: Format, num_columns: int) -> np.dtype:
    """One row of num_columns elements: its header's fields, then `blocks`."""
    blocks = ("blocks", block_dtype(fmt), (num_columns // fmt.block_elements,))
    return np.dtype([*_fields(fmt.header), blocks])


def _fields(layout: Iterable[tuple[str, str, int]]) -> list[tuple[str, np.dtype, tuple[int]]]:
    kinds = {"bf16": "<u2", "u1": "u1", "i1": "i1"}
    return [(name, np.dtype(kinds.get(kind, f"<{kind}")), (count,)) for name, kind, count in layout]


# Each takes blocks [n] of its structured dtype and returns float32 [n, block_elements]. Scales have
# shape [n, 1]: they multiply every element of their block.


def _f32(b: np.ndarray) -> np.ndarray:
    return b["value"]


def _f16(b: np.ndarray) -> np.ndarray:
    return b["value"].astype(np.float32)


def _bf16(b: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (b["value"].astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    """d * (q - 8), q of 4 bits."""
    q = halves_of_bytes(b["nibbles"], 16).astype(np.int8) - np.int8(8)
    return _float(b["d"]) * _float(q)


def _q4_1(b: np.ndarray) -> np.ndarray:
    """d * q + m, q of 4 bits."""
    return _float(b["d"]) * _float(halves_of_bytes(b["nibbles"], 16)) + _float(b["m"])


def _q5_0(b: np.ndarray) -> np.ndarray:
    """d * (q - 16), q of 5 bits."""
    return _float(b["d"]) * _float(_five_bits(b).astype(np.int8) - np.int8(16))


def _q5_1(b: np.ndarray) -> np.ndarray:
    """d * q + m, q of 5 bits."""
    return _float(b["d"]) * _float(_five_bits(b)) + _float(b["m"])


def _q8_0(b: np.ndarray) -> np.ndarray:
    """d * q, q of 8 signed bits."""
    return _float(b["d"]) * _float(b["quants"])


def _q4_k(b: np.ndarray) -> np.ndarray:
    """(d * scale) * q - (dmin * min), 8 groups of 32 elements, q of 4 bits."""
    q = halves_of_bytes(b["nibbles"], 32).reshape(-1, 8, 32)
    return _scaled_groups(b, q)


def _q5_k(b: np.ndarray) -> np.ndarray:
    """As Q4_K with a fifth bit: bit g of high byte j belongs to element j of group g."""
    low = halves_of_bytes(b["nibbles"], 32).reshape(-1, 8, 32)
    group = np.arange(8, dtype=np.uint8)[:, None]
    high = (b["high_bits"][:, None, :] >> group) & np.uint8(1)
    return _scaled_groups(b, low | (high << np.uint8(4)))


def _q6_k(b: np.ndarray) -> np.ndarray:
    """(d * scale) * (q - 32), 16 groups of 16 elements, q of 6 bits.

    Each half of the block (128 elements) has 64 bytes of low nibbles and 32 bytes of high bits:
    low nibbles of the 64 bytes come first, then the upper ones; high byte j holds, from its lowest
    bits up, the two bits of elements j, j + 32, j + 64 and j + 96.
    """
    low = halves_of_bytes(b["low_nibbles"], 64).reshape(-1, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (b["high_bits"].reshape(-1, 2, 1, 32) >> shift) & np.uint8(3)
    q = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scale = _float(b["d"]) * _float(b["scales"])
    return (scale[:, :, None] * _float(q.reshape(-1, 16, 16))).reshape(-1, 256)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    """d * q, q twice a 4-bit float, d = 2^(exponent - 128): half of the scale."""
    code = b["exponent"].astype(np.uint32)
    small, normal = np.uint32(0x00200000) << (code & 1), (code - 1) << np.uint32(23)
    d = np.where(code < 2, small, normal).view(np.float32)
    return d * _float(E2M1_DOUBLED[halves_of_bytes(b["nibbles"], 16)])


def _float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def halves_of_bytes(packed: np.ndarray, run: int) -> np.ndarray:
    """[n, bytes] -> [n, 2 * bytes]: per run of bytes, their low nibbles, then their high ones."""
    runs = packed.reshape(len(packed), -1, 1, run)
    shift = np.array([0, 4], np.uint8)[:, None]
    return ((runs >> shift) & np.uint8(0x0F)).reshape(len(packed), -1)


def _five_bits(b: np.ndarray) -> np.ndarray:
    """Q5_0 and Q5_1: bit j of `high_bits` is the fifth bit of element j."""
    high = (b["high_bits"] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return halves_of_bytes(b["nibbles"], 16) | (high.astype(np.uint8) << np.uint8(4))


def _scaled_groups(b: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K: q [n, 8, 32] with a scale and a minimum per group."""
    scales, mins = _six_bit_pairs(b["scales"])
    scale = _float(b["d"]) * _float(scales)
    minimum = _float(b["dmin"]) * _float(mins)
    return (scale[:, :, None] * _float(q) - minimum[:, :, None]).reshape(-1, 256)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, uint8 [n, 8] each.

    Groups 0..3: the low six bits of bytes 0..3 (scales) and 4..7 (minima). Groups 4..7: four low
    bits in the nibbles of bytes 8..11, their top two bits in bits 6..7 of bytes 0..3 and 4..7.
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    top_a, top_b = (a >> np.uint8(6)) << np.uint8(4), (b >> np.uint8(6)) << np.uint8(4)
    scales = np.concatenate([a & np.uint8(63), (c & np.uint8(15)) | top_a], axis=1)
    mins = np.concatenate([b & np.uint8(63), (c >> np.uint8(4)) | top_b], axis=1)
    return scales, mins


_UNPACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}

__all__ = [
    "E2M1_DOUBLED",
    "block_dtype",
    "dequantise",
    "dequantise_rows",
    "halves_of_bytes",
    "row_dtype",
]
