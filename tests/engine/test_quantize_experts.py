"""`engineroom quantize` of a mixture of experts: each expert by the tokens that chose it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM
from engineroom.engine.config import ConfigError
from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.tools.calibration import Given, Taps, taps
from engineroom.engine.tools.quantize import QuantizeConfig, quantize, render
from engineroom.engine.tools.quantize_model import open_for_quantising
from engineroom.engine.tools.texts import Text
from engineroom.kernels.cpu.backend import CpuBackend
from engineroom.quant.rounding import Integers, round_to_nearest
from engineroom.quant.values import dequantise
from tests.data import data_path
from tests.load.stories260k import convert
from tests.load.writers import write_safetensors

TEXT = Text("a story", "Once upon a time there was a little girl who had a red ball. " * 60)
HIDDEN, FFN, EXPERTS, TOP, LAYERS, HEAD = 128, 64, 6, 2, 2, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE in bf16: experts, and one that every token goes through beside them."""
    place = tmp_path_factory.mktemp("experts")
    tokenizer = convert(data_path("stories260K/stories260K.bin").parent, place)["hf"]
    path = place / "model"
    shutil.copytree(tokenizer, path)
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
        "hidden_size": HIDDEN, "intermediate_size": 128, "moe_intermediate_size": FFN,
        "shared_expert_intermediate_size": 128, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP, "norm_topk_prob": True, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD,
        "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(4)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj": (4 * HEAD, HIDDEN) for x in "q"}
        shapes |= {f"{at}.self_attn.{x}_proj": (2 * HEAD, HIDDEN) for x in "kv"}
        shapes |= {f"{at}.self_attn.o_proj": (HIDDEN, 4 * HEAD)}
        shapes |= {f"{at}.mlp.gate": (EXPERTS, HIDDEN), f"{at}.mlp.shared_expert_gate": (1, HIDDEN)}
        inner = {f"experts.{e}": FFN for e in range(EXPERTS)} | {"shared_expert": 128}
        for name, size in inner.items():
            shapes |= {f"{at}.mlp.{name}.{x}_proj": (size, HIDDEN) for x in ("gate", "up")}
            shapes[f"{at}.mlp.{name}.down_proj"] = (HIDDEN, size)
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.5 / shape[1] ** 0.5 * 2)
        bits = (values.view(np.uint32) >> 16).astype("<u2")
        tensors[f"{name}.weight"] = ("BF16", shape, bits.tobytes())
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = np.where(np.arange(HIDDEN) % 29 == 3, 12, 1)
            tensors[f"{at}.{norm}.weight"] = gain.astype(np.float32)
        for x, heads in (("q", 4), ("k", 2), ("v", 2)):
            tensors[f"{at}.self_attn.{x}_proj.bias"] = np.zeros(heads * HEAD, np.float32)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    write_safetensors(path / "model.safetensors", tensors)
    return path


def made(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"context": 96, "samples": 8, "device": "cpu", "group_size": 32, **options}
    return quantize(QuantizeConfig(model=str(folder), out=str(out), **options), TEXT)


