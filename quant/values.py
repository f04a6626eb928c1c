"""The values of a weight in any format: what every backend is held to, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from ..kernels.weights import CODEBOOKS, RawWeight
from . import gguf
from .fp4 import nvfp4_values
from .gguf import block_dtype, row_dtype
from .groups import i4_values, i8_values
from .integers import int4_values, int8_values
from .small_floats import codebook_values, fp8_128_values, fp8_values

# Each takes an array of the structured dtype of a row, or of a block.
_Values = Callable[[np.ndarray], np.ndarray]
_OF_ROWS: Mapping[str, _Values] = {
    "INT8": int8_values,
    "INT4": int4_values,
    "FP8": fp8_values,
    "NVFP4": nvfp4_values,
}
_OF_BLOCKS: Mapping[str, _Values] = {
    "FP8_128": fp8_128_values,
    **{name: partial(codebook_values, name) for name in CODEBOOKS},
    "I4G32": i4_values,
    "I4G128": i4_values,
    "I8G32": i8_values,
}


def dequantise(weight: RawWeight) -> np.ndarray:
    """The weight's values, a new float32 array of `weight.shape`.

    Errors: ValueError for a format that is not described in this folder.
    """
    name = weight.format.name
    if name in _OF_ROWS:
        values, unit = _OF_ROWS[name], row_dtype(weight.format, weight.shape[-1])
    elif name in _OF_BLOCKS:
        values, unit = _OF_BLOCKS[name], block_dtype(weight.format)
    else:
        return gguf.dequantise(weight)
    # An infinite or NaN scale is a value like any other here: it propagates.
    with np.errstate(all="ignore"):
        return values(weight.data.view(unit)).reshape(weight.shape)


__all__ = ["dequantise", "row_dtype"]
