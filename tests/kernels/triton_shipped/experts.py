"""Mixtures of experts: routing, and layers whose rows are gathered by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engineroom.kernels.triton import elementwise, expert_linear, experts, linear
from engineroom.kernels.triton.numerics import OPTIONS, next_power_of_two
from engineroom.kernels.triton.quantised import LAYOUTS

from .configuration import POINTERS, Configuration
from .layers import in_codes, in_floats


def _routing(dtype: str, E: int, top_k: int) -> Iterator[Configuration]:
    """Routing, and the products of floats; those of quantised weights share their loop."""
    pointer, block = POINTERS[dtype], {"BLOCK": next_power_of_two(E)}
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


def _gathered(of: Configuration, E: int, *, biases: bool = False) -> Configuration:
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


def configurations() -> Iterator[Configuration]:
    for layer in (
        *(in_floats("bfloat16", tokens) for tokens in linear.TOKENS[:3]),
        in_floats("bfloat16", 64, "silu_mul"),
        *(in_floats("bfloat16", tokens, "silu_mul", paired=True) for tokens in (16, 64)),
        in_floats("float16", 16),
        in_floats("float32", 16),
        *(in_codes(fmt, "bfloat16", 16) for fmt in LAYOUTS),
        *(in_codes(fmt, "bfloat16", 128) for fmt in ("Q4_0", "Q8_0", "INT8")),
        *(in_codes(fmt, "bfloat16", 32) for fmt in ("Q4_1", "Q4_K", "Q5_1")),
        *(in_codes("INT8", "bfloat16", tokens, activations="int8") for tokens in (16, 128)),
        in_codes("FP8", "bfloat16", 128, activations="fp8"),
        *(in_codes(fmt, "bfloat16", 16, after="silu_mul") for fmt in ("Q4_0", "Q4_K", "FP8")),
        in_codes("Q4_0", "bfloat16", 128, after="silu_mul"),
        in_codes("Q4_K", "bfloat16", 32, after="silu_mul"),
    ):
        yield _gathered(layer, 128)
    for after, tokens in (("clamped_silu_mul", 16), ("clamped_silu_mul", 128), ("", 16)):
        layer = in_codes("MXFP4", "bfloat16", tokens, K=2880, after=after)
        yield _gathered(layer, 32, biases=True)
    yield from _routing("bfloat16", 128, 8)
    yield from _routing("float32", 8, 2)
