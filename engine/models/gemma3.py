"""Gemma 3 (text): Gemma 2's block with a norm on each query and key in place of the soft-cap, five
windowed layers to each full one, and a rope of its own for the windowed ones (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle, StepHandles
from ..config import ConfigError, ModelConfig, RopeConfig
from ._blocks import ROTARY_BUFFERS, WeightHandles, WeightSpec, attend, geglu, norm, weight_specs
from ._fields import MAX_LAYERS, Fields, finish
from ._gguf import NO_TENSORS, gguf_fields, gguf_rope, gguf_sizes, gguf_softcap, gguf_window
from ._hf import LAYER_TYPES, hf_rope_entry, hf_window, hf_windows, rope_dict, rope_theta
from .gemma2 import LAYER as GEMMA2_LAYER
from .gemma2 import embedding_scale, gguf_gemma, hf_gemma

HF_ARCHITECTURES = ("Gemma3ForCausalLM",)
GGUF_ARCHITECTURES = ("gemma3",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS: tuple[str, ...] = ()

LAYER = {
    **GEMMA2_LAYER,
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}
PATTERN = 6  # every sixth layer attends to everything
THETA, LOCAL_THETA = 1e6, 1e4


def forward(config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle:
    """Sandwich-normed decoder with GeGLU, normed queries and keys, two ropes.  -> [T, H]."""
    x = ops.embedding(weights["embed"], step.token_ids)
    x = ops.scale(x, embedding_scale(config))
    for i in range(config.num_layers):
        layer = weights.layer(i)

        h = norm(config, x, layer["attn_norm"])
        q = norm(config, ops.linear(h, layer["q"]), layer["q_norm"])
        k = norm(config, ops.linear(h, layer["k"]), layer["k_norm"])
        v = ops.linear(h, layer["v"])
        rope = config.rope_local if config.windows[i] else config.rope
        h = ops.linear(attend(config, step, q, k, v, index=i, rope=rope), layer["o"])
        x = ops.add(x, norm(config, h, layer["post_attn_norm"]))

        h = geglu(norm(config, x, layer["ffn_norm"]), layer)
        x = ops.add(x, norm(config, h, layer["post_ffn_norm"]))
    return norm(config, x, weights["final_norm"])


def weights(config: ModelConfig) -> list[WeightSpec]:
    return weight_specs(config, LAYER)


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    if "vision_config" in values:
        raise ConfigError(
            "vision_config",
            "config.json has a vision_config: this is a multimodal Gemma 3, and images are not "
            "supported yet; the text-only checkpoints are Gemma3ForCausalLM",
        )
    sizes = hf_gemma(fields)
    rope, rope_local, notes = _hf_ropes(fields, sizes)
    window = hf_window(fields, 4096)
    every = [
        fields.integer(key, 1, MAX_LAYERS, PATTERN)
        for key in ("sliding_window_pattern", "_sliding_window_pattern")
        if fields.has(key)
    ]
    layers = sizes["num_layers"]
    default = pattern(layers, every[0] if every else PATTERN)
    windows = hf_windows(fields, layers, window=window, default=default)
    return finish(
        fields,
        sizes,
        family="gemma3",
        rope=rope,
        rope_local=rope_local,
        windows=windows,
        qk_norm=True,
        notes=notes,
    )


def pattern(layers: int, every: int) -> list[str]:
    """Layer types where each `every`-th layer is full and the others are windowed."""
    full, sliding = LAYER_TYPES
    return [sliding if (i + 1) % every else full for i in range(layers)]


def _hf_ropes(fields: Fields, sizes: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig, list[str]]:
    """The ropes of full and of windowed layers. transformers 5 nests them in rope_parameters by
    layer type; before, rope_scaling applied to the full layers only."""
    thetas = {
        "full_attention": rope_theta(fields, THETA),
        "sliding_attention": rope_theta(fields, LOCAL_THETA, "rope_local_base_freq"),
    }
    given = rope_dict(fields)
    if fields.has("rope_parameters") and given:
        unknown = [key for key in given if key not in LAYER_TYPES]
        if unknown:
            raise fields.bad("rope_parameters", unknown, "one object per layer type")
        entries = {kind: given.get(kind) or {} for kind in LAYER_TYPES}
    else:
        entries = {"full_attention": given, "sliding_attention": {}}
    ropes, notes = [], []
    for kind in LAYER_TYPES:
        rope, more = hf_rope_entry(
            fields, entries[kind], sizes, kinds=RopeConfig.KINDS, theta=thetas[kind]
        )
        ropes.append(rope)
        notes += more
    return ropes[0], ropes[1], notes


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata. Errors: ConfigError."""
    fields = gguf_fields(meta, "gemma3")
    sizes = gguf_gemma(gguf_sizes(fields, meta, tensor_names), layers_of_27b=62)
    window = gguf_window(fields)
    every = fields.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, PATTERN)
    layers = sizes["num_layers"]
    rope = gguf_rope(fields, sizes, tensor_names, tensors, default_theta=THETA)
    local_theta = fields.number("rope.freq_base_swa", 1.0, 1e15, LOCAL_THETA)
    return finish(
        fields,
        sizes,
        family="gemma3",
        rope=rope,
        # Scaling applies to the full layers alone.
        rope_local=RopeConfig(theta=local_theta, rotary_dim=rope.rotary_dim),
        windows=tuple(window if t == LAYER_TYPES[1] else 0 for t in pattern(layers, every)),
        qk_norm=True,
        attention_softcap=gguf_softcap(fields, "attn_logit_softcapping"),
        final_softcap=gguf_softcap(fields, "final_logit_softcapping"),
    )
