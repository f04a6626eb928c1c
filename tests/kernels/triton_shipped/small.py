"""The small operations: elementwise, norms, rope, rows of tables, a layer's prepared input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engineroom.kernels.fuse import GATES
from engineroom.kernels.triton import elementwise, embedding, inputs, rms_norm, rope
from engineroom.kernels.triton.numerics import OPTIONS
from engineroom.kernels.triton.quantised import LAYOUTS, QuantisedMatrix

from .configuration import POINTERS, TL, Configuration, cache_types, code_types, label


def _of(dtype: str) -> Iterator[Configuration]:
    pointer = POINTERS[dtype]
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
            rms_norm.tile(size) | {"ADD": add, "ROUND": TL[dtype]},
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
        cache, kinds = cache_types(codes, pointer, "k_cache", "v_cache")
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
                **code_types(layout, "*fp32"),
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
            f"group sums {dtype}{label('', False, norm)}",
            inputs.sums_kernel,
            {"x_ptr": pointer, "sums_ptr": "*fp32", "normed_ptr": pointer, **scratch},
            {"PRODUCT": TL[dtype], "GROUP": 32, **inputs.SUMS_TILE, **shared},
            OPTIONS,
            ("num_groups", "num_tokens"),
            ("eps", "offset"),
        )
        for to, sums in (("int8", False), ("int8", True), ("fp8", False)):
            yield Configuration(
                f"activations {dtype} to {to}{' and sums' * sums}{label('', False, norm)}",
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


def configurations() -> Iterator[Configuration]:
    yield from _of("bfloat16")
    yield from _of("float32")
    yield Configuration(
        "fill_in",
        embedding.fill_in_kernel,
        {"id_ptr": "*i32", "sampled_ptr": "*i32"},
        {"BLOCK": embedding.BLOCK},
        OPTIONS,
        ("num_tokens",),
    )