def matrices(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    names = [n for n in checkpoint.tensor_names if n.endswith("_proj.weight")]
    found = {name: dequantise(checkpoint.tensor(name).made()) for name in names}
    checkpoint.close()
    return found


def logprobs(path: Path) -> np.ndarray:
    exact = {"dtype": "float32", "activations": "float32", "kv_cache_dtype": "float32"}
    with LLM(str(path), device="cpu", max_num_seqs=1, max_model_len=128, **exact) as llm:
        return np.concatenate([rows for _, rows in llm.score_stream(TEXT.text[:200])])


def test_rounding_to_nearest_takes_a_matrix_an_expert(folder: Path, tmp_path: Path) -> None:
    report = made(folder, tmp_path / "out", method="rtn")
    wide, small = matrices(folder), matrices(tmp_path / "out")
    assert len(small) == LAYERS * (4 + 3 * (EXPERTS + 1))
    for name, values in wide.items():
        expected = round_to_nearest(values, Integers(4, 32, True)).values()
        np.testing.assert_array_equal(small[name], expected)
    assert report["experts"] == {"few_tokens": 0, "of": 3 * LAYERS * EXPERTS}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gates = {f"model.layers.{i}.mlp.{x}" for i in range(2) for x in ("gate", "shared_expert_gate")}
    assert set(settings["ignore"]) == {"lm_head"} | gates


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_experts_are_nearer_than_rounded_ones(
    method: str, folder: Path, tmp_path: Path
) -> None:
    want = logprobs(folder)
    made(folder, tmp_path / "rtn", method="rtn")
    report = made(folder, tmp_path / method, method=method)
    far = [float(np.square(logprobs(tmp_path / x) - want).mean()) for x in ("rtn", method)]
    assert far[1] < far[0]
    assert report["experts"]["few_tokens"] == 0
    small, nearest = matrices(tmp_path / method), matrices(tmp_path / "rtn")
    for kind in ("gate", "up", "down"):  # experts' matrices are not just rounded
        name = f"model.layers.0.mlp.experts.1.{kind}_proj.weight"
        assert (small[name] != nearest[name]).any()


def test_experts_that_saw_too_few_tokens_are_rounded_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    """Of 16 tokens, an eighth of 128 columns, not all choose the same two experts."""
    made(folder, tmp_path / "rtn", method="rtn")
    report = made(folder, tmp_path / "few", method="gptq", context=16, samples=1)
    small, nearest = matrices(tmp_path / "few"), matrices(tmp_path / "rtn")
    same = [n for n in small if ".experts." in n and (small[n] == nearest[n]).all()]
    few = report["experts"]["few_tokens"]
    assert 0 < few == len(same)
    assert f"{few} of 36 matrices of experts saw too few tokens" in render(report)


def test_rows_go_to_the_experts_that_the_router_chose(folder: Path) -> None:
    """And the columns of an expert are what its own gate and up layers make of the row."""
    checkpoint = open_checkpoint(folder)
    model = open_for_quantising(checkpoint, "W4A16", 64)
    ids = np.random.default_rng(1).integers(3, 500, (2, 40)).astype(np.int32)
    backend = CpuBackend(activations="float32", threads=1)
    given: dict[str, Given] = {}
    for tap, rows in Taps(model.program, model.weights, backend, ids).go(
        taps(model.program, model.names)
    ):
        given |= dict.fromkeys(tap.weights, rows)

    def weight(name: str) -> np.ndarray:
        return dequantise(checkpoint.tensor(f"model.layers.1.mlp.{name}.weight"))

    inner, outer = given["layers.1.up_experts"], given["layers.1.down_experts"]
    best = np.argsort(-(inner.rows @ weight("gate").T), axis=1)[:, :TOP]
    np.testing.assert_array_equal(inner.experts, best)
    np.testing.assert_array_equal(outer.experts, best)
    assert not inner.own_columns
    assert outer.own_columns
    for e in range(EXPERTS):
        token = np.nonzero(best == e)[0]
        np.testing.assert_array_equal(inner.of(e), inner.rows[token])
        gate, up = (inner.rows[token] @ weight(f"experts.{e}.{x}_proj").T for x in ("gate", "up"))
        np.testing.assert_allclose(outer.of(e), gate / (1 + np.exp(-gate)) * up, atol=2e-4)
    assert sum(len(outer.of(e)) for e in range(EXPERTS)) == 80 * TOP
    checkpoint.close()


def test_experts_in_one_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "stacked")
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, Any] = {}
    parts: dict[str, list[bytes]] = {}
    for name in checkpoint.tensor_names:
        weight = checkpoint.tensor(name)
        if ".experts." not in name:
            tensors[name] = (weight.format.name, weight.shape, weight.data.tobytes())
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts"
        for e in range(EXPERTS):
            raw = {
                x: checkpoint.tensor(f"{at}.{e}.{x}_proj.weight").data.tobytes()
                for x in ("gate", "up", "down")
            }
            parts.setdefault(f"{at}.gate_up_proj", []).append(raw["gate"] + raw["up"])
            parts.setdefault(f"{at}.down_proj", []).append(raw["down"])
    for name, each in parts.items():
        shape = (EXPERTS, 2 * FFN, HIDDEN) if "gate_up" in name else (EXPERTS, HIDDEN, FFN)
        tensors[name] = ("BF16", shape, b"".join(each))
    write_safetensors(tmp_path / "stacked" / "model.safetensors", tensors)
    checkpoint.close()
    with pytest.raises(ConfigError, match="in one tensor"):
        made(tmp_path / "stacked", tmp_path / "out", method="rtn")
