"""Compiles every kernel of the Triton backend ahead of time, without a GPU, and says what came out.

`python -m tests.kernels.triton_compile` prints one JSON object per line: what was compiled for
which target, its registers, stack, shared memory and instructions; --write writes docs/kernels.md.
Run it without TRITON_INTERPRET. The binaries are read with tools that the triton wheel carries.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engineroom.kernels.backend import KVSpec
from engineroom.kernels.fuse import GATES
from engineroom.kernels.triton import (
    attention,
    elementwise,
    embedding,
    expert_linear,
    experts,
    inputs,
    linear,
    rms_norm,
    rope,
    sampling,
    sampling_draw,
    sampling_edits,
    sampling_filters,
    sampling_logprobs,
)
from engineroom.kernels.triton.numerics import AMD, OPTIONS, next_power_of_two
from engineroom.kernels.triton.quantised import LAYOUTS, Layout, QuantisedMatrix
from engineroom.kernels.triton.sampling_rows import BAN, BIAS, CHUNK, HISTORY

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes of one program
COUNTED = ("HGMMA", "HMMA", "QGMMA", "IGMMA", "IMMA", "I2F", "LDGSTS", "MUFU.EX2", "LDL", "STL")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_TL = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


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


def _cache(
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


def _attention(
    shape: attention.Shape, block: int, codes: str = "", has_sinks: bool = False, **has: bool
) -> Iterator[Any]:
    dtype = shape.product
    pointer = _POINTERS[dtype]
    flags: dict[str, Any] = {"HAS_CAP": False, "HAS_WINDOW": False, "HAS_SLOPES": False} | has
    cache, kinds = _cache(codes, pointer, "k", "v")
    flags |= kinds
    shape = replace(shape, grouped="int4" in kinds.values())
    sinks = {"HAS_SINKS": has_sinks}
    heads = f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}"
    named = (f" {k.removeprefix('HAS_').lower()}" for k, v in (has | sinks).items() if v)
    more = (f" {codes}" if codes else "") + "".join(named)
    metadata = {"item_ptr": "*i32", "position_ptr": "*i32", "table_ptr": "*i32"}
    metadata |= {"slope_ptr": "*fp32", "sink_ptr": "*fp32"}
    converts = () if has.get("HAS_SLOPES") else ("I2F",)
    scratch = {"acc_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}
    plain = ("layer", "num_layers", "table_width", "window")
    tensor = {"sm_90": ("HGMMA",), "sm_80": ("HMMA",)} if dtype != "float32" else {}
    older = replace(shape, ahead=False)
    tiles: dict[int, list[str]] = {}  # rows -> targets
    for target in TARGETS:
        card = shape if target == "sm_90" else older
        for rows in {card.rows(wide) for wide in (False, target != "gfx942")}:
            tiles.setdefault(rows, []).append(target)
    for rows, targets in sorted(tiles.items()):
        yield Configuration(
            f"attention walk {dtype} {heads} page {block} rows {rows}{more}",
            attention.walk_kernel,
            {"q_ptr": pointer, "out_ptr": pointer, **cache, **metadata},
            attention.tile(shape, block, rows) | flags | sinks,
            attention.options(shape, flags["HAS_SLOPES"]),
            plain,
            ("scale", "cap"),
            tensor if shape.padded >= 64 else {},
            converts,
            older=attention.options(older, flags["HAS_SLOPES"]),
            targets=tuple(targets),
        )
    constants = attention.tile(shape, block, shape.rows(False))
    yield Configuration(
        f"attention split {dtype} {heads} page {block} rows {shape.rows(False)}{more}",
        attention.split_kernel,
        {"q_ptr": pointer, "pair_ptr": "*i32", **cache, **metadata, **scratch},
        constants | flags,
        attention.options(shape, flags["HAS_SLOPES"]),
        plain,
        ("scale", "cap"),
        tensor if shape.padded >= 64 else {},
        converts,
        older=attention.options(older, flags["HAS_SLOPES"]),
    )
    if not more or has_sinks:
        kept = ("KV_HEADS", "SHARED", "ROWS", "ITEM", "D", "D_PAD")
        yield Configuration(
            f"attention merge {dtype} {heads}{' sinks' if has_sinks else ''}",
            attention.merge_kernel,
            {"out_ptr": pointer, **metadata, **scratch},
            {name: constants[name] for name in kept} | sinks,
            OPTIONS,
        )


def _around(after: str, paired: bool, norm: bool, K: int) -> dict[str, Any]:
    """Constants of what stands before and behind a layer."""
    order = rms_norm.lanes(K if norm else 1)
    return {"AFTER": after, "PAIRED": paired, "NORM": norm, **order}


def _linear(
    dtype: str,
    tokens: int,
    after: str = "",
    K: int = 4096,
    *,
    paired: bool = False,
    norm: bool = False,
) -> Configuration:
    pointer = _POINTERS[dtype]
    product = getattr(torch, dtype)
    tensor = {"sm_90": ("HGMMA",), "sm_80": ("HMMA",)} if dtype != "float32" else {}
    return Configuration(
        f"linear {dtype} tokens {tokens} K {K}{_label(after, paired, norm)}",
        linear.float_kernel,
        {
            "x_ptr": pointer,
            "w_ptr": pointer,
            "norm_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "other_ptr": pointer,
            "out_ptr": pointer,
        },
        {"HAS_BIAS": True, "ROUND": _TL[dtype], "PRODUCT": _TL[dtype]}
        | _around(after, paired, norm, K)
        | linear.float_tile(K, tokens, product),
        linear.float_options(product),
        ("num_tokens",),
        ("eps", "offset"),
        tensor,
        targets=_targets(tokens),
    )


def _label(after: str, paired: bool, norm: bool, ordered: bool = False, here: bool = False) -> str:
    words = [after, "in pairs" * paired, "of a norm" * norm, "act-order" * ordered]
    words.append("quantised in it" * here)
    return "".join(f" {word}" for word in words if word)


def _quantised(
    fmt: str,
    dtype: str,
    tokens: int,
    K: int = 4096,
    activations: str = "",
    *,
    after: str = "",
    norm: bool = False,
    ordered: bool = False,
    here: bool = False,
) -> Configuration:
    """after: a gate whose rows lie in turns with the layer's; here: its programs quantise x."""
    pointer = _POINTERS[dtype]
    layout = LAYOUTS[fmt]
    empty = torch.empty(0)
    minimum = empty if layout.minimum else None
    columns = empty if ordered else None
    weight = QuantisedMatrix(
        (4096, K), layout, empty, empty, minimum, activations, columns, paired=bool(after)
    )
    if not activations:
        here = not linear.is_prepared(weight, tokens, getattr(torch, dtype))
    tensor = {
        "int8": {"sm_90": ("IGMMA",), "sm_80": ("IMMA",)},
        "fp8": {"sm_90": ("QGMMA",)},
        "": {"sm_90": ("HGMMA",), "sm_80": ("HMMA",)} if dtype != "float32" else {},
    }[activations]
    # A row that has one scale is converted once, at its end.
    whole_row = layout.per_row and activations == "int8"
    return Configuration(
        f"linear {fmt} {activations or dtype} tokens {tokens} K {K}"
        + _label(after, bool(after), norm, ordered, here and bool(activations)),
        linear.quantised_kernel,
        {
            "x_ptr": {"int8": "*i8", "fp8": "*u8", "": pointer}["" if here else activations],
            **_codes(layout, pointer),
            "scratch_ptr": "*fp32",
            "columns_ptr": "*i32",
            "norm_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "other_ptr": pointer,
            "out_ptr": pointer,
        },
        {
            "HAS_BIAS": False,
            "ROUND": _TL[dtype],
            "PRODUCT": linear.product_of(weight, getattr(torch, dtype)),
            "ORDERED": ordered,
            **(linear.inputs_here(weight) if here else linear.INPUTS_BEFORE),
        }
        | _around(after, bool(after), norm, K)
        | linear.quantised_tile(weight, tokens, prepared=not here),
        linear.quantised_options(weight, tokens, prepared=not here),
        ("num_tokens",),
        ("eps", "offset"),
        tensor,
        () if whole_row or norm else ("I2F",),  # the length of a normed row is converted once
        targets=tuple(t for t in _targets(tokens) if activations != "fp8" or t == "sm_90"),
    )


