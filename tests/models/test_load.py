"""Weights by canonical name, strictly: none missing, none of another shape, none unused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine import models
from engineroom.engine.config import ConfigError
from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.runtime.load import open_model, raw_weights
from engineroom.kernels.weights import RawWeight
from engineroom.quant.gguf import dequantise
from tests.data import model_path
from tests.load.writers import write_gguf, write_safetensors
from tests.models.published import CONFIGS

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "sliding_window": None,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
}
Tensors = dict[str, np.ndarray]


def folder(path: Path, name: str, change: Callable[[Tensors], Any] | None = None, **keys: Any):
    """A small random checkpoint of a published configuration's shape, its tensors changed."""
    values = {**CONFIGS[name], **SMALL, **keys}
    family = models.find_by_hf(values["architectures"][0])
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    rows: dict[str, int] = {}
    specs = family.weights(family.config_from_hf(values))
    sources = [(source, source.shape or spec.shape) for spec in specs for source in spec.hf]
    for source, shape in sources:
        rows[source.name] = max(rows.get(source.name, 0), (source.rows or (0, shape[0]))[1])
    for source, shape in sources:
        shape = (rows[source.name], *shape[1:])
        tensors[source.name] = rng.standard_normal(shape).astype(np.float32)
    if change:
        change(tensors)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    write_safetensors(path / "model.safetensors", tensors)
    return path, tensors


def load(path: Path) -> dict[str, RawWeight]:
    checkpoint = open_checkpoint(path)
    return raw_weights(checkpoint, *open_model(checkpoint))


def test_an_architecture_that_is_not_known_says_where_and_why(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {})
    for keys, words in (
        ({"vision_config": {}}, r"multimodal \(vision_config\): images .* not supported"),
        ({"auto_map": {"AutoModel": "m.M"}}, "code of its own .*never run"),
        ({}, "known: Gemma2ForCausalLM"),
    ):
        config = {"architectures": ["LlavaForConditionalGeneration"], **keys}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=words) as error:
            open_model(open_checkpoint(tmp_path))
        assert str(error.value).startswith(f"{tmp_path}/config.json: unknown model architecture")
        assert error.value.field == "architectures"


def test_rows_of_fused_tensors(tmp_path: Path) -> None:
    path, tensors = folder(tmp_path, "Phi-4-mini")
    weights = load(path)
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    parts = [dequantise(weights[f"layers.1.{n}"]) for n in "qkv"]
    assert [p.shape for p in parts] == [(24, 24), (12, 24), (12, 24)]
    assert np.array_equal(np.concatenate(parts), fused)
    gate_up = [dequantise(weights[f"layers.0.{n}"]) for n in ("gate", "up")]
    assert np.array_equal(
        np.concatenate(gate_up), tensors["model.layers.0.mlp.gate_up_proj.weight"]
    )
    assert all(not w.data.flags.writeable for w in weights.values())  # views of the mapped file


LLAMA, PHI = "Llama-2-7b", "Phi-4-mini"
Q = "model.layers.1.self_attn.q_proj.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"
STRICT: list[tuple[str, Callable[[Tensors], Any], str, str]] = [
    (LLAMA, lambda t: t.pop(Q), Q, "missing"),
    (LLAMA, lambda t: t.update({Q: t[Q][:-1]}), Q, r"\[23, 24\]"),
    (LLAMA, lambda t: t.update({Q: t[Q].T[:, :12].copy()}), Q, r"\[24, 12\]"),
    (LLAMA, lambda t: t.update(extra=t[Q]), "extra", "nothing in llama reads 'extra'"),
    (LLAMA, lambda t: t.update({Q[:-6] + "bias": t[Q][0]}), Q[:-6] + "bias", "nothing in llama"),
    (PHI, lambda t: t.update({QKV: t[QKV][:-1]}), QKV, "does not lie in it"),
    (PHI, lambda t: t.update({QKV: np.tile(t[QKV], (2, 1))}), QKV, "has 96 rows"),
]


@pytest.mark.parametrize(("name", "change", "field", "message"), STRICT)
def test_strict_both_ways(
    tmp_path: Path, name: str, change: Callable[[Tensors], Any], field: str, message: str
) -> None:
    path, _ = folder(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_harmless_leftovers(tmp_path: Path) -> None:
    """Old rotary buffers, and a copy of the embedding as a tied head."""

    def leave(t: Tensors) -> None:
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        t["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        t["lm_head.weight"] = t["model.embed_tokens.weight"]

    path, _ = folder(tmp_path, LLAMA, leave, tie_word_embeddings=True)
    assert "lm_head" not in load(path)

    def differ(t: Tensors) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"] + np.float32(1)

    path, _ = folder(tmp_path, LLAMA, differ, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs"):
        load(path)


def test_dtype_and_end_tokens_of_the_whole_checkpoint(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, LLAMA, torch_dtype="bfloat16")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = open_model(open_checkpoint(path))[1]
    assert config.dtype == "float32" and config.eos_token_ids == (2, 7)
    assert config.notes == ("config.json says bfloat16, the weights are float32",)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 30}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        open_model(open_checkpoint(path))


def test_a_config_tensor_is_bounded(tmp_path: Path) -> None:
    huge = np.ones(1 << 17, np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        {"general.architecture": "llama"},
        {"rope_freqs.weight": ("F32", huge.shape, huge.tobytes())},
    )
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight.*131072"):
        open_model(open_checkpoint(path))


@pytest.mark.parametrize(
    ("name", "family", "layers", "window"),
    [("smollm2", "llama", 30, 0), ("gemma3-270m", "gemma3", 18, 512)],
)
def test_real_gguf_files(name: str, family: str, layers: int, window: int) -> None:
    checkpoint = open_checkpoint(model_path(name))
    module, config = open_model(checkpoint)
    assert (config.family, config.num_layers, config.dtype) == (family, layers, "float32")
    assert config.windows[0] == window and config.tie_embeddings and config.notes == ()
    weights = raw_weights(checkpoint, module, config)
    assert set(weights) == set(models.record(module, config).weights)
    assert sum(w.nbytes for w in weights.values()) == checkpoint.total_bytes
