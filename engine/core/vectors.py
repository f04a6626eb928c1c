"""Embeddings as they are handed out: cut to fewer dimensions, as numbers or as base64 of fp32."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence


def handed_out(unit: Sequence[float], dimensions: int, *, as_base64: bool) -> list[float] | str:
    """The first `dimensions` of a vector of unit length, at unit length again where that is fewer
    than all (OpenAI's own rule), in fp32."""
    values = list(unit)
    if dimensions < len(values):
        values = values[:dimensions]
        norm = math.sqrt(math.fsum(v * v for v in values)) or 1.0
        values = [v / norm for v in values]
    packed = struct.pack(f"<{len(values)}f", *values)
    if as_base64:
        return base64.b64encode(packed).decode()
    return list(struct.unpack(f"<{len(values)}f", packed))


__all__ = ["handed_out"]
