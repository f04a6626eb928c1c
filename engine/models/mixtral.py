"""Mixtral: Llama's block with a mixture of experts in place of its MLP (arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ModelConfig
from . import llama
from ._blocks import (
    ATTENTION,
    ROTARY_BUFFERS,
    WeightHandles,
    WeightSpec,
    attend,
    biases,
    norm,
    project,
    weight_specs,
)
from ._experts import MAX_EXPERTS, TRAINING_HF, expert_specs, mixture
from ._fields import Fields, finish
from ._hf import hf_rope, hf_sizes, hf_window

HF_ARCHITECTURES = ("MixtralForCausalLM",)
GGUF_ARCHITECTURES: tuple[str, ...] = ()  # converted files say llama, and llama.py reads them
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED = llama.GGUF_UNUSED
GGUF_CONFIG_TENSORS = llama.GGUF_CONFIG_TENSORS

LAYER = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    **ATTENTION,
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
}

config_from_gguf = llama.config_from_gguf


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Llama's decoder; every layer's MLP is the best few of its experts.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q, k, v = (project(h, layer, name) for name in "qkv")
        h = attend(config, step, q, k, v, index=i)
        x = ops.add(x, project(h, layer, "o"))

        h = norm(config, x, layer["ffn_norm"])
        x = ops.add(x, mixture(config, h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    specs = weight_specs(config, {**LAYER, **biases(config)})
    for i in range(config.num_layers):
        specs += expert_specs(config, i, block="block_sparse_moe", names=("w1", "w3", "w2"))
    return specs


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    fields.neutral({"attention_bias": (False,)})
    fields.ignore(*TRAINING_HF)
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes, default_theta=1e6)
    count = fields.integer("num_local_experts", 1, MAX_EXPERTS, 8)
    return finish(
        fields,
        sizes,
        family="mixtral",
        rope=rope,
        windows=(hf_window(fields, 0),) * sizes["num_layers"],
        num_experts=count,
        experts_per_token=fields.integer("num_experts_per_tok", 1, count, min(2, count)),
        expert_size=sizes["intermediate_size"],
        notes=notes,
    )
