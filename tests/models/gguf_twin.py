"""A tiny model of transformers written again as the GGUF file that its converter would make.

Names come from the `gguf` package's own table. The layouts are the converter's: rows of Llama's q
and k reordered so that rope's pairs are neighbours, Gemma's norms stored with their 1, Llama 3's
and Phi-3's rope divisors as tensors, no output tensor where it is tied.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.load.writers import write_gguf

ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "MixtralForCausalLM": "LLAMA",
    "Qwen2MoeForCausalLM": "QWEN2MOE",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "Phi3ForCausalLM": "PHI3",
    "GptOssForCausalLM": "GPT_OSS",
}


def convert(folder: Path, path: Path, **changes: Any) -> Path:
    """Write `path` in F32 from a saved model; `changes`: metadata to set, or None to leave out."""
    config = json.loads((folder / "config.json").read_text())
    model_arch = gguf.MODEL_ARCH[ARCHITECTURES[config["architectures"][0]]]
    arch = gguf.MODEL_ARCH_NAMES[model_arch]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    meta = {f"{arch}.{k}": v for k, v in _metadata(config, arch, head_dim).items()}
    meta = {"general.architecture": arch, **meta, **changes}
    meta["tokenizer.ggml.eos_token_id"] = config["eos_token_id"]
    tensors = _tensors(folder, config, arch, model_arch) | _rope_tensors(config, arch, head_dim)
    return write_gguf(
        path,
        {k: v for k, v in meta.items() if v is not None},
        {n: ("F32", a.shape, a.astype("<f4").tobytes()) for n, a in tensors.items()},
    )


def _metadata(config: dict[str, Any], arch: str, head_dim: int) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    meta = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": config.get("sliding_window"),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": config.get("num_local_experts", config.get("num_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    if arch == "phi3":
        meta["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
        original = config["original_max_position_embeddings"]
        meta["rope.scaling.original_context_length"] = original
        scale = config["max_position_embeddings"] / original
        if rope["rope_type"] == "longrope" and scale > 1:
            meta["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    if arch.startswith("gemma") and config["query_pre_attn_scalar"] != head_dim:
        meta["attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
    if rope["rope_type"] in ("linear", "yarn"):
        meta["rope.scaling.type"] = rope["rope_type"]
        meta["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        meta["rope.scaling.original_context_length"] = original
    return meta


def _tensors(
    folder: Path, config: dict[str, Any], arch: str, model_arch: gguf.MODEL_ARCH
) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(model_arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    out = {}
    stored = load_file(folder / "model.safetensors")
    for name, values in (_apart(stored) if arch == "gpt-oss" else _stacked(stored)).items():
        if arch == "llama":
            for key, count in heads.items():
                if key in name:
                    values = interleave(values, count)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, f"no GGUF name for {name}"
        out[new] = values.squeeze()
    return out


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with the experts of a layer in one tensor, under the name that the table has."""
    out: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else 0 for p in n.split(".")]):
        before, at, after = name.partition(".experts.")
        if not at:
            out[name] = tensors[name]
            continue
        merged = before.replace("block_sparse_moe", "feed_forward").replace("model.", "")
        prefix = merged if "feed_forward" in merged else before
        experts.setdefault(f"{prefix}.experts.{after.partition('.')[2]}", []).append(tensors[name])
    return out | {name: np.stack(parts) for name, parts in experts.items()}


def _apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss's experts with rows first, gate and up in tensors of their own."""
    out: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        layer, at, which = name.partition(".experts.")
        if not at:
            out[name + ".weight" * name.endswith("sinks")] = values
            continue
        suffix = "bias" if which.endswith("_bias") else "weight"
        rows = values if suffix == "bias" else values.swapaxes(1, 2)
        if which.startswith("down"):
            out[f"{layer}.experts.down_proj.{suffix}"] = rows
        else:
            for turn, part in enumerate(("gate_proj", "up_proj")):
                out[f"{layer}.experts.{part}.{suffix}"] = rows[:, turn::2]
    return out


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first halves, second halves) to (pair, pair, ...)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope_tensors(config: dict[str, Any], arch: str, head_dim: int) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for j in range(head_dim // 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (2 * j / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(divisors, np.float32)}
