"""gpt-oss: a window in every other layer, attention sinks, and experts with biases behind a clamped
gate (arXiv:2508.10925)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ModelConfig
from ._blocks import (
    ATTENTION,
    Source,
    WeightHandles,
    WeightSpec,
    attend,
    biases,
    norm,
    project,
    weight_specs,
)
from ._experts import MAX_EXPERTS, TRAINING_HF, gguf_experts, mixture
from ._fields import MAX_SIZE, Fields, finish
from ._gguf import NO_TENSORS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes, hf_window, hf_windows

HF_ARCHITECTURES = ("GptOssForCausalLM",)
GGUF_ARCHITECTURES = ("gpt-oss",)
HF_UNUSED: tuple[str, ...] = ()
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS: tuple[str, ...] = ()

LAYER = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    **ATTENTION,
    "ffn_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
}


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Llama's decoder with sinks and a mixture of experts in every layer.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q, k, v = (project(h, layer, name) for name in "qkv")
        h = attend(config, step, q, k, v, index=i, sinks=layer["sinks"])
        x = ops.add(x, project(h, layer, "o"))

        h = norm(config, x, layer["ffn_norm"])
        x = ops.add(x, mixture(config, h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    specs = weight_specs(config, {**LAYER, **biases(config)})
    for i in range(config.num_layers):
        specs += _layer_specs(config, i)
    return specs


def _layer_specs(config: ModelConfig, index: int) -> list[WeightSpec]:
    """Sinks, router and experts. A Hugging Face file holds the experts' gates and up layers in one
    tensor, their rows in turns, and where it is of floats each matrix transposed."""
    count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_size
    hf, gguf = f"model.layers.{index}", f"blk.{index}"

    def spec(name: str, shape: tuple[int, ...], hf_source: Source, gguf_name: str) -> WeightSpec:
        split = (count, shape[0] // count, *shape[1:]) if "experts" in name else None
        other = Source(f"{gguf}.{gguf_name}", shape=split)
        return WeightSpec(f"layers.{index}.{name}", shape, (hf_source,), (other,))

    router, experts = f"{hf}.mlp.router", f"{hf}.mlp.experts"
    specs = [
        spec("sinks", (config.num_heads,), Source(f"{hf}.self_attn.sinks"), "attn_sinks.weight"),
        spec("router", (count, hidden), Source(f"{router}.weight"), "ffn_gate_inp.weight"),
        spec("router_bias", (count,), Source(f"{router}.bias"), "ffn_gate_inp.bias"),
    ]
    for half, which in enumerate(("gate", "up")):
        rows = (half * count * ffn, (half + 1) * count * ffn)
        matrix = Source(f"{experts}.gate_up_proj", rows, (count, 2 * ffn, hidden), True, turns=2)
        vector = Source(f"{experts}.gate_up_proj_bias", rows, (count, 2 * ffn), turns=2)
        name = f"ffn_{which}_exps"
        specs.append(spec(f"{which}_experts", (count * ffn, hidden), matrix, f"{name}.weight"))
        specs.append(spec(f"{which}_experts_bias", (count * ffn,), vector, f"{name}.bias"))
    matrix = Source(f"{experts}.down_proj", shape=(count, hidden, ffn), transposed=True)
    vector = Source(f"{experts}.down_proj_bias", shape=(count, hidden))
    specs.append(spec("down_experts", (count * hidden, ffn), matrix, "ffn_down_exps.weight"))
    specs.append(spec("down_experts_bias", (count * hidden,), vector, "ffn_down_exps.bias"))
    return specs


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    fields.neutral({"swiglu_alpha": (1.702,), "swiglu_limit": (7,)})  # ops.clamped_silu_mul's
    # Names of the first release for what stands under others too.
    fields.ignore(*TRAINING_HF, "experts_per_token", "initial_context_length")
    sizes = hf_sizes(fields)
    layers = sizes["num_layers"]
    rope, notes = hf_rope(fields, sizes, default_theta=150000.0)
    window = hf_window(fields, 128)
    default = [("full_attention" if i % 2 else "sliding_attention") for i in range(layers)]
    bias = fields.flag("attention_bias", True)
    count = fields.integer("num_local_experts", 1, MAX_EXPERTS, 128)
    return finish(
        fields,
        sizes,
        family="gpt_oss",
        rope=rope,
        windows=hf_windows(fields, layers, window=window, default=default),
        qkv_bias=bias,
        o_bias=bias,
        activation="clamped_silu",
        num_experts=count,
        experts_per_token=fields.integer("num_experts_per_tok", 1, count, min(4, count)),
        expert_size=sizes["intermediate_size"],
        notes=notes,
    )


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata, which does not say that YaRN's range is not rounded: it never is here.

    Errors: ConfigError.
    """
    fields = gguf_fields(meta, "gpt-oss")
    sizes = gguf_sizes(fields, meta, tensor_names, experts=True)
    fields.integer("expert_count", 1, MAX_SIZE)
    rope = gguf_rope(fields, sizes, tensor_names, tensors, default_theta=150000.0)
    window = gguf_window(fields, 128)
    bias = "blk.0.attn_q.bias" in tensor_names
    return finish(
        fields,
        sizes,
        family="gpt_oss",
        rope=dataclasses.replace(rope, truncate=False),
        windows=tuple(0 if i % 2 else window for i in range(sizes["num_layers"])),
        qkv_bias=bias,
        o_bias=bias,
        activation="clamped_silu",
        **gguf_experts(fields, sizes, tensor_names, renormalise=True),
    )
