"""Tiny random models of every family, made and computed by transformers itself: the oracle.

Sizes are odd on purpose (no width is a multiple of 64), norms and biases are random too (as made
they are 1 and 0, which would hide a missing one), and logits come out of the order of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 203
PROMPT = 40  # tokens: two block borders of 16 and a rest
SIZES = {
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.4]


@dataclass(frozen=True)
class Case:
    """One model: transformers' class prefix, its options, and how it may be compared.

    `max_position`: the context that our Program is recorded for. `only`: the one prompt length at
    which transformers computes with the same rope; None where that is every length. `spread`: how
    many times larger than others the weights are whose name has such a part.
    """

    prefix: str
    options: dict[str, Any] = field(default_factory=dict)
    max_position: int | None = None
    only: int | None = None
    spread: dict[str, float] = field(default_factory=dict)


def _llama_rope(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **rope}}


def _dynamic_like(**rope: Any) -> dict[str, Any]:
    return {**_llama_rope(**rope), "max_position_embeddings": 16}


WINDOW = {"sliding_window": 7}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 37}
GPT_OSS = {**WINDOW, "head_dim": 18, "num_local_experts": 5, "num_experts_per_tok": 3}
CASES = {
    "llama": Case("Llama"),
    "llama-bias": Case(
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 6,
        },
    ),
    "llama-mqa": Case("Llama", {"num_key_value_heads": 1, "head_dim": 20}),
    "llama-linear": Case("Llama", _llama_rope(rope_type="linear", factor=2.5)),
    # transformers stretches by the length in use, we by the length that is served; at a prompt of
    # exactly that length both are the same, and where the served length is not stretched too.
    "llama-dynamic": Case(
        "Llama", _dynamic_like(rope_type="dynamic", factor=3.0), max_position=PROMPT, only=PROMPT
    ),
    "llama-dynamic-short": Case(
        "Llama", _dynamic_like(rope_type="dynamic", factor=3.0), max_position=16, only=16
    ),
    "llama3": Case(
        "Llama",
        _llama_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": Case(
        "Llama",
        _llama_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048),
    ),
    "llama-yarn-all": Case(
        "Llama",
        _llama_rope(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=2048,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.2,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral-window": Case("Mistral", WINDOW),
    "qwen2": Case("Qwen2"),
    "qwen2-window": Case("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": Case("Qwen3", {"head_dim": 18, "tie_word_embeddings": True}),
    "qwen3-bias-window": Case(
        "Qwen3",
        {
            **WINDOW,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": Case("Mixtral", {"num_local_experts": 5}),
    "mixtral-window": Case("Mixtral", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 3}),
    "qwen2-moe": Case("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 53}),
    "qwen2-moe-mixed": Case(
        "Qwen2Moe",
        {
            **EXPERTS,
            **WINDOW,
            "shared_expert_intermediate_size": 30,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": Case("Qwen3Moe", {**EXPERTS, "head_dim": 18, "norm_topk_prob": True}),
    "qwen3-moe-mixed": Case(
        "Qwen3Moe",
        {
            **EXPERTS,
            **WINDOW,
            "head_dim": 12,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
        },
    ),
    "gpt-oss": Case("GptOss", GPT_OSS, spread={"gate_up_proj": 8.0}),
    "gpt-oss-plain": Case(
        "GptOss",
        {
            **GPT_OSS,
            "attention_bias": False,
            "layer_types": ["full_attention"] * 2,
            "num_key_value_heads": 6,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "gemma2": Case("Gemma2", {**WINDOW, "head_dim": 14, "query_pre_attn_scalar": 11}),
    "gemma2-full": Case(
        "Gemma2",
        {
            "head_dim": 12,
            "layer_types": ["full_attention"] * 2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "Gemma3",
        {**WINDOW, "head_dim": 14, "query_pre_attn_scalar": 11, "num_hidden_layers": 7},
    ),
    "gemma3-scaled": Case(
        "Gemma3",
        {
            **WINDOW,
            "head_dim": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "phi3": Case("Phi3"),
    "phi3-partial-window": Case(
        "Phi3", {**WINDOW, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.67}}
    ),
    "phi3-long": Case(
        "Phi3",
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "longrope",
                "long_factor": LONG,
                "short_factor": SHORT,
            },
        },
        max_position=PROMPT,
        only=PROMPT,  # transformers takes the short divisors up to 20 tokens
    ),
    "phi3-short": Case(
        "Phi3",
        {
            "original_max_position_embeddings": PROMPT,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "longrope",
                "long_factor": LONG,
                "short_factor": SHORT,
            },
        },
        max_position=PROMPT,
    ),
}


def prompt(length: int = PROMPT, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


@dataclass(frozen=True)
class Made:
    """A model on disk and transformers' logits [prompt, V] of `prompt(length)`."""

    case: Case
    path: Path
    logits: np.ndarray


def make(name: str, folder: Path) -> Made:
    """Build, randomise, save and run one case. Needs torch and transformers."""
    import torch
    import transformers

    case = CASES[name]
    suffix = "TextConfig" if case.prefix == "Gemma3" else "Config"
    config = getattr(transformers, case.prefix + suffix)(**{**SIZES, **case.options})
    config._attn_implementation = "eager"  # the others leave out Gemma 2's soft-cap
    config._experts_implementation = "eager"  # the others want widths of whole 16 bytes
    model = getattr(transformers, case.prefix + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            noise *= next((by for part, by in case.spread.items() if part in key), 1.0)
            if p.dim() >= 2:
                p.copy_(noise * 1.3 / p.shape[-1] ** 0.5)
            else:  # norms about 1 (stored as such, or as 1 less), biases about 0
                is_one = key.endswith("norm.weight") and not case.prefix.startswith("Gemma")
                p.copy_(noise * 0.3 + is_one)
        ids = prompt(case.only or PROMPT)
        logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    model.save_pretrained(folder)
    return Made(case, folder, logits)