def _codes(layout: Layout, table: str) -> dict[str, str]:
    scale = "*fp16" if layout.scale_dtype == torch.float16 else "*fp32"
    return {
        "codes_ptr": "*i16" if layout.bits == 4 else "*u8",
        "scale_ptr": scale,
        "minimum_ptr": scale,
        "table_ptr": table if layout.table else scale,
    }


def _targets(tokens: int) -> tuple[str, ...]:
    """The targets whose launchers take tiles of so many tokens."""
    return tuple(t for t in TARGETS if tokens <= linear.most_tokens(amd=t == "gfx942"))


def _small(dtype: str) -> Iterator[Configuration]:
    pointer = _POINTERS[dtype]
    for op in ("add", "scale", "softcap", "sigmoid_scale", *GATES):
        yield Configuration(
            f"{op} {dtype}",
            elementwise.map_kernel,
            {"a_ptr": pointer, "b_ptr": pointer, "out_ptr": pointer},
            {"OP": op, "BLOCK": elementwise.BLOCK},
            OPTIONS,
            (),
            ("parameter",),
        )
    for size, add in ((128, False), (4096, False), (8192, False), (2304, True)):
        yield Configuration(
            f"rms_norm {dtype} {size}{' then add' * add}",
            rms_norm.rms_norm_kernel,
            {"x_ptr": pointer, "weight_ptr": "*fp32", "other_ptr": pointer, "out_ptr": pointer},
            rms_norm.tile(size) | {"ADD": add, "ROUND": _TL[dtype]},
            OPTIONS,
            (),
            ("eps", "offset"),
        )
    rotated = ("q_ptr", "k_ptr", "v_ptr", "q_out_ptr")
    read = {"table_ptr": "*fp32", "slot_ptr": "*i32"}
    read |= {"q_norm_ptr": "*fp32", "k_norm_ptr": "*fp32"}
    for heads, kv_heads, rotate, codes, norm in (
        (32, 8, True, "", False),
        (32, 8, True, "", True),
        (32, 8, True, "int8", False),
        (32, 8, True, "fp8", False),
        (32, 8, True, "fp8", True),
        (32, 8, True, "k8v4", False),
        (32, 8, True, "int4", True),
        (32, 0, False, "", False),
        (0, 8, False, "", False),
    ):
        more = (" " + codes if codes else "") + " with norms" * norm
        cache, kinds = _cache(codes, pointer, "k_cache", "v_cache")
        yield Configuration(
            f"rope {dtype} {heads}+{kv_heads} heads of 128{more}",
            rope.rope_kernel,
            dict.fromkeys(rotated, pointer) | read | cache,
            kinds
            | {
                "Q_NORM": norm,
                "K_NORM": norm,
                "Q_HEADS": heads,
                "KV_HEADS": kv_heads,
                "ROTATE_K": rotate,
                "BLOCK_SIZE": 16,
                "INTERLEAVED": False,
            }
            | rope.tile(128, 64 if heads else 0, max(heads, kv_heads), bool(codes)),
            OPTIONS,
            ("layer", "num_layers"),
            ("q_eps", "q_offset", "k_eps", "k_offset"),
            without=("I2F",),
        )
    yield Configuration(
        f"select_rows {dtype}",
        embedding.rows_kernel,
        {"x_ptr": pointer, "index_ptr": "*i32", "out_ptr": pointer},
        {"BLOCK": embedding.BLOCK},
        OPTIONS,
    )
    for fmt in ("Q4_0", "Q6_K", "INT8", "FP8", "NF4"):
        layout, empty = LAYOUTS[fmt], torch.empty(0)
        yield Configuration(
            f"embedding {fmt} {dtype}",
            embedding.quantised_rows_kernel,
            {
                **_codes(layout, "*fp32"),
                "table_ptr": "*fp32",
                "index_ptr": "*i32",
                "out_ptr": pointer,
            },
            embedding.constants(QuantisedMatrix((0, 0), layout, empty, empty, None)),
            OPTIONS,
        )
    scratch = {"scratch_ptr": "*fp32", "columns_ptr": "*i32", "norm_ptr": "*fp32"}
    for norm in (False, True):
        shared = {"ORDERED": False, "NORM": norm, **rms_norm.lanes(4096)}
        yield Configuration(
            f"group sums {dtype}{_label('', False, norm)}",
            inputs.sums_kernel,
            {"x_ptr": pointer, "sums_ptr": "*fp32", "normed_ptr": pointer, **scratch},
            {"PRODUCT": _TL[dtype], "GROUP": 32, **inputs.SUMS_TILE, **shared},
            OPTIONS,
            ("num_groups", "num_tokens"),
            ("eps", "offset"),
        )
        for to, sums in (("int8", False), ("int8", True), ("fp8", False)):
            yield Configuration(
                f"activations {dtype} to {to}{' and sums' * sums}{_label('', False, norm)}",
                inputs.activations_kernel,
                {"x_ptr": pointer, "codes_ptr": "*i8" if to == "int8" else "*u8", **scratch},
                {
                    "TO": to,
                    "GROUP": 32,
                    "BLOCK": inputs.ACTIVATIONS_BLOCK,
                    "HAS_SUMS": sums,
                    **shared,
                },
                OPTIONS,
                (),
                ("eps", "offset"),
            )


