"""MXFP4 and NVFP4: 4-bit floats in groups, what they mean, and the checkpoints that have them.

A code is a float of a sign, 2 bits of exponent and 1 of significand (E2M1): 0, 0.5, 1, 1.5, 2, 3,
4, 6 and their negatives (OCP microscaling formats, version 1.0). Twice that is an integer: values
are d q, one rounding in float32, where q is that integer and d half of the scale.

MXFP4: a scale of 2^(exponent - 127) per 32 elements; as ggml reads it, 255 is no NaN but 2^128.
  gpt-oss: `NAME_blocks` uint8 [.., N, K / 32, 16], `NAME_scales` uint8 [.., N, K / 32] make NAME.
  compressed-tensors: `weight_packed` uint8 [N, K / 2], `weight_scale` uint8 [N, K / 32].
NVFP4: per 16 elements a scale in E4M3, here the half that it is, and a float of the whole tensor:
d = scale * factor / divisor, rounded after each, one of the two being that float and half in them.
  compressed-tensors: `weight_packed`, `weight_scale` F8_E4M3 [N, K / 16] and `weight_global_scale`,
  by which scales are divided. ModelOpt: `weight`, `weight_scale`, and `weight_scale_2`, by which
  they are multiplied.
The first of a pair of codes is in the low half of its byte.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..kernels.weights import MXFP4, NVFP4, RawWeight
from .fp8 import INPUT_SCALES, fp8_weight
from .gguf import E2M1_DOUBLED, block_dtype, row_dtype
from .groups import unpack_nibbles
from .parts import Layout, Options, Part, require_columns
from .small_floats import e4m3_values

_GROUP = 32
_SCALED = 16  # elements that share a scale of NVFP4
_E4M3 = e4m3_values()


def nvfp4_values(rows: np.ndarray) -> np.ndarray:
    """float32 [N, K] of rows [N] of `row_dtype(NVFP4, K)`."""
    blocks = rows["blocks"]
    nibbles = blocks["nibbles"].reshape(-1, _GROUP // 2)
    q = E2M1_DOUBLED[unpack_nibbles(nibbles)].astype(np.float32)
    scale = blocks["scale"].astype(np.float32).reshape(len(rows), -1)
    d = scale * rows["factor"] / rows["divisor"]
    return np.repeat(d, _SCALED, axis=1) * q.reshape(len(rows), -1)


def nvfp4_rows(
    scale: np.ndarray, nibbles: np.ndarray, factor: ArrayLike, divisor: ArrayLike = 1
) -> np.ndarray:
    """uint8 rows of NVFP4: scales [N, K / 16] that are halves, codes [N, K / 2], the first of a
    pair in the low half; factor one or [N]: twice what multiplies a code's own value."""
    rows = np.empty(len(scale), row_dtype(NVFP4, scale.shape[1] * _SCALED))
    rows["factor"][:, 0], rows["divisor"] = factor, divisor
    rows["blocks"]["scale"] = scale.reshape(len(rows), -1, 2)
    rows["blocks"]["nibbles"] = nibbles.reshape(len(rows), -1, _GROUP // 2)
    return rows.view(np.uint8)


def mxfp4_weight(name: str, codes: Part, scale: Part) -> RawWeight:
    """A weight of codes uint8 [.., N, K / 2], or those in groups [.., N, K / 32, 16].

    Errors: FormatError for types or shapes that do not fit.
    """
    codes.require_dtype("U8")
    scale.require_dtype("U8")
    if len(codes.shape) == len(scale.shape) + 1 and codes.shape[-1] == _GROUP // 2:
        rows, groups = codes.shape[:-2], codes.shape[-2]
    else:
        rows, groups = codes.shape[:-1], 2 * codes.shape[-1] // _GROUP
        require_columns(codes.name, 2 * codes.shape[-1], _GROUP)
    if not rows:
        codes.require_shape(0, 0)
    scale.require_shape(*rows, groups)

    def made(start: int, stop: int) -> np.ndarray:
        blocks = np.empty((stop - start) * groups, block_dtype(MXFP4))
        blocks["exponent"][:, 0] = scale.array().reshape(-1)[start * groups : stop * groups]
        here = codes.array().reshape(-1, _GROUP // 2)[start * groups : stop * groups]
        ascending = unpack_nibbles(here)
        blocks["nibbles"] = ascending[:, :16] | (ascending[:, 16:] << np.uint8(4))
        return blocks.view(np.uint8)

    return RawWeight(name, MXFP4, (*rows, groups * _GROUP), {}, make=made)


def nvfp4_weight(name: str, codes: Part, scale: Part, whole: Part, *, divides: bool) -> RawWeight:
    """A weight of codes uint8 [N, K / 2]; `whole` is the tensor's float, as `divides` says.

    Errors: FormatError for types or shapes that do not fit.
    """
    codes.require_dtype("U8")
    scale.require_dtype("F8_E4M3")
    codes.require_matrix()
    num_rows, columns = codes.shape[0], 2 * codes.shape[1]
    require_columns(codes.name, columns, _GROUP)
    scale.require_shape(num_rows, columns // _SCALED)
    if whole.shape not in ((), (1,)):
        whole.require_shape(1)
    factor = whole.floats().reshape(())

    def made(start: int, stop: int) -> np.ndarray:
        by: tuple[ArrayLike, ArrayLike] = (
            (0.5, factor) if divides else (factor * np.float32(0.5), 1)
        )
        return nvfp4_rows(_E4M3[scale.array()[start:stop]], codes.array()[start:stop], *by)

    return RawWeight(name, NVFP4, (num_rows, columns), {}, make=made)


class Mxfp4:
    """quant_method "mxfp4" (gpt-oss). Errors: FormatError for an option that is not known."""

    layouts = (Layout("blocks", {"blocks": "_blocks", "scales": "_scales"}, weight=""),)
    notes = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        options.finish(("modules_to_not_convert", "dequantize"))

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        return mxfp4_weight(module, parts["blocks"], parts["scales"])

    def is_spare(self, part: Part) -> bool:
        return False


class ModelOpt:
    """quant_method "modelopt": NVFP4, or FP8 with a scale a tensor. Its options stand in
    config.json, of older versions under other names in a file beside it.

    Errors: FormatError for another algorithm or an option that is not known.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str = "quantization_config",
        file: str = "config.json",
    ) -> None:
        options = Options(config, where, file)
        options.take("quant_method")
        self._is_four = options.one_of("quant_algo", ("NVFP4", "FP8")) == "NVFP4"
        groups = options.take("config_groups", {})
        size = _SCALED if self._is_four else None
        options.one_of("group_size", (size,), size)
        options.finish(
            ("ignore", "exclude_modules", "kv_cache_scheme", "kv_cache_quant_algo", "producer")
        )
        for name, group in groups.items() if isinstance(groups, dict) else ():
            self._check(group.get("weights") or {}, f"{where}.config_groups.{name}.weights")
        names = {"weight": ".weight", "scale": ".weight_scale"}
        names |= {"whole": ".weight_scale_2"} if self._is_four else {}
        self.layouts = (Layout("scale", names),)
        self.notes = ("its scales of activations are not used: activations= decides",)

    def _check(self, scheme: Mapping[str, Any], where: str) -> None:
        bits, size = (4, _SCALED) if self._is_four else (8, None)
        options = Options(scheme, where)
        options.one_of("num_bits", (bits,), bits)
        options.one_of("type", ("float",), "float")
        options.one_of("group_size", (size,), size)
        options.one_of("dynamic", (False,), False)
        options.finish(("strategy", "symmetric"))

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        codes, scale = parts["weight"], parts["scale"]
        if not self._is_four:
            return fp8_weight(module, codes, scale, None)
        return nvfp4_weight(f"{module}.weight", codes, scale, parts["whole"], divides=False)

    def is_spare(self, part: Part) -> bool:
        return INPUT_SCALES.fullmatch(part.name) is not None


__all__ = ["ModelOpt", "Mxfp4", "mxfp4_weight", "nvfp4_rows", "nvfp4_values", "nvfp4_weight"]
