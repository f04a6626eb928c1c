"""The values of a weight in any format: what every backend is held to, bit for bit."""

from __future__ import annotations

import numpy as np

from ..kernels.weights import RawWeight
from . import gguf
from .gguf import row_dtype
from .integers import int4_values, int8_values

_WITH_HEADER = {"INT8": int8_values, "INT4": int4_values}


def dequantise(weight: RawWeight) -> np.ndarray:
    """The weight's values, a new float32 array of `weight.shape`.

    Errors: ValueError for a format that is not described in this folder.
    """
    values = _WITH_HEADER.get(weight.format.name)
    if values is None:
        return gguf.dequantise(weight)
    rows = weight.data.view(row_dtype(weight.format, weight.shape[-1]))
    # An infinite or NaN scale is a value like any other here: it propagates.
    with np.errstate(all="ignore"):
        return values(rows).reshape(weight.shape)


__all__ = ["dequantise", "row_dtype"]
