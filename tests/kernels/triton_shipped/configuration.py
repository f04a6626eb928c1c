"""What a kernel is compiled as, and the types of what several kernels read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget

from engineroom.kernels.backend import KVSpec
from engineroom.kernels.triton.quantised import Layout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
TL = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


@dataclass(frozen=True)
class Configuration:
    """One kernel as a launcher would compile it."""

    name: str
    kernel: Any
    pointers: dict[str, str]  # parameter -> type; the scalars are i32 but for `floats`
    constants: dict[str, Any]
    options: dict[str, Any]
    unaligned: tuple[str, ...] = ()  # scalars that are not multiples of 16
    floats: tuple[str, ...] = ()
    expects: dict[str, tuple[str, ...]] = field(default_factory=dict)  # target -> instructions
    without: tuple[str, ...] = ()  # instructions that must not be there
    older: dict[str, Any] = field(default_factory=dict)  # options of targets other than sm_90
    targets: tuple[str, ...] = tuple(TARGETS)


def cache_types(
    kind: str, pointer: str, keys: str, values: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Types of a cache's pointers, whose tensors are named so, and its constants.

    kind: of KV_CODES, or nothing for floats of `pointer`.
    """
    types, constants = {}, {}
    for part, name, letter in zip(
        KVSpec(1, 1, 8, 1, kind).parts, (keys, values), "kv", strict=True
    ):
        types[f"{name}_ptr"] = "*i8" if part else pointer
        types[f"{letter}_scales_ptr"] = "*i16" if part == "int4" else "*fp32"
        constants[f"{letter.upper()}_CODES"] = part
    return types, constants


def code_types(layout: Layout, table: str) -> dict[str, str]:
    scale = "*fp16" if layout.scale_dtype == torch.float16 else "*fp32"
    return {
        "codes_ptr": "*i16" if layout.bits == 4 else "*u8",
        "scale_ptr": scale,
        "minimum_ptr": scale,
        "table_ptr": table if layout.table else scale,
    }


def label(after: str, paired: bool, norm: bool, ordered: bool = False, here: bool = False) -> str:
    words = [after, "in pairs" * paired, "of a norm" * norm, "act-order" * ordered]
    words.append("quantised in it" * here)
    return "".join(f" {word}" for word in words if word)
