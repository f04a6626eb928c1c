"""Linear layers: in floats, and in each quantised format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engineroom.kernels.triton import linear, rms_norm
from engineroom.kernels.triton.quantised import LAYOUTS, QuantisedMatrix

from .configuration import POINTERS, TARGETS, TL, Configuration, code_types, label


def _around(after: str, paired: bool, norm: bool, K: int) -> dict[str, Any]:
    """Constants of what stands before and behind a layer."""
    order = rms_norm.lanes(K if norm else 1)
    return {"AFTER": after, "PAIRED": paired, "NORM": norm, **order}


def _wide_enough(tokens: int) -> tuple[str, ...]:
    """The targets whose launchers take tiles of so many tokens."""
    return tuple(t for t in TARGETS if tokens <= linear.most_tokens(amd=t == "gfx942"))


def in_floats(
    dtype: str,
    tokens: int,
    after: str = "",
    K: int = 4096,
    *,
    paired: bool = False,
    norm: bool = False,
) -> Configuration:
    pointer = POINTERS[dtype]
    product = getattr(torch, dtype)
    tensor = {"sm_90": ("HGMMA",), "sm_80": ("HMMA",)} if dtype != "float32" else {}
    return Configuration(
        f"linear {dtype} tokens {tokens} K {K}{label(after, paired, norm)}",
        linear.float_kernel,
        {
            "x_ptr": pointer,
            "w_ptr": pointer,
            "norm_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "other_ptr": pointer,
            "out_ptr": pointer,
        },
        {"HAS_BIAS": True, "ROUND": TL[dtype], "PRODUCT": TL[dtype]}
        | _around(after, paired, norm, K)
        | linear.float_tile(K, tokens, product),
        linear.float_options(product),
        ("num_tokens",),
        ("eps", "offset"),
        tensor,
        targets=_wide_enough(tokens),
    )


def in_codes(
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
    pointer = POINTERS[dtype]
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
        + label(after, bool(after), norm, ordered, here and bool(activations)),
        linear.quantised_kernel,
        {
            "x_ptr": {"int8": "*i8", "fp8": "*u8", "": pointer}["" if here else activations],
            **code_types(layout, pointer),
            "scratch_ptr": "*fp32",
            "columns_ptr": "*i32",
            "norm_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "other_ptr": pointer,
            "out_ptr": pointer,
        },
        {
            "HAS_BIAS": False,
            "ROUND": TL[dtype],
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
        targets=tuple(t for t in _wide_enough(tokens) if activations != "fp8" or t == "sm_90"),
    )


def configurations() -> Iterator[Configuration]:
    for dtype in ("bfloat16", "float16"):
        for tokens in linear.TOKENS:
            yield in_floats(dtype, tokens)
    yield in_floats("bfloat16", 16, "add")
    yield in_floats("bfloat16", 128, "silu_mul")
    for dtype in ("bfloat16", "float16", "float32"):
        yield in_floats(dtype, 16, norm=True)
        yield in_floats(dtype, 16, "silu_mul", paired=True, norm=True)
    for tokens in linear.TOKENS[1:]:
        yield in_floats("bfloat16", tokens, "silu_mul", paired=True)
    yield in_floats("bfloat16", 16, K=4864 + 32, norm=True)
    yield in_floats("bfloat16", 16, K=4864 + 32)  # not whole steps
    yield in_floats("float32", 16)
    yield in_floats("float32", 128)
    for fmt, layout in LAYOUTS.items():
        several = (16, 32) if layout.has_long_planes else (16, 128)
        for tokens in linear.TOKENS if fmt in ("Q4_0", "Q8_0") else several:
            yield in_codes(fmt, "bfloat16", tokens)
        for activations in filter(layout.multiplies, ("int8", "fp8")):
            widths = linear.TOKENS if fmt in ("INT8", "FP8") else (16, 128)
            for tokens in (16, 32) if layout.minimum else widths:
                yield in_codes(fmt, "bfloat16", tokens, activations=activations)
    for fmt in ("Q4_0", "FP8", "NF4"):
        yield in_codes(fmt, "float16", 16)
    for fmt, layout in LAYOUTS.items():
        for tokens in (16, 32) if layout.has_long_planes else (16, 128):
            yield in_codes(fmt, "bfloat16", tokens, after="silu_mul", norm=tokens == 16)
    for tokens in (16, 128):
        yield in_codes("INT8", "bfloat16", tokens, activations="int8", after="silu_mul")
        yield in_codes("FP8", "bfloat16", tokens, activations="fp8", after="silu_mul")
    for fmt, activations in (("INT8", "int8"), ("Q4_0", "int8"), ("Q4_K", "int8"), ("FP8", "fp8")):
        for after, norm in (("", False), ("silu_mul", True)):
            yield in_codes(
                fmt, "bfloat16", 16, activations=activations, after=after, norm=norm, here=True
            )
    yield in_codes("I4G128", "bfloat16", 16, ordered=True)
    for fmt in ("I4G32", "I8G32"):
        yield in_codes(fmt, "bfloat16", 32, ordered=True)
    yield in_codes("Q4_0", "bfloat16", 16, K=576)
    yield in_codes("Q4_1", "float32", 16)
