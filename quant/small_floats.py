"""FP8, FP8_128 and NF4: what their bytes mean, in readable numpy, the specification.

A value is one float32 product, rounded once: a scale times a number that the code stands for.

FP8: a code is a float of 4 bits of exponent (bias 7) and 3 of significand, without infinities; 0x7f
and 0xff are NaN (the OCP 8-bit floating point specification's E4M3). FP8 has a scale per row,
FP8_128 one per 128 elements.
NF4: absmax * NF4_CODEBOOK[code] per 64 elements; the high half of a byte comes first.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

import numpy as np

from ..kernels.weights import NF4_CODEBOOK

_CODEBOOK = np.array(NF4_CODEBOOK, np.float32)


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


def nf4_values(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 64] of blocks [n] of NF4."""
    pairs = blocks["nibbles"][..., None] >> np.array([4, 0], np.uint8)
    return blocks["absmax"] * _CODEBOOK[(pairs & np.uint8(15)).reshape(-1, 64)]


__all__ = ["e4m3_values", "fp8_128_values", "fp8_values", "nf4_values"]
