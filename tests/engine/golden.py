"""The golden model: a tiny random Llama made by test code, with a float64 forward pass beside it.

Nothing external: it keeps an end-to-end equality on every machine. Weights come from a fixed
numpy seed; the vocabulary is the 256 bytes and four special tokens.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.load.writers import write_safetensors

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 48, 3, 6, 2, 8, 80, 260
EPS, THETA, CONTEXT = 1e-5, 10000.0, 512
BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(maxsize=1)
def tensors() -> dict[str, np.ndarray]:
    """Checkpoint name -> fp32 array; scaled so that greedy choices are clear, not near-ties."""
    rng = np.random.default_rng(20260)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    out = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, HIDDEN**0.5)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        out |= {
            at + "input_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, 1.5),
            at + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
            at + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, 1.5),
            at + "post_attention_layernorm.weight": norm(),
            at + "mlp.gate_proj.weight": matrix(FFN, HIDDEN, 1.5),
            at + "mlp.up_proj.weight": matrix(FFN, HIDDEN, 1.5),
            at + "mlp.down_proj.weight": matrix(HIDDEN, FFN, 1.5),
        }
    out["model.norm.weight"] = norm()
    out["lm_head.weight"] = matrix(VOCAB, HIDDEN, 4.0)
    return out


def write(folder: Path) -> Path:
    """The model as a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    write_safetensors(folder / "model.safetensors", tensors())
    return folder


def greedy(prompt: list[int], count: int) -> tuple[list[int], float]:
    """The next `count` tokens by a float64 forward pass, and the narrowest margin of a choice."""
    ids, margin = list(prompt), np.inf
    for _ in range(count):
        logits = forward(ids)[-1]
        top = np.sort(logits)[-2:]
        margin = min(margin, float(top[1] - top[0]))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], margin


def forward(ids: list[int]) -> np.ndarray:
    """Logits [len(ids), VOCAB] in float64, straight from the definition."""
    w = {name: value.astype(np.float64) for name, value in tensors().items()}
    x = w["model.embed_tokens.weight"][ids]
    n = len(ids)
    mask = np.where(np.tri(n, dtype=bool), 0.0, -np.inf)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        h = _norm(x, w[at + "input_layernorm.weight"])
        q = _rope((h @ w[at + "self_attn.q_proj.weight"].T).reshape(n, HEADS, HEAD_DIM))
        k = _rope((h @ w[at + "self_attn.k_proj.weight"].T).reshape(n, KV_HEADS, HEAD_DIM))
        v = (h @ w[at + "self_attn.v_proj.weight"].T).reshape(n, KV_HEADS, HEAD_DIM)
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, shared].T / HEAD_DIM**0.5 + mask
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(p / p.sum(axis=1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ w[at + "self_attn.o_proj.weight"].T
        h = _norm(x, w[at + "post_attention_layernorm.weight"])
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        up = h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return _norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


def _rope(x: np.ndarray) -> np.ndarray:
    half = HEAD_DIM // 2
    angle = np.arange(len(x))[:, None] * THETA ** -(np.arange(half) * 2 / HEAD_DIM)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _tokenizer() -> dict:
    """A tokenizer.json of single bytes (GPT-2's byte alphabet) and the special tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {b: chr(b) for b in visible}, 0
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + extra)
            extra += 1
    special = {"<|bos|>": BOS, "<|eos|>": EOS, "<|user|>": USER, "<|assistant|>": ASSISTANT}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": True, **flags} for text, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {letters[b]: b for b in range(256)},
            "merges": [],
            "dropout": None,
            "unk_token": None,
        },
    }
