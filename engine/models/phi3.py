"""Phi-3: Llama's program; its checkpoints fuse q, k, v and gate, up, a part of each head may
rotate, and long contexts divide the frequencies (arXiv:2404.14219, LongRoPE arXiv:2402.13753)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..config import ModelConfig
from . import llama
from ._blocks import ROTARY_BUFFERS, Names, WeightSpec, weight_specs
from ._fields import Fields, finish
from ._gguf import (
    NO_TENSORS,
    ROPE_LONG,
    ROPE_SHORT,
    gguf_fields,
    gguf_rope,
    gguf_sizes,
    gguf_window,
)
from ._hf import hf_rope, hf_sizes, hf_window
from .llama import LAYER

HF_ARCHITECTURES = ("Phi3ForCausalLM",)
GGUF_ARCHITECTURES = ("phi3",)
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED: tuple[str, ...] = ()
GGUF_CONFIG_TENSORS = (ROPE_LONG, ROPE_SHORT)

forward = llama.forward  # rows of the fused tensors are Llama's weights


def weights(config: ModelConfig) -> list[WeightSpec]:
    """q, k, v are rows of one tensor, gate and up of another, in that order."""
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    ffn = config.intermediate_size

    def rows(names: str, sizes: Sequence[int], hf: str, gguf: str) -> dict[str, Names]:
        spans = pairwise(accumulate(sizes, initial=0))
        return {name: (hf, gguf, span) for name, span in zip(names.split(), spans, strict=True)}

    qkv = rows("q k v", (q_rows, kv_rows, kv_rows), "self_attn.qkv_proj.weight", "attn_qkv.weight")
    gate_up = rows("gate up", (ffn, ffn), "mlp.gate_up_proj.weight", "ffn_up.weight")
    return weight_specs(config, {**LAYER, **qkv, **gate_up})


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    fields.neutral({"attention_bias": (False,), "mlp_bias": (False,)})
    fields.ignore("original_max_position_embeddings")  # read by rope, where it has a use
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes, kinds=("default", "longrope"), partial=True)
    window = hf_window(fields, 0)
    windows = (window,) * sizes["num_layers"]
    return finish(fields, sizes, family="phi3", rope=rope, windows=windows, notes=notes)


def config_from_gguf(
    meta: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]] = NO_TENSORS,
) -> ModelConfig:
    """From GGUF metadata; `tensors` holds the long and short divisors where the file has them.

    Errors: ConfigError, also where there is one of the two without the other.
    """
    fields = gguf_fields(meta, "phi3")
    sizes = gguf_sizes(fields, meta, tensor_names)
    return finish(
        fields,
        sizes,
        family="phi3",
        rope=gguf_rope(fields, sizes, tensor_names, tensors),
        windows=(gguf_window(fields),) * sizes["num_layers"],
    )
