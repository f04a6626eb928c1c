"""Shapes that the report measures: those of an 8B model, and tiny ones for a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....kernels.backend import KV_CODES
from .launches import Heads


@dataclass(frozen=True)
class Sizes:
    """What the rows of a report are made of."""

    dtypes: tuple[torch.dtype, ...]  # of activations in the checks of correctness
    dtype: torch.dtype  # of the rows that are timed
    # correctness and law 2
    layer: tuple[int, int]  # rows and columns of the linear layers checked
    batches: tuple[int, ...]  # tokens of a linear layer, the widest last
    heads: tuple[Heads, ...]
    lengths: tuple[int, ...]  # contexts of the sequences attended to
    caches: tuple[str, ...]  # kv_cache_dtype of the engines of law 2
    # time
    attention: Heads
    decode: tuple[tuple[int, int], ...]  # batch, context
    prefill: tuple[int, ...]  # tokens of one prompt
    layers: Mapping[str, tuple[int, int]]  # name -> rows and columns of a linear layer
    linear_tokens: tuple[int, ...]
    rows: int  # of the row-wise operations
    hidden: int
    ffn: int
    vocab: int
    sampled: tuple[int, ...]  # rows that are sampled at once
    # end to end
    models: tuple[tuple[str, Mapping[str, Any], str], ...]  # name, config.json, cache's dtype
    batch: int  # requests of the throughput row
    one_context: int  # prompt of the one stream
    lengths_in_out: tuple[int, int]  # of each request of the throughput row
    max_tokens: int  # of a step
    block_size: int


def _config(
    architecture: str,
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    ffn: int,
    vocab: int,
    **more: Any,
) -> dict[str, Any]:
    """A config.json; dtype and lengths come with `more`."""
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


LLAMA, QWEN3 = "Llama-3.1-8B shape", "Qwen3-8B shape"  # published configurations, random weights
_LLAMA = _config("LlamaForCausalLM", 4096, 32, 32, 8, 14336, 128256)

FULL = Sizes(
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    dtype=torch.bfloat16,
    layer=(456, 1792),
    batches=(1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129, 200, 256),
    heads=(
        Heads(32, 8, 128),
        Heads(9, 3, 64),
        Heads(32, 32, 96),
        Heads(8, 4, 256, 100, 30.0),
        Heads(64, 4, 128, 300),
        Heads(16, 4, 64, extras=True),
    ),
    lengths=(1, 17, 256, 257, 700, 1300),
    caches=("auto", *KV_CODES),
    attention=Heads(32, 8, 128),
    decode=(
        (1, 1024),
        (1, 8192),
        (1, 32768),
        (1, 131072),
        (8, 1024),
        (8, 16384),
        (64, 1024),
        (64, 8192),
        (256, 1024),
    ),
    prefill=(1024, 8192),
    layers={"q/k/v": (6144, 4096), "gate/up": (28672, 4096), "down": (4096, 14336)},
    linear_tokens=(1, 8, 16, 64, 128, 256, 512),
    rows=4096,
    hidden=4096,
    ffn=14336,
    vocab=128256,
    sampled=(1, 256),
    models=(
        (LLAMA, _LLAMA, "auto"),
        (QWEN3, _config("Qwen3ForCausalLM", 4096, 36, 32, 8, 12288, 151936), "auto"),
        (f"{LLAMA}, fp8 KV cache", _LLAMA, "fp8"),
    ),
    batch=256,
    one_context=1024,
    lengths_in_out=(1024, 1024),
    max_tokens=8192,
    block_size=16,
)

TINY = Sizes(
    dtypes=(torch.float16,),  # the interpreter's bf16 arithmetic is wrong
    dtype=torch.float16,
    layer=(40, 288),
    batches=(1, 17),
    heads=(Heads(4, 2, 16), Heads(2, 2, 8, 4, 5.0, True)),
    lengths=(1, 9),
    caches=("int8",),
    attention=Heads(4, 2, 16),
    decode=((2, 20),),
    prefill=(20,),
    layers={"q/k/v": (64, 128)},
    linear_tokens=(1, 17),
    rows=3,
    hidden=64,
    ffn=96,
    vocab=96,
    sampled=(2,),
    models=(
        (
            "tiny",
            _config("LlamaForCausalLM", 32, 1, 4, 2, 64, 96, head_dim=8, torch_dtype="float16"),
            "auto",
        ),
    ),
    batch=2,
    one_context=4,
    lengths_in_out=(4, 2),
    max_tokens=16,
    block_size=2,
)
