"""Rows in the format that a backend holds them in, a tensor at a time: called as it packs."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..weights import RawWeight, WeightTooLarge
from . import _native


def as_packed(weight: RawWeight, threads: int) -> RawWeight:
    """The weight in the format it is to be packed in: itself, or its rows made or quantised anew.

    Errors: WeightTooLarge for a value that is a NaN, an infinity, or 2^120 and more.
    """
    weight = weight.made()
    if weight.pack_as is None:
        return weight
    data = np.empty(weight.packed_nbytes, np.uint8)
    columns = weight.shape[-1]
    row = _native.quantise(
        weight.format.name,
        weight.data.view(np.ndarray),
        weight.num_rows,
        columns,
        weight.pack_as.name,
        data,
        threads,
    )
    if row >= 0:
        raise WeightTooLarge(
            weight.name,
            f"tensor {weight.name!r}: row {row} holds a NaN, an infinity or 2^120 and more, which "
            f"{weight.pack_as.name} cannot; load it with quantization=None, or mend the checkpoint",
        )
    return dataclasses.replace(weight, format=weight.pack_as, buffers={"data": data}, pack_as=None)
