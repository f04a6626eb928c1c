"""What is resident while a model is quantised on load, and in the end, against the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine.load.gguf import GgufFile
from engineroom.kernels.weights import FORMATS
from tests.counts import FULL, count
from tests.data import data_path
from tests.load.published import KINDS
from tests.load.stories260k import convert
from tests.load.writers import write_gguf, write_safetensors

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux has it"
)

HIDDEN = count(reduced=512, full=1024)
FFN, HEADS, LAYERS = HIDDEN * 11 // 4, HIDDEN // 64, 8
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)  # in 16 bits
# Of what is planned. Mappings end on whole huge pages, which weighs more where all is small.
TOLERANCE = 0.05 if FULL else 0.1


AS_THEY_ARE = ["Q4_0", "W4A16, 128"]  # loaded, not quantised
if FULL:
    AS_THEY_ARE += ["Q8_0", "Q4_K", "gptq 4 bits, 128, act-order", "awq, 128", "W8A16, channel"]


def bf16(rng: np.random.Generator, n: int, k: int) -> tuple[str, tuple[int, int], bytes]:
    values = rng.standard_normal(n * k, np.float32) * np.float32(0.02)
    return "BF16", (n, k), (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def matrices(layers: int, hidden: int, ffn: int) -> dict[str, tuple[int, int]]:
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    shapes |= {"mlp.down_proj": (hidden, ffn)}
    return {
        f"model.layers.{i}.{module}": shape
        for i in range(layers)
        for module, shape in shapes.items()
    }


def write_llama(
    tokenizer: Path, folder: Path, layers: int, hidden: int, ffn: int, kind: str = ""
) -> Path:
    """A random Llama in bfloat16 or as published.KINDS has it, with this vocabulary."""
    rng = np.random.default_rng(5)
    config: dict[str, Any] = json.loads((tokenizer / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config |= {"head_dim": 64, "torch_dtype": "bfloat16"}
    tensors: dict[str, Any] = {}
    for name, (n, k) in matrices(layers, hidden, ffn).items():
        if kind:
            settings, make, _ = KINDS[kind]
            config["quantization_config"] = settings
            tensors |= {f"{name}{suffix}": t for suffix, t in make(rng, n, k)[0].items()}
        else:
            tensors[f"{name}.weight"] = bf16(rng, n, k)
    tensors["model.embed_tokens.weight"] = bf16(rng, config["vocab_size"], hidden)
    ones = np.ones(hidden, np.float32)
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = ones
    tensors["model.norm.weight"] = ones
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_llama_gguf(like: Path, path: Path, layers: int, hidden: int, ffn: int, kind: str) -> Path:
    """The same Llama as a GGUF file, blocks of random integers with one scale."""
    rng = np.random.default_rng(5)
    file = GgufFile(like)
    metadata = dict(file.metadata)
    file.close()
    kinds = {"add_bos_token": bool, "token_type": list, "tokens": list, "scores": list}
    assert all(isinstance(metadata[f"tokenizer.ggml.{name}"], t) for name, t in kinds.items())
    heads = hidden // 64
    metadata |= {"llama.embedding_length": hidden, "llama.block_count": layers}
    metadata |= {"llama.feed_forward_length": ffn, "llama.rope.dimension_count": 64}
    metadata |= {"llama.attention.head_count": heads, "llama.attention.head_count_kv": heads}
    ones = np.ones(hidden, "<f4").tobytes()
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        "output_norm.weight": ("F32", (hidden,), ones)
    }
    fmt = FORMATS[kind]

    def add(name: str, n: int, k: int) -> None:
        blocks = rng.integers(0, 256, (n * k // fmt.block_elements, fmt.block_bytes), np.uint8)
        for i in range(sum(dtype == "f2" for _, dtype, _ in fmt.layout)):
            blocks[:, 2 * i : 2 * i + 2] = np.array([1e-4], "<f2").view(np.uint8)
        tensors[f"{name}.weight"] = (kind, (n, k), blocks.tobytes())

    names = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        "self_attn.o_proj": "attn_output"
    }
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, (n, k) in matrices(layers, hidden, ffn).items():
        layer, module = name.removeprefix("model.layers.").split(".", 1)
        add(f"blk.{layer}.{names[module]}", n, k)
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = ("F32", (hidden,), ones)
    add("token_embd", int(metadata["llama.vocab_size"]), hidden)
    return write_gguf(path, metadata, tensors)


Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny model and one to measure, of a kind."""
    place = tmp_path_factory.mktemp("resident")
    forms = convert(data_path("stories260K/stories260K.bin").parent, place / "stories")
    sizes = {"tiny": (1, 256, 256), "model": (LAYERS, HIDDEN, FFN)}

    @cache
    def written(kind: str) -> tuple[Path, Path]:
        out = []
        for name, size in sizes.items():
            at = place / f"{name} {kind}"
            if kind in FORMATS:
                out.append(write_llama_gguf(forms["F32"], at.with_suffix(".gguf"), *size, kind))
            else:
                out.append(write_llama(forms["hf"], at, *size, kind))
        return out[0], out[1]

    return written


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind, method",
    [("", "int8"), ("", "int4"), *((kind, "none") for kind in AS_THEY_ARE)],
)
def test_loading_holds_no_more_than_the_quantised_size_and_one_layer_in_16_bits(
    kind: str, method: str, models: Models
) -> None:
    command = [sys.executable, "-m", "tests.engine.resident_child", method]
    done = subprocess.run([*command, *map(str, models(kind))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["loading"] <= sizes["weights"] + LAYER_BYTES, sizes
    # Of the largest step one row of logits is missing, another request's.
    assert 0.95 <= sizes["workspace"] / sizes["workspace planned"] <= 1, sizes
    planned = sizes["weights"] + sizes["kv"] + sizes["workspace planned"]
    assert sizes["peak"] == pytest.approx(planned, rel=TOLERANCE), sizes
