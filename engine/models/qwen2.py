"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v, and windows in upper layers
(arXiv:2407.10671)."""

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
    swiglu,
    weight_specs,
)
from ._fields import MAX_LAYERS, Fields, finish
from ._gguf import NO_TENSORS, ROPE_FREQS, gguf_fields, gguf_rope, gguf_sizes, gguf_window
from ._hf import hf_rope, hf_sizes, hf_window, hf_windows
from .llama import LAYER

HF_ARCHITECTURES = ("Qwen2ForCausalLM",)
GGUF_ARCHITECTURES = ("qwen2",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS = (ROPE_FREQS,)


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Llama's decoder; q, k and v have biases, no other projection has.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q = ops.linear(h, layer["q"], layer["q_bias"])
        k = ops.linear(h, layer["k"], layer["k_bias"])
        v = ops.linear(h, layer["v"], layer["v_bias"])
        h = attend(config, step, q, k, v, index=i)
        x = ops.add(x, ops.linear(h, layer["o"]))

        h = norm(config, x, layer["ffn_norm"])
        x = ops.add(x, swiglu(h, layer))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    return weight_specs(config, {**LAYER, **biases(config)})


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    fields.neutral({"attention_bias": (True,), "mlp_bias": (False,)})
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes)
    windows = upper_windows(fields, sizes["num_layers"])
    return finish(
        fields, sizes, family="qwen2", rope=rope, windows=windows, qkv_bias=True, notes=notes
    )


def upper_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Windows of the layers from max_window_layers up, where use_sliding_window is on."""
    window = hf_window(fields, 4096)
    full = fields.integer("max_window_layers", 0, MAX_LAYERS, 28)
    if not fields.flag("use_sliding_window", False):
        window, full = 0, layers
    default = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    return hf_windows(fields, layers, window=window, default=default)


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata; `tensors` as in llama.py. Errors: ConfigError."""
    fields = gguf_fields(meta, "qwen2")
    sizes = gguf_sizes(fields, meta, tensor_names)
    return finish(
        fields,
        sizes,
        family="qwen2",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=(gguf_window(fields),) * sizes["num_layers"],
        qkv_bias=True,
    )