def _experts(dtype: str, E: int, top_k: int) -> Iterator[Configuration]:
    """Routing, and the products of floats; those of quantised weights share their loop."""
    pointer, block = _POINTERS[dtype], {"BLOCK": next_power_of_two(E)}
    named = f"{dtype} {top_k} of {E}"
    routed = {f"{name}_ptr": "*i32" for name in ("counts", "starts", "ends", "pairs")}
    of_row = {"logits_ptr": pointer, "experts_ptr": "*fp32"}
    yield Configuration(
        f"experts top {named}",
        experts.top_kernel,
        {"logits_ptr": pointer, "out_ptr": "*fp32"},
        block,
        OPTIONS,
        ("out_stride", "E", "top_k"),
    )
    for renormalise in (True, False):
        yield Configuration(
            f"experts weights {named}{' renormalised' if renormalise else ''}",
            experts.weights_kernel,
            {**of_row, "out_ptr": pointer},
            {"RENORMALISE": renormalise, "PLACES": next_power_of_two(top_k), **block},
            OPTIONS,
            ("experts_stride", "out_stride", "E", "top_k"),
        )
    yield Configuration(
        f"experts sum {named}",
        experts.sum_kernel,
        {"x_ptr": pointer, "weights_ptr": pointer, "out_ptr": pointer},
        {"BLOCK": elementwise.BLOCK},
        OPTIONS,
        ("weights_stride", "top_k"),
    )
    sorted_by = {"experts_ptr": "*fp32", **routed}
    of_pairs = ("num_pairs", "top_k", "experts_stride", "E")
    yield Configuration(
        f"experts count {named}",
        experts.count_kernel,
        {name: sorted_by[name] for name in ("experts_ptr", "counts_ptr")},
        {"PAIRS": experts.PAIRS},
        OPTIONS,
        of_pairs,
    )
    yield Configuration(
        f"experts list {named}",
        experts.list_kernel,
        sorted_by,
        {
            "PAIRS": experts.PAIRS,
            "NARROWEST": linear.TOKENS[0],
            "WIDTHS": len(linear.TOKENS),
            **block,
        },
        OPTIONS,
        of_pairs,
    )


