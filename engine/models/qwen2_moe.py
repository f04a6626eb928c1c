"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's block with small experts and one that every token passes
(arXiv:2407.10671)."""

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
from ._experts import expert_specs, gguf_experts, hf_experts, mixture, shared_specs
from ._fields import MAX_LAYERS, MAX_SIZE, Fields, finish
from ._gguf import NO_TENSORS, ROPE_FREQS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes, hf_window, hf_windows
from .mixtral import LAYER

HF_ARCHITECTURES = ("Qwen2MoeForCausalLM",)
GGUF_ARCHITECTURES = ("qwen2moe",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS = (ROPE_FREQS,)


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Qwen2's decoder; its MLP is a mixture, and a shared expert scaled by its own gate.

    The layers named in config.dense_layers have the one MLP.  -> [T, H].
    """
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q, k, v = (project(h, layer, name) for name in "qkv")
        h = attend(config, step, q, k, v, index=i)
        x = ops.add(x, project(h, layer, "o"))

        h = norm(config, x, layer["ffn_norm"])
        y = swiglu(h, layer)
        if i not in config.dense_layers:
            y = ops.sigmoid_scale(y, ops.linear(h, layer["shared_router"]))
            y = ops.add(mixture(config, h, layer), y)
        x = ops.add(x, y)
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    specs = weight_specs(config, {**LAYER, **biases(config)})
    for i in range(config.num_layers):
        if i in config.dense_layers:
            specs += layer_specs(config, i, MLP)
        else:
            specs += expert_specs(config, i) + shared_specs(config, i)
    return specs


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    sizes = hf_sizes(fields)
    layers = sizes["num_layers"]
    rope, notes = hf_rope(fields, sizes)
    shared = fields.integer("shared_expert_intermediate_size", 1, MAX_SIZE, 5632)
    return finish(
        fields,
        sizes,
        family="qwen2_moe",
        rope=rope,
        windows=_windows(fields, layers),
        qkv_bias=fields.flag("qkv_bias", True),
        shared_expert_size=shared,
        **hf_experts(fields, layers, count=60, top_k=4, size=1408),
        notes=notes,
    )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Windows of every other layer below max_window_layers, where use_sliding_window is on."""
    some = fields.integer("max_window_layers", 0, MAX_LAYERS, 28)
    fields.ignore("sliding_window")  # may be 0 where it is not used
    window = hf_window(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    some = some if window else 0
    kinds = ("sliding_attention", "full_attention")
    default = [kinds[i % 2] if i < some else kinds[1] for i in range(layers)]
    return hf_windows(fields, layers, window=window, default=default)


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata; `tensors` as in llama.py. Errors: ConfigError."""
    fields = gguf_fields(meta, "qwen2moe")
    sizes = gguf_sizes(fields, meta, tensor_names, experts=True)
    shared = fields.integer(
        "expert_shared_feed_forward_length", 1, MAX_SIZE, sizes["intermediate_size"]
    )
    fields.integer("expert_count", 1, MAX_SIZE)
    return finish(
        fields,
        sizes,
        family="qwen2_moe",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=(gguf_window(fields),) * sizes["num_layers"],
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        shared_expert_size=shared,
        **gguf_experts(fields, sizes, tensor_names, renormalise=False),
    )
