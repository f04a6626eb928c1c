"""FP8, FP8_128, NF4 and FP4: what bytes mean and how they are chosen: numpy, the specification.

A value is one float32 product, rounded once: a scale times a number that the code stands for.

FP8: a code is a float of 4 bits of exponent (bias 7) and 3 of significand, without infinities; 0x7f
and 0xff are NaN (the OCP 8-bit floating point specification's E4M3). FP8 has a scale per row,
FP8_128 one per 128 elements.
NF4, FP4: absmax * CODEBOOKS[name][code] per 64 elements; the high half of a byte comes first.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

import numpy as np

from ..kernels.weights import CODEBOOKS, FP8, NF4
from .gguf import block_dtype, row_dtype

_CODEBOOKS = {name: np.array(values, np.float32) for name, values in CODEBOOKS.items()}


def e4m3_values() -> np.ndarray:
    """float32 [256]: what each code of FP8 stands for."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    # An exponent of 0 stands for subnormals: as 1, without the leading one.
    size = np.ldexp(fraction + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -size, size).astype(np.float32)


_E4M3 = e4m3_values()


def fp8_values(rows: np.ndarray) -> np.ndarray:
    """float32 [N, K] of rows [N] of `row_dtype(FP8, K)`."""
    return rows["scale"] * _E4M3[rows["blocks"]["values"]].reshape(len(rows), -1)


def fp8_128_values(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 128] of blocks [n] of FP8_128."""
    return blocks["scale"] * _E4M3[blocks["values"]]


def codebook_values(name: str, blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 64] of blocks [n] of the format `name`, NF4 or FP4."""
    pairs = blocks["nibbles"][..., None] >> np.array([4, 0], np.uint8)
    return blocks["absmax"] * _CODEBOOKS[name][(pairs & np.uint8(15)).reshape(-1, 64)]


def quantise_fp8(values: np.ndarray) -> bytes:
    """Rows of FP8 from float32 values [N, K] below 2^120, K whole groups of 32.

    scale = the row's largest magnitude / 448; a code is the nearest to value / scale, ties to even.
    A row below 448 * 2^-126 becomes zeros.
    """
    rows = np.zeros(len(values), row_dtype(FP8, values.shape[1]))
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
    scale[scale < np.float32(2.0**-126)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(scale > 0, np.clip(values / scale, -448, 448), np.float32(0))
    rows["scale"] = scale
    codes = np.where((scale > 0) & np.signbit(values), 0x80, 0) | _nearest_e4m3(np.abs(y))
    rows["blocks"]["values"] = codes.astype(np.uint8).reshape(len(values), -1, FP8.block_elements)
    return rows.tobytes()


def _nearest_e4m3(size: np.ndarray) -> np.ndarray:
    """Codes of magnitudes up to 448: the 3 bits of significand that stay, or steps of 2^-9."""
    bits = size.view(np.uint32)
    bits = (bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    tiny = np.rint(size * np.float32(512)).astype(np.uint32)
    return np.where(size < np.float32(2.0**-6), tiny, bits - np.uint32(120 << 3))


def quantise_nf4(values: np.ndarray) -> bytes:
    """Rows of NF4 from float32 values [N, K] below 2^120, K whole groups of 64.

    The codes and absmax that bitsandbytes makes: the table's entry nearest to values / absmax, the
    lower where it lies in the middle.
    """
    groups = values.reshape(-1, NF4.block_elements)
    rows = np.zeros(len(groups), block_dtype(NF4))
    absmax = np.abs(groups).max(axis=1, keepdims=True)
    scaled = np.clip(groups * (np.float32(1) / np.maximum(absmax, np.float32(1e-38))), -1, 1)
    table = _CODEBOOKS[NF4.name]
    middles = (table[:-1] + table[1:]) / np.float32(2)
    code = np.searchsorted(middles, scaled).astype(np.uint8)
    rows["absmax"] = absmax
    rows["nibbles"] = code[:, 0::2] << np.uint8(4) | code[:, 1::2]
    return rows.tobytes()


__all__ = [
    "codebook_values",
    "e4m3_values",
    "fp8_128_values",
    "fp8_values",
    "quantise_fp8",
    "quantise_nf4",
]