def _expert_linear(of: Configuration, E: int, *, biases: bool = False) -> Configuration:
    """The layer `of` with its rows gathered by expert."""
    routed = {f"{name}_ptr": "*i32" for name in ("counts", "starts", "ends", "pairs")}
    quantised = of.kernel is linear.quantised_kernel
    before = ("HAS_BIAS", "NORM", "CHUNK", "LEVELS", "CODED", "SUMMED", "BLOCK")
    return replace(
        of,
        name=f"experts {of.name} of {E}{' with biases' if biases else ''}",
        kernel=expert_linear.quantised_kernel if quantised else expert_linear.float_kernel,
        pointers={k: v for k, v in of.pointers.items() if k != "norm_ptr"} | routed,
        constants={k: v for k, v in of.constants.items() if k not in before}
        | {"BLOCK": next_power_of_two(E), "HAS_BIAS": biases},
        unaligned=("E", "share"),
        floats=(),
        without=(),  # a pair's division by `share` converts once
    )


def _sampling(vocab: int) -> Iterator[Configuration]:
    """The kernels of sampling, which know a vocabulary by its number of chunks."""
    chunks = next_power_of_two(triton.cdiv(vocab, CHUNK))
    integers = ("rows", "mask", "ids", "tokens", "logprobs", "ranks", "top_ids", "top_logprobs")
    types = {f"{name}_ptr": "*i32" for name in integers}
    types |= {f"{name}_ptr": "*fp32" for name in ("x", "work", "z", "out")}
    types |= {"found_ptr": "*i64", "tops_ptr": "*i64"}
    row, part = (
        {"BLOCK": sampling.BLOCK, "CHUNKS": chunks},
        {"CHUNK": CHUNK, "CHUNKS": chunks},
    )

    def made(name: str, kernel: Any, constants: dict[str, Any], **more: str) -> Configuration:
        of_row = "BLOCK" in constants
        return Configuration(
            f"sampling {name}",
            kernel,
            {k: v for k, v in (types | more).items() if k in kernel.arg_names},
            constants,
            sampling.ROW_OPTIONS if of_row else OPTIONS,
            ("width", "chunks"),
        )

    yield made("largest", sampling_draw.largest_kernel, {"CHUNK": CHUNK})
    yield made(f"draw V {vocab}", sampling_draw.draw_kernel, part)
    yield made(f"finish V {vocab}", sampling_draw.finish_kernel, {"CHUNKS": chunks})
    yield made("copy", sampling_edits.copy_kernel, {"CHUNK": CHUNK})
    for name, stage in (("bias", BIAS), ("ban", BAN), ("history", HISTORY)):
        constants = {"STAGE": stage.value, "ENTRIES": sampling_edits.ENTRIES}
        values = "*fp32" if name == "bias" else "*i32"
        yield made(name, sampling_edits.edit_kernel, constants, values_ptr=values)
    yield made(f"sigma V {vocab}", sampling_filters.sigma_kernel, row)
    yield made(f"count V {vocab}", sampling_filters.count_kernel, part)
    yield made(f"list V {vocab}", sampling_filters.list_kernel, part)
    yield made(f"filter V {vocab}", sampling_filters.filter_kernel, row)
    yield made(f"weigh V {vocab}", sampling_logprobs.weigh_kernel, part)
    yield made("top", sampling_logprobs.top_kernel, {"CHUNK": CHUNK})
    yield made(f"logprobs V {vocab}", sampling_logprobs.logprobs_kernel, row)
    yield made(f"log_softmax V {vocab}", sampling_logprobs.log_softmax_kernel, part)


