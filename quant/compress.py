"""Writing what compressed_tensors.py reads: the schemes that are made, their tensors, their config.

The names of the schemes are llm-compressor's presets; the layouts are described in
compressed_tensors.py. Every linear layer but the head is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rounding import Integers, Rounded, fp8_blocks, fp8_rows

Stored = tuple[str, tuple[int, ...], np.ndarray]  # safetensors' dtype, shape, data
_BLOCK = 128  # of FP8_BLOCK


@dataclass(frozen=True)
class Scheme:
    """One preset. `grid` of integers, with group size 0 where it is the caller's choice; None: FP8.

    `activations`: what other engines shall round inputs to; this one decides by its own option.
    """

    form: str
    grid: Integers | None
    activations: Mapping[str, Any] | None = None
    block: bool = False


_INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
_FP8_TOKEN = {**_INT8_TOKEN, "type": "float"}
SCHEMES: Mapping[str, Scheme] = {
    "W4A16": Scheme("pack-quantized", Integers(4, 0, True)),
    "W4A16_ASYM": Scheme("pack-quantized", Integers(4, 0, False)),
    "W8A16": Scheme("pack-quantized", Integers(8, -1, True)),
    "W8A8": Scheme("int-quantized", Integers(8, -1, True), {**_INT8_TOKEN, "dynamic": True}),
    "FP8_DYNAMIC": Scheme("float-quantized", None, {**_FP8_TOKEN, "dynamic": True}),
    "FP8_BLOCK": Scheme(
        "float-quantized",
        None,
        {**_FP8_TOKEN, "strategy": "group", "group_size": _BLOCK, "dynamic": True},
        block=True,
    ),
}


def layout(
    num_rows: int, columns: int, scheme: Scheme, grid: Integers | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors of one module, by suffix, before they are made."""
    whole: tuple[int, ...] = (num_rows, columns)
    if grid is None:
        scales: tuple[int, ...] = (num_rows, 1)
        if scheme.block:
            scales = (-(-num_rows // _BLOCK), -(-columns // _BLOCK))
        return {".weight": ("F8_E4M3", whole), ".weight_scale": ("BF16", scales)}
    groups = grid.groups(columns)
    found: dict[str, tuple[str, tuple[int, ...]]] = {".weight_scale": ("BF16", (num_rows, groups))}
    if scheme.form == "int-quantized":
        return found | {".weight": ("I8", whole)}
    per_word = 32 // grid.bits
    found[".weight_packed"] = ("I32", (num_rows, -(-columns // per_word)))
    found[".weight_shape"] = ("I64", (2,))
    if not grid.symmetric:
        found[".weight_zero_point"] = ("I32", (-(-num_rows // per_word), groups))
    return found


def integer_tensors(rounded: Rounded, grid: Integers, form: str) -> dict[str, Stored]:
    """The tensors of one module, by suffix."""
    num_rows, columns = rounded.q.shape
    made: dict[str, Stored] = {".weight_scale": _bfloat16(rounded.scale)}
    if form == "int-quantized":
        made[".weight"] = ("I8", rounded.q.shape, rounded.q)
        return made
    packed = pack_rows(rounded.q, grid.bits)
    made[".weight_packed"] = ("I32", packed.shape, packed)
    made[".weight_shape"] = ("I64", (2,), np.array([num_rows, columns], np.int64))
    if not grid.symmetric:
        zero = np.ascontiguousarray(pack_rows(rounded.zero.T, grid.bits).T)
        made[".weight_zero_point"] = ("I32", zero.shape, zero)
    return made


def fp8_tensors(values: np.ndarray, scheme: Scheme) -> dict[str, Stored]:
    """The same of an FP8 scheme, from float32 values [N, K]."""
    codes, scale = fp8_blocks(values, _BLOCK) if scheme.block else fp8_rows(values)
    return {".weight": ("F8_E4M3", codes.shape, codes), ".weight_scale": _bfloat16(scale)}


def pack_rows(q: np.ndarray, bits: int) -> np.ndarray:
    """int8 [n, K] of 4 or 8 bits -> int32 [n, ceil(K bits / 32)]: q + 2^(bits - 1), lowest first.

    The last word's missing integers are 0.
    """
    per_word = 32 // bits
    codes = q.view(np.uint8) + np.uint8(1 << (bits - 1))
    packed = np.zeros((len(q), -(-q.shape[1] // per_word)), np.uint32)
    for i in range(per_word):
        part = codes[:, i::per_word]
        packed[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(i * bits)
    return packed.view(np.int32)


def quantization_config(
    scheme: Scheme, grid: Integers | None, ignore: Sequence[str]
) -> dict[str, Any]:
    """config.json's quantization_config. `grid`: the scheme's with its group size settled."""
    weights: dict[str, Any] = {"dynamic": False, "observer": "minmax", "actorder": None}
    if grid is None:
        strategy = "block" if scheme.block else "channel"
        weights |= {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
        weights |= {"block_structure": [_BLOCK, _BLOCK]} if scheme.block else {}
    else:
        by_group = grid.group_size != -1
        weights |= {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric}
        weights |= {"strategy": "group" if by_group else "channel"}
        weights |= {"group_size": grid.group_size} if by_group else {}
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    group["input_activations"] = None if scheme.activations is None else dict(scheme.activations)
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _bfloat16(values: np.ndarray) -> Stored:
    """float32 that are bfloat16 numbers."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)
    return "BF16", values.shape, bits.astype(np.uint16)


__all__ = [
    "SCHEMES",
    "Scheme",
    "Stored",
    "fp8_tensors",
    "integer_tensors",
    "layout",
    "pack_rows",
    "quantization_config",
]
