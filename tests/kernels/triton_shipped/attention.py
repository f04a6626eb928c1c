"""Attention: walk, split and merge, over each kind of cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from engineroom.kernels.triton import attention
from engineroom.kernels.triton.numerics import OPTIONS

from .configuration import POINTERS, TARGETS, Configuration, cache_types


def _attention(
    shape: attention.Shape, block: int, codes: str = "", has_sinks: bool = False, **has: bool
) -> Iterator[Any]:
    dtype = shape.product
    pointer = POINTERS[dtype]
    flags: dict[str, Any] = {"HAS_CAP": False, "HAS_WINDOW": False, "HAS_SLOPES": False} | has
    cache, kinds = cache_types(codes, pointer, "k", "v")
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


def configurations() -> Iterator[Configuration]:
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