def configurations() -> Iterator[Configuration]:
    """Every kernel at the tiles that the launchers choose for common models."""
    shape = partial(attention.Shape, ahead=True)
    for dtype in ("bfloat16", "float16"):
        yield from _attention(shape(32, 8, 128, dtype), 16)
    yield from list(_attention(shape(32, 8, 128, "bfloat16"), 64))[:-1]  # but for the merge
    yield from _attention(shape(9, 3, 64, "bfloat16"), 16)
    yield from _attention(shape(32, 32, 96, "bfloat16"), 16)
    yield from _attention(shape(32, 32, 80, "bfloat16"), 16)
    yield from _attention(shape(8, 4, 256, "bfloat16"), 16, HAS_CAP=True, HAS_WINDOW=True)
    yield from _attention(shape(64, 4, 128, "bfloat16"), 128, HAS_WINDOW=True)
    for dtype, codes in (("bfloat16", "int8"), ("bfloat16", "fp8"), ("float16", "int8")):
        yield from _attention(shape(32, 8, 128, dtype), 16, codes)
    yield from _attention(shape(32, 8, 128, "bfloat16"), 64, "int8")
    yield from _attention(shape(9, 3, 64, "bfloat16"), 16, "int8")
    yield from _attention(shape(32, 32, 96, "bfloat16"), 16, "fp8")
    yield from _attention(shape(8, 4, 256, "bfloat16"), 16, "int8")
    yield from _attention(shape(32, 8, 128, "float32"), 16, "int8")
    yield from _attention(shape(32, 8, 128, "float32"), 16, "fp8")
    for codes in ("k8v4", "int4"):
        yield from _attention(shape(32, 8, 128, "bfloat16"), 16, codes)
    yield from _attention(shape(9, 3, 64, "float16"), 64, "k8v4")
    yield from _attention(shape(32, 32, 80, "bfloat16"), 16, "int4")
    yield from _attention(shape(8, 4, 256, "bfloat16"), 16, "k8v4")
    yield from _attention(shape(32, 8, 128, "float32"), 16, "int4")
    yield from _attention(shape(32, 32, 128, "bfloat16"), 16, HAS_SLOPES=True)
    yield from _attention(shape(64, 8, 64, "bfloat16"), 16, has_sinks=True, HAS_WINDOW=True)
    yield from _attention(shape(32, 8, 128, "float32"), 16)
    yield from _attention(shape(8, 4, 8, "float32"), 16)
    yield from _attention(shape(8, 4, 256, "float32"), 16)
    for dtype in ("bfloat16", "float16"):
        for tokens in linear.TOKENS:
            yield _linear(dtype, tokens)
    yield _linear("bfloat16", 16, "add")
    yield _linear("bfloat16", 128, "silu_mul")
    for dtype in ("bfloat16", "float16", "float32"):
        yield _linear(dtype, 16, norm=True)
        yield _linear(dtype, 16, "silu_mul", paired=True, norm=True)
    for tokens in linear.TOKENS[1:]:
        yield _linear("bfloat16", tokens, "silu_mul", paired=True)
    yield _linear("bfloat16", 16, K=4864 + 32, norm=True)
    yield _linear("bfloat16", 16, K=4864 + 32)  # not whole steps
    yield _linear("float32", 16)
    yield _linear("float32", 128)
    for fmt, layout in LAYOUTS.items():
        several = {
            "Q4_0": linear.TOKENS,
            "Q8_0": linear.TOKENS,
            "NF4": (16, 32),
            "I4G128": (16, 32),
        }
        for tokens in several.get(fmt, (16, 128)):
            yield _quantised(fmt, "bfloat16", tokens)
        for activations in filter(layout.multiplies, ("int8", "fp8")):
            widths = linear.TOKENS if fmt in ("INT8", "FP8") else (16, 128)
            for tokens in (16, 32) if layout.minimum else widths:
                yield _quantised(fmt, "bfloat16", tokens, activations=activations)
    for fmt in ("Q4_0", "FP8", "NF4"):
        yield _quantised(fmt, "float16", 16)
    for fmt, layout in LAYOUTS.items():
        for tokens in (16, 32) if layout.has_long_planes else (16, 128):
            yield _quantised(fmt, "bfloat16", tokens, after="silu_mul", norm=tokens == 16)
    for tokens in (16, 128):
        yield _quantised("INT8", "bfloat16", tokens, activations="int8", after="silu_mul")
        yield _quantised("FP8", "bfloat16", tokens, activations="fp8", after="silu_mul")
    for fmt, activations in (("INT8", "int8"), ("Q4_0", "int8"), ("Q4_K", "int8"), ("FP8", "fp8")):
        for after, norm in (("", False), ("silu_mul", True)):
            yield _quantised(
                fmt, "bfloat16", 16, activations=activations, after=after, norm=norm, here=True
            )
    yield _quantised("I4G128", "bfloat16", 16, ordered=True)
    for fmt in ("I4G32", "I8G32"):
        yield _quantised(fmt, "bfloat16", 32, ordered=True)
    yield _quantised("Q4_0", "bfloat16", 16, K=576)
    yield _quantised("Q4_1", "float32", 16)
    for layer in (
        *(_linear("bfloat16", tokens) for tokens in linear.TOKENS[:3]),
        _linear("bfloat16", 64, "silu_mul"),
        *(_linear("bfloat16", tokens, "silu_mul", paired=True) for tokens in (16, 64)),
        _linear("float16", 16),
        _linear("float32", 16),
        *(_quantised(fmt, "bfloat16", 16) for fmt in LAYOUTS),
        *(_quantised(fmt, "bfloat16", 128) for fmt in ("Q4_0", "Q8_0", "INT8")),
        *(_quantised(fmt, "bfloat16", 32) for fmt in ("Q4_1", "Q4_K", "Q5_1")),
        *(_quantised("INT8", "bfloat16", tokens, activations="int8") for tokens in (16, 128)),
        _quantised("FP8", "bfloat16", 128, activations="fp8"),
        *(_quantised(fmt, "bfloat16", 16, after="silu_mul") for fmt in ("Q4_0", "Q4_K", "FP8")),
        _quantised("Q4_0", "bfloat16", 128, after="silu_mul"),
        _quantised("Q4_K", "bfloat16", 32, after="silu_mul"),
    ):
        yield _expert_linear(layer, 128)
    for after, tokens in (("clamped_silu_mul", 16), ("clamped_silu_mul", 128), ("", 16)):
        layer = _quantised("MXFP4", "bfloat16", tokens, K=2880, after=after)
        yield _expert_linear(layer, 32, biases=True)
    yield from _experts("bfloat16", 128, 8)
    yield from _experts("float32", 8, 2)
    yield from _small("bfloat16")
    yield from _small("float32")
    yield Configuration(
        "fill_in",
        embedding.fill_in_kernel,
        {"id_ptr": "*i32", "sampled_ptr": "*i32"},
        {"BLOCK": embedding.BLOCK},
        OPTIONS,
        ("num_tokens",),
    )
    yield from _sampling(131072)


