"""Qwen3-MoE: Qwen3's block with a mixture of experts in place of its MLP (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ModelConfig
from ._blocks import (
    MLP,
    ROTARY_BUFFERS,
    WeightHandles,
    WeightSpec,
    attend,
    biases,
    layer_specs,
    norm,
    project,
    swiglu,
    weight_specs,
)
from ._experts import expert_specs, gguf_experts, hf_experts, mixture
from ._fields import MAX_SIZE, Fields, finish
from ._gguf import NO_TENSORS, ROPE_FREQS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes, hf_window
from .mixtral import LAYER as MIXTRAL_LAYER
from .qwen3 import LAYER as QWEN3_LAYER

HF_ARCHITECTURES = ("Qwen3MoeForCausalLM",)
GGUF_ARCHITECTURES = ("qwen3moe",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS = (ROPE_FREQS,)

LAYER = {**MIXTRAL_LAYER, **{name: QWEN3_LAYER[name] for name in ("q_norm", "k_norm")}}


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Qwen3's decoder; all layers but config.dense_layers have a mixture of experts.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q = norm(config, project(h, layer, "q"), layer["q_norm"])
        k = norm(config, project(h, layer, "k"), layer["k_norm"])
        v = project(h, layer, "v")
        h = attend(config, step, q, k, v, index=i)
        x = ops.add(x, project(h, layer, "o"))

        h = norm(config, x, layer["ffn_norm"])
        dense = i in config.dense_layers
        x = ops.add(x, swiglu(h, layer) if dense else mixture(config, h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    specs = weight_specs(config, {**LAYER, **biases(config)})
    for i in range(config.num_layers):
        dense = i in config.dense_layers
        specs += layer_specs(config, i, MLP) if dense else expert_specs(config, i)
    return specs


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    sizes = hf_sizes(fields)
    layers = sizes["num_layers"]
    rope, notes = hf_rope(fields, sizes)
    fields.ignore("sliding_window")  # may be 0 where it is not used
    window = hf_window(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    bias = fields.flag("attention_bias", False)
    fields.ignore("max_window_layers")  # the class windows all layers or none
    return finish(
        fields,
        sizes,
        family="qwen3_moe",
        rope=rope,
        windows=(window,) * layers,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        **hf_experts(fields, layers, count=128, top_k=8, size=768),
        notes=notes,
    )


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata; `tensors` as in llama.py. Errors: ConfigError."""
    fields = gguf_fields(meta, "qwen3moe")
    sizes = gguf_sizes(fields, meta, tensor_names, experts=True)
    fields.integer("expert_count", 1, MAX_SIZE)
    return finish(
        fields,
        sizes,
        family="qwen3_moe",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=(gguf_window(fields),) * sizes["num_layers"],
        qk_norm=True,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        **gguf_experts(fields, sizes, tensor_names, renormalise=True),
    )
