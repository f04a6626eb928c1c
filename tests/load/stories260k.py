"""The stories260K model of the test data as a Hugging Face folder and as GGUF files.

Source format: llama2.c's first checkpoint version (karpathy/llama2.c, MIT, export.py):
seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size below 0
means an output matrix of its own), then float32 tensors, the layers of one kind together.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.load.writers import quantise_q8_0, write_gguf, write_safetensors

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of a piece, in sentencepiece and in GGUF


@dataclass(frozen=True)
class Llama2c:
    """A llama2.c checkpoint in memory; each tensor [n_layers, ...] but the three global ones."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tensors: dict[str, np.ndarray]

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def convert(data_dir: Path, out_dir: Path) -> dict[str, Path]:
    """Write every form into `out_dir`: "hf" (folder), "F32", "F16" and "Q8_0" (GGUF files).

    `data_dir` holds stories260K.bin and tok512.bin.
    """
    model = read_model(data_dir / "stories260K.bin")
    pieces = read_pieces(data_dir / "tok512.bin", model.vocab_size)
    folder = out_dir / "stories260K-hf"
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(model, pieces, folder)
    out = {"hf": folder}
    for kind in ("F32", "F16", "Q8_0"):
        out[kind] = write_model_gguf(model, pieces, kind, out_dir / f"stories260K-{kind}.gguf")
    return out


def read_model(path: Path) -> Llama2c:
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack_from("<7i", raw)
    head_dim = dim // heads
    shapes = {
        "token_embedding": (abs(vocab), dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * head_dim, dim),
        "wv": (layers, kv_heads * head_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis": (2, seq_len, head_dim // 2),  # tables that nobody needs
    }
    if vocab < 0:
        shapes["wcls"] = (-vocab, dim)
    tensors, at = {}, 28
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        tensors[name] = np.frombuffer(raw, "<f4", n, at).reshape(shape)
        at += 4 * n
    if at != len(raw):
        raise ValueError(f"{path} has {len(raw)} bytes; its header describes {at}")
    return Llama2c(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len, tensors)


def read_pieces(path: Path, count: int) -> list[tuple[str, float, int]]:
    """(piece, score, type) by id, in sentencepiece's spelling: U+2581 for a space.

    The file holds an int32 (longest piece), then per id float32 score, int32 length, bytes.
    """
    raw, at, out = path.read_bytes(), 4, []
    for i in range(count):
        score, n = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + n].decode()
        at += 8 + n
        if i < 3:  # <s> and </s> are stored with newlines around them, for display
            out.append((text.strip(), score, CONTROL if i else UNKNOWN))
        elif i < 259:
            out.append((text, score, BYTE))
        else:
            out.append((text.replace(" ", "\u2581"), score, NORMAL))
    return out


# ------------------------------------------------------------------------------- Hugging Face


def write_folder(model: Llama2c, pieces: list[tuple[str, float, int]], folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "wcls" not in model.tensors,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    write_safetensors(folder / "model.safetensors", hf_tensors(model), {"format": "pt"})


def hf_tensors(model: Llama2c) -> dict[str, np.ndarray]:
    t = model.tensors
    out = {"model.embed_tokens.weight": t["token_embedding"], "model.norm.weight": t["rms_final"]}
    if "wcls" in t:
        out["lm_head.weight"] = t["wcls"]
    for i in range(model.n_layers):
        layer = f"model.layers.{i}."
        out |= {
            layer + "input_layernorm.weight": t["rms_att"][i],
            layer + "self_attn.q_proj.weight": to_half_rotation(t["wq"][i], model.n_heads),
            layer + "self_attn.k_proj.weight": to_half_rotation(t["wk"][i], model.n_kv_heads),
            layer + "self_attn.v_proj.weight": t["wv"][i],
            layer + "self_attn.o_proj.weight": t["wo"][i],
            layer + "post_attention_layernorm.weight": t["rms_ffn"][i],
            layer + "mlp.gate_proj.weight": t["w1"][i],
            layer + "mlp.down_proj.weight": t["w2"][i],
            layer + "mlp.up_proj.weight": t["w3"][i],
        }
    return out


def to_half_rotation(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head: pairs (2j, 2j + 1) -> (j, j + head_dim / 2), as transformers rotates."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def to_interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_half_rotation`."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """A BPE tokenizer.model (sentencepiece_model.proto, Apache-2.0) written field by field."""
    out = b""
    for piece, score, kind in pieces:
        body = _field(1, piece.encode()) + _tag(2, 5) + struct.pack("<f", score) + _field(3, kind)
        out += _field(1, body)
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, 1)  # BPE, size, byte fallback
    trainer += _field(40, 0) + _field(41, 1) + _field(42, 2) + _field(43, -1)  # unk, bos, eos, pad
    # identity normaliser: a space before the text, other spaces kept, written as U+2581
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)
    return out + _field(2, trainer) + _field(3, normalizer)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _tag(number, 0) + _varint(value % (1 << 64))
    return _tag(number, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# --------------------------------------------------------------------------------------- GGUF


def write_model_gguf(
    model: Llama2c, pieces: list[tuple[str, float, int]], kind: str, path: Path
) -> Path:
    """kind: the matrices' type, F32, F16 or Q8_0; where a row is not whole Q8_0 blocks, F16."""
    metadata = {
        "general.architecture": "llama",
        "general.name": "stories260K",
        "general.file_type": {"F32": 0, "F16": 1, "Q8_0": 7}[kind],
        "general.quantization_version": 2,
        "llama.vocab_size": model.vocab_size,
        "llama.context_length": model.seq_len,
        "llama.embedding_length": model.dim,
        "llama.block_count": model.n_layers,
        "llama.feed_forward_length": model.hidden_dim,
        "llama.attention.head_count": model.n_heads,
        "llama.attention.head_count_kv": model.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": model.head_dim,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    tensors = {name: _stored(rows, kind) for name, rows in gguf_tensors(model).items()}
    return write_gguf(path, metadata, tensors)


def gguf_tensors(model: Llama2c) -> dict[str, np.ndarray]:
    """llama.cpp's names; q and k as they are, for llama in GGUF rotates pairs (2j, 2j + 1)."""
    t = model.tensors
    out = {"token_embd.weight": t["token_embedding"], "output_norm.weight": t["rms_final"]}
    if "wcls" in t:
        out["output.weight"] = t["wcls"]
    names = {"attn_norm": "rms_att", "attn_q": "wq", "attn_k": "wk", "attn_v": "wv"}
    names |= {"attn_output": "wo", "ffn_norm": "rms_ffn"}
    names |= {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
    for i in range(model.n_layers):
        out |= {f"blk.{i}.{name}.weight": t[source][i] for name, source in names.items()}
    return out


def _stored(rows: np.ndarray, kind: str) -> tuple[str, tuple[int, ...], bytes]:
    if rows.ndim == 1 or kind == "F32":
        return "F32", rows.shape, rows.astype("<f4").tobytes()
    if kind == "Q8_0" and rows.shape[1] % 32 == 0:
        return "Q8_0", rows.shape, quantise_q8_0(rows)
    return "F16", rows.shape, rows.astype("<f2").tobytes()