def compiled(configuration: Configuration, target: str) -> dict[str, Any]:
    """Compile and read the binary."""
    parameters = list(configuration.kernel.arg_names)
    signature: dict[str, str] = {}
    for name in parameters:
        if name in configuration.constants:
            signature[name] = "constexpr"
        elif name in configuration.pointers:
            signature[name] = configuration.pointers[name]
        else:
            signature[name] = "fp32" if name in configuration.floats else "i32"
    constants = {(parameters.index(k),): v for k, v in configuration.constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(parameters)
        if signature[name] not in ("constexpr", "fp32") and name not in configuration.unaligned
    }
    source = ASTSource(configuration.kernel, signature, constants, attributes)
    options = configuration.options | (configuration.older if target != "sm_90" else {})
    if target == "gfx942":
        options |= AMD
    made = triton.compile(source, target=TARGETS[target], options=options)
    found: dict[str, Any] = {
        "name": configuration.name,
        "target": target,
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "expects": list(configuration.expects.get(target, ())),
        "without": list(configuration.without),
        "sums": _sums(made.asm["ttgir"]),
    }
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = _output("cuobjdump", "--dump-resource-usage", file.name)
            code = _output("nvdisasm", file.name)
        numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert numbers is not None, usage
        found["registers"], found["stack"] = int(numbers[1]), int(numbers[2])
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M))
        found |= {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in COUNTED}
    else:
        code = made.asm["amdgcn"]
        found["registers"] = int(_last(r"\.vgpr_count:\s+(\d+)", code))
        found["stack"] = int(_last(r"\.private_segment_fixed_size:\s*(\d+)", code))
        found["instructions"] = len(re.findall(r"^\t[a-z]\w+", code, re.M))
        found["MFMA"] = code.count("v_mfma")
    return found


