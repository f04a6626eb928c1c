"""FP8 checkpoints (DeepSeek, Qwen, Llama): E4M3 weights with a scale a tensor, a row or a block.

Per module: `weight` F8_E4M3 [N, K] and `weight_scale_inv` [ceil(N / 128), ceil(K / 128)], or
`weight_scale`, one number or [N, 1]. value = weight * scale (the name says what it is the inverse
of: what the values were multiplied by).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.weights import FP8, FP8_128, Format, RawWeight
from .gguf import block_dtype, row_dtype
from .parts import FormatError, Layout, Options, Part, require_columns

_BLOCK = 128
_IGNORED = ("modules_to_not_convert", "ignored_layers", "fmt", "dequantize")
_PER_TENSOR = ("weight_scale", "weight_scale_inv")
# Scales of activations and of the cache: neither is rounded to FP8 here.
INPUT_SCALES = re.compile(
    r".*\.(input_scale|input_global_scale|activation_scale|output_scale|input_zero_point|output_zero_point"
    r"|k_scale|v_scale|k_proj\.output_scale|v_proj\.output_scale)"
)


def fp8_weight(module: str, codes: Part, scale: Part, block: tuple[int, int] | None) -> RawWeight:
    """A weight of E4M3 codes [N, K] and its scales: of blocks, else one number or one a row.

    Errors: FormatError for types or shapes that do not fit.
    """
    codes.require_dtype("F8_E4M3")
    codes.require_matrix()
    num_rows, columns = codes.shape
    per_row = _row_scales(codes, scale) if block is None else _block_scales(codes, scale, block)

    def made(start: int, stop: int) -> np.ndarray:
        values = codes.array()[start:stop]
        if block is None:
            rows = np.empty(stop - start, row_dtype(FP8, columns))
            rows["scale"][:, 0] = per_row(start, stop)
            rows["blocks"]["values"] = values.reshape(stop - start, -1, FP8.block_elements)
            return rows.view(np.uint8)
        blocks = np.empty((stop - start, columns // _BLOCK), block_dtype(FP8_128))
        blocks["scale"][..., 0] = per_row(start, stop)
        blocks["values"] = values.reshape(*blocks.shape, _BLOCK)
        return blocks.reshape(-1).view(np.uint8)

    fmt: Format = FP8 if block is None else FP8_128
    require_columns(codes.name, columns, fmt.block_elements)
    return RawWeight(
        f"{module}.weight",
        fmt,
        (num_rows, columns),
        {},
        make=made,
    )


def _row_scales(codes: Part, scale: Part) -> Any:
    if scale.shape not in ((), (1,), (1, 1)):
        scale.require_shape(codes.shape[0], 1)
    scales = scale.floats

    def of_rows(start: int, stop: int) -> np.ndarray:
        return np.broadcast_to(scales().reshape(-1), codes.shape[:1])[start:stop]

    return of_rows


def _block_scales(codes: Part, scale: Part, block: tuple[int, int]) -> Any:
    height, width = block
    num_rows, columns = codes.shape
    scale.require_shape(-(-num_rows // height), -(-columns // width))
    scales = scale.floats

    def of_rows(start: int, stop: int) -> np.ndarray:
        wide = np.repeat(scales(), width // _BLOCK, axis=1)[:, : columns // _BLOCK]
        return wide[np.arange(start, stop) // height]

    return of_rows


def block_of(value: Any, where: str) -> tuple[int, int] | None:
    """A block's [rows, columns], columns whole multiples of 128. Errors: FormatError."""
    if value is None:
        return None
    sizes = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    if not sizes or value[0] < 1 or value[1] < 1 or value[1] % _BLOCK:
        raise FormatError(
            where,
            f"config.json: {where} is {value!r}; blocks of [rows, columns], columns whole "
            f"multiples of {_BLOCK}, are supported",
        )
    return value[0], value[1]


class Fp8:
    """quant_method "fp8". Errors: FormatError for an option that is not supported."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        scheme = options.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
        options.one_of("fmt", ("e4m3",), "e4m3")
        options.one_of("scale_fmt", ("float", "ue8m0"), "float")
        where = "quantization_config.weight_block_size"
        self._block = block_of(options.take("weight_block_size"), where)
        options.finish(_IGNORED)
        names = ("weight_scale_inv",) if self._block else _PER_TENSOR
        self.layouts = tuple(
            Layout("scale", {"weight": ".weight", "scale": f".{name}"}) for name in names
        )
        self.notes = (
            f"FP8 with {scheme} scales of activations: activations are not rounded to FP8 here",
        )

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        return fp8_weight(module, parts["weight"], parts["scale"], self._block)

    def is_spare(self, part: Part) -> bool:
        return INPUT_SCALES.fullmatch(part.name) is not None


__all__ = ["INPUT_SCALES", "Fp8", "block_of", "fp8_weight"]
