"""Folders of weights that were quantised on load: rows as the kernels' formats have them.

Per module one tensor, `weight_int8` (or of any other format's name): uint8 [N, bytes of a row], the
rows of that format (kernels/weights.py; quant/values.py knows what they mean).
config.json: quantization_config has quant_method "engineroom", `scheme`, the option that they were
made with, and `source`, the fingerprint of the checkpoint that they were made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.weights import FORMATS, Format, RawWeight
from .parts import FormatError, Layout, Options, Part

METHOD = "engineroom"
SUFFIXES: Mapping[str, Format] = {
    f"_{f.name.lower()}": f for f in FORMATS.values() if not f.is_float
}


class Own:
    """quant_method "engineroom". Errors: FormatError for an option that is not known."""

    layouts = tuple(Layout("rows", {"rows": f".weight{suffix}"}) for suffix in SUFFIXES)
    notes = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        options.finish(("scheme", "source"))

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        rows = parts["rows"]
        fmt = SUFFIXES[rows.name.removeprefix(f"{module}.weight")]
        rows.require_dtype("U8")
        rows.require_matrix()
        blocks, rest = divmod(rows.shape[1] - fmt.header_bytes, fmt.block_bytes)
        if rest or blocks < 1:
            raise FormatError(
                rows.name,
                f"tensor {rows.name!r}: {rows.shape[1]} bytes are no row of {fmt.name}, which are "
                f"{fmt.header_bytes} and whole blocks of {fmt.block_bytes}",
            )

        def made(start: int, stop: int) -> np.ndarray:
            return rows.data[start * rows.shape[1] : stop * rows.shape[1]]

        shape = (rows.shape[0], blocks * fmt.block_elements)
        return RawWeight(f"{module}.weight", fmt, shape, {}, make=made)

    def is_spare(self, part: Part) -> bool:
        return False


__all__ = ["METHOD", "SUFFIXES", "Own"]