def _sums(ttgir: str) -> list[str]:
    """Layouts that are summed over, or searched for a maximum, along the first of two axes: how
    keys are laid out among threads, and so the order of the sum. The width is left out."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.M))
    reduced = re.findall(
        r"tt\.reduce.*?axis = 0.*?\}\) : \(tensor<(\d+)x\d+xf32, (#\w+)>", ttgir, re.S
    )
    found = set()
    for keys, name in reduced:
        layout = re.sub(r"instrShape = \[(\d+), \d+", r"instrShape = [\1, any", layouts[name])
        found.add(f"{keys} keys in {layout}")
    return sorted(found)


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _last(pattern: str, text: str) -> str:
    return re.findall(pattern, text)[-1]


_PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
_BLOCK = re.compile(r"(<!-- compiled -->\n).*?(<!-- end -->)", re.DOTALL)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/kernels.md with its table written anew; a kernel that no row is of keeps its line."""
    before = _PAGE.read_text("utf-8")
    header = ["kernel", *(f"{t}: registers, shared" for t in TARGETS), "sm_90 instructions"]
    lines = ["| " + " | ".join(header) + " |\n", "| " + " | ".join("---" for _ in header) + " |\n"]
    found = _BLOCK.search(before)
    assert found is not None
    old = {line.split(" | ")[0].removeprefix("| "): line for line in found[0].splitlines(True)}
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["target"]] = row
    for name in dict.fromkeys(configuration.name for configuration in configurations()):
        if name not in by_name:
            lines += [old[name]] if name in old else []
            continue
        made, cells = by_name[name], [name]
        for target in TARGETS:
            row = made.get(target)
            stack = f", stack {row['stack']}" if row and row["stack"] else ""
            cells.append(f"{row['registers']}, {row['shared']:,}{stack}" if row else "")
        row = made.get("sm_90")
        shown = ("HGMMA", "QGMMA", "IGMMA", "MUFU.EX2", "I2F")
        counts = [f"{row[n]} {n}" for n in shown if row[n]] if row else []
        cells.append("; ".join([f"{row['instructions']:,}", *counts]) if row else "")
        lines.append("| " + " | ".join(cells) + " |\n")
    return _BLOCK.sub(lambda m: m[1] + "".join(lines) + m[2], before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="names that contain one of these")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write what was compiled to the page")
    options = parser.parse_args()
    jobs = [
        (configuration, target)
        for configuration in configurations()
        if any(text in configuration.name for text in options.only)
        for target in options.targets
        if target in configuration.targets
    ]

    def job(pair: tuple[Configuration, str]) -> dict[str, Any]:
        try:
            return compiled(*pair)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return {"name": pair[0].name, "target": pair[1], "error": text[-600:]}

    rows = []
    with ThreadPoolExecutor(options.threads) as pool:
        for row in pool.map(job, jobs):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.write:
        _PAGE.write_text(page(rows), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
