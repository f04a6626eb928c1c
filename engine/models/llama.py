"""Llama 2 and 3.x, and the models of their shape such as SmolLM (arXiv:2302.13971, 2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ModelConfig
from ._blocks import (
    ATTENTION,
    MLP,
    ROTARY_BUFFERS,
    WeightHandles,
    WeightSpec,
    attend,
    biases,
    norm,
    project,
    swiglu,
    weight_specs,
)
from ._experts import gguf_experts
from ._fields import Fields, finish
from ._gguf import NO_TENSORS, ROPE_FREQS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes

HF_ARCHITECTURES = ("LlamaForCausalLM",)
GGUF_ARCHITECTURES = ("llama",)  # Mistral's and Mixtral's files say llama too
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED = (r"blk\.\d+\.attn_rot_embd\.weight",)
GGUF_CONFIG_TENSORS = (ROPE_FREQS,)

LAYER = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    **ATTENTION,
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    **MLP,
}


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Pre-norm decoder: grouped-query attention with rotary positions, then SwiGLU.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q, k, v = (project(h, layer, name) for name in "qkv")
        h = attend(config, step, q, k, v, index=i)
        x = ops.add(x, project(h, layer, "o"))

        h = norm(config, x, layer["ffn_norm"])
        x = ops.add(x, swiglu(h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    return weight_specs(config, {**LAYER, **biases(config)})


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes)
    attention_bias = fields.flag("attention_bias", False)
    return finish(
        fields,
        sizes,
        family="llama",
        rope=rope,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        notes=notes,
    )


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata. The rows of q and k are permuted there so that rope pairs neighbours.

    `tensors` holds the values of those GGUF_CONFIG_TENSORS that the file has. Errors: ConfigError.
    """
    fields = gguf_fields(meta, "llama")
    sizes = gguf_sizes(fields, meta, tensor_names, experts=True)
    rope = gguf_rope(fields, sizes, tensor_names, tensors, interleaved=True)
    experts = gguf_experts(fields, sizes, tensor_names, renormalise=True)
    return finish(
        fields,
        sizes,
        family="mixtral" if experts else "llama",
        rope=rope,
        windows=(gguf_window(fields),) * sizes["num_layers"],
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_up.bias" in tensor_names,
        **experts,
    )
