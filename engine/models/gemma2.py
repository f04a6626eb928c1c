"""Gemma 2: norms before and after each half, soft-capped scores and logits, a window in every
other layer (arXiv:2408.00118)."""

from __future__ import annotations

import math
import struct
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
    geglu,
    norm,
    weight_specs,
)
from ._fields import MAX_SIZE, Fields, finish
from ._gguf import NO_TENSORS, gguf_fields, gguf_rope, gguf_sizes, gguf_softcap, gguf_window
from ._hf import hf_rope, hf_sizes, hf_window, hf_windows

HF_ARCHITECTURES = ("Gemma2ForCausalLM",)
GGUF_ARCHITECTURES = ("gemma2",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS: tuple[str, ...] = ()

LAYER = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    **ATTENTION,
    "post_attn_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "ffn_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    **MLP,
    "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Sandwich-normed decoder with GeGLU; windows and soft-caps per the config.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    x = ops.scale(x, embedding_scale(config))
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q, k, v = (ops.linear(h, layer[name]) for name in "qkv")
        h = ops.linear(attend(config, step, q, k, v, index=i), layer["o"])
        x = ops.add(x, norm(config, h, layer["post_attn_norm"]))

        h = geglu(norm(config, x, layer["ffn_norm"]), layer)
        x = ops.add(x, norm(config, h, layer["post_ffn_norm"]))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    return weight_specs(config, LAYER)


def embedding_scale(config: ModelConfig) -> float:
    """sqrt(hidden size), rounded to the activation dtype: transformers multiplies in it."""
    bits = struct.unpack("<I", struct.pack("<f", config.embedding_scale))[0]
    if config.dtype == "bfloat16":  # round to nearest, ties to even, on the upper 16 bits
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if config.dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", config.embedding_scale))[0])
    return config.embedding_scale


def hf_gemma(
    fields: Fields, *, attention_softcap: float = 0.0, final_softcap: float = 0.0
) -> dict[str, Any]:
    """What the config.json of Gemma 2 and 3 have in common: keyword arguments of ModelConfig.

    The soft-caps are the class's own, for a file without the keys; null means none.
    """
    fields.neutral({"attention_bias": (False,), "hidden_act": ("gelu_pytorch_tanh",)})
    fields.raw("head_dim")  # its default is the class's 256, not hidden_size / heads
    sizes = hf_sizes(fields, activation=("hidden_activation", "gelu_pytorch_tanh"), tied=True)
    scalar = fields.number("query_pre_attn_scalar", 0.0, MAX_SIZE, 256.0)

    def cap(key: str, absent: float) -> float:
        return fields.number(key, 0.0, 1e6, fields.absent(key, absent, 0.0))

    return {
        **sizes,
        "attention_scale": scalar**-0.5,
        "attention_softcap": cap("attn_logit_softcapping", attention_softcap),
        "final_softcap": cap("final_logit_softcapping", final_softcap),
        "embedding_scale": math.sqrt(sizes["hidden_size"]),
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
    }


def gguf_gemma(sizes: Mapping[str, Any], *, layers_of_27b: int) -> dict[str, Any]:
    """What the GGUF files of Gemma 2 and 3 have in common; norm weights there include the 1.

    Their metadata has no query_pre_attn_scalar: it is the head size, except in the 27B model,
    which its number of layers tells (llama.cpp decides so).
    """
    scalar = float(sizes["head_dim"])
    if sizes["num_layers"] == layers_of_27b:
        scalar = sizes["hidden_size"] / sizes["num_heads"]
    return {
        **sizes,
        "attention_scale": sizes["attention_scale"] or scalar**-0.5,
        "embedding_scale": math.sqrt(sizes["hidden_size"]),
        "activation": "gelu_tanh",
    }


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    sizes = hf_gemma(fields, attention_softcap=50.0, final_softcap=30.0)
    rope, notes = hf_rope(fields, sizes)
    window = hf_window(fields, 4096)
    layers = sizes["num_layers"]
    default = [("full_attention" if i % 2 else "sliding_attention") for i in range(layers)]
    windows = hf_windows(fields, layers, window=window, default=default)
    return finish(fields, sizes, family="gemma2", rope=rope, windows=windows, notes=notes)


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata. Errors: ConfigError."""
    fields = gguf_fields(meta, "gemma2")
    sizes = gguf_gemma(gguf_sizes(fields, meta, tensor_names), layers_of_27b=46)
    window = gguf_window(fields, 4096)
    return finish(
        fields,
        sizes,
        family="gemma2",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=tuple(0 if i % 2 else window for i in range(sizes["num_layers"])),
        attention_softcap=gguf_softcap(fields, "attn_logit_softcapping", 50.0),
        final_softcap=gguf_softcap(fields, "final_logit_softcapping", 30.0),
    )
