"""Qwen3 (dense): Llama's block with a norm on each head's query and key (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ModelConfig
from ._blocks import (
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
from ._fields import Fields, finish
from ._gguf import NO_TENSORS, ROPE_FREQS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes
from .llama import LAYER as LLAMA_LAYER
from .qwen2 import upper_windows

HF_ARCHITECTURES = ("Qwen3ForCausalLM",)
GGUF_ARCHITECTURES = ("qwen3",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS = (ROPE_FREQS,)

LAYER = {
    **LLAMA_LAYER,
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Llama's decoder; each head of q and k is normed before it is rotated.  -> [T, H]."""
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
        x = ops.add(x, swiglu(h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    return weight_specs(config, {**LAYER, **biases(config)})


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    fields.neutral({"mlp_bias": (False,)})
    fields.raw("head_dim")  # its default is the class's 128, not hidden_size / heads
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes)
    bias = fields.flag("attention_bias", False)
    return finish(
        fields,
        sizes,
        family="qwen3",
        rope=rope,
        windows=upper_windows(fields, sizes["num_layers"]),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        notes=notes,
    )


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata; `tensors` as in llama.py. Errors: ConfigError."""
    fields = gguf_fields(meta, "qwen3")
    sizes = gguf_sizes(fields, meta, tensor_names)
    return finish(
        fields,
        sizes,
        family="qwen3",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=(gguf_window(fields),) * sizes["num_layers"],
        qk_norm=True,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        o_bias="blk.0.attn_output.bias" in tensor_names,
    )
