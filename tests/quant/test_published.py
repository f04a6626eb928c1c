"""Published formats give the values that were packed; what does not fit is an error by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint
from engineroom.quant.values import dequantise
from tests.load.published import KINDS, tensor
from tests.load.writers import write_safetensors

kinds = pytest.mark.parametrize("kind", KINDS)
N, K = 200, 384


def write(folder: Path, settings: Any, tensors: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"m.q_proj{suffix}": t for suffix, t in tensors.items()}
    norm = {"m.norm.weight": np.ones(8, np.float16)}
    write_safetensors(folder / "model.safetensors", named | norm)
    return folder


def in_columns(values: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """Rows as their input has its columns."""
    if columns is None:
        return values
    out = np.empty_like(values)
    out[:, columns] = values
    return out


@kinds
def test_values_are_those_that_were_packed(kind: str, tmp_path: Path) -> None:
    settings, make, fmt = KINDS[kind]
    tensors, want = make(np.random.default_rng(1), N, K)
    c = open_checkpoint(write(tmp_path / "m", settings, tensors))
    assert c.quantised
    assert c.tensor_names[:1] == ("m.norm.weight",)
    assert "m.q_proj.weight" in c.tensor_names
    weight = c.tensor("m.q_proj.weight")
    assert (weight.format.name, weight.shape) == (fmt, (N, K))
    assert c.shape("m.q_proj.weight") == (N, K)
    assert (weight.columns is not None) == ("act-order" in kind)
    got = in_columns(dequantise(weight), weight.columns)
    if fmt == "BF16":  # bitsandbytes rounds to the dtype of its state
        assert np.abs(got - want).max() <= np.abs(want).max() * 2.0**-8
        bits = want.astype(np.float32).view(np.uint32)
        want = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(got, want)
    part = weight.rows(13, 150).rows(3, 100)
    np.testing.assert_array_equal(in_columns(dequantise(part), part.columns), want[16:113])
    for name in c.tensor_names:
        assert c.is_spare(name) == name.endswith("input_scale")


@kinds
def test_a_missing_or_odd_tensor_is_named(kind: str, tmp_path: Path) -> None:
    settings, make, _ = KINDS[kind]
    tensors, _ = make(np.random.default_rng(1), N, K)
    free = (".g_idx", ".weight_g_idx", ".weight_shape", ".input_scale", ".weight_format")
    for i, (suffix, (dtype, shape, data)) in enumerate(tensors.items()):
        if suffix in free:
            continue
        rest = {s: t for s, t in tensors.items() if s != suffix}
        with pytest.raises(CheckpointError, match="m.q_proj"):
            c = open_checkpoint(write(tmp_path / f"missing{i}", settings, rest))
            for name in set(c.tensor_names) - {"m.norm.weight"}:  # what is left is no weight
                c.tensor(name)
        if len(shape) < 2 and "quant_state" not in suffix:
            continue
        if suffix == ".weight" and ("tensor" in kind or "blocks" in kind):
            continue  # its scales fit a row less too: the model's shapes tell
        cut = tensor(dtype, np.zeros((shape[0] - 1, *shape[1:]), np.uint8))
        with pytest.raises(CheckpointError, match="m.q_proj") as error:
            open_checkpoint(write(tmp_path / f"cut{i}", settings, {**tensors, suffix: cut}))
        assert error.value.field.startswith("m.q_proj")
        assert len(data)


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"quant_method": "aqlm"}, "quant_method", "'aqlm'.*gptq, *'awq'|'aqlm'.*supported"),
        ({"bits": 4}, "quant_method", "None"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits", "5"),
        ({"quant_method": "gptq", "bits": 4.0, "group_size": 128}, "bits", "4.0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size", "16"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {}}}, "dynamic", "not known"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format",
            "marlin",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version", "gemv"),
        ({"quant_method": "awq", "bits": 3}, "bits", "3"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size", "64"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt", "e5m2"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit", "False"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups", "no scheme"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"a": {"targets": ["Linear"]}},
            },
            "config_groups.a.format",
            "marlin-24",
        ),
    ],
)
def test_options_that_are_not_known(settings: Any, field: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(
            write(tmp_path / "m", settings, {".weight": tensor("I8", np.zeros((2, 32)))})
        )
    assert error.value.field.endswith(field)


def modelopt_alone(folder: Path, kind: str, quantization: Any, name: str = "modelopt") -> Path:
    """What ModelOpt wrote before config.json said it too."""
    _, make, _ = KINDS[kind]
    tensors, _ = make(np.random.default_rng(1), N, K)
    write(folder, None, tensors)
    settings = {"producer": {"name": name, "version": "0.23.0"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    return folder


MODELOPT = {
    "NVFP4, ModelOpt": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"},
    "FP8 of tensors, ModelOpt": {"quant_algo": "FP8", "kv_cache_quant_algo": None},
}


@pytest.mark.parametrize("kind", MODELOPT)
def test_a_folder_whose_hf_quant_config_alone_says_how_it_was_quantised(
    kind: str, tmp_path: Path
) -> None:
    _, make, fmt = KINDS[kind]
    _, want = make(np.random.default_rng(1), N, K)
    alone = modelopt_alone(
        tmp_path / "m", kind, MODELOPT[kind] | {"exclude_modules": ["lm_head", "*norm*"]}
    )
    c = open_checkpoint(alone)
    assert c.quantised
    weight = c.tensor("m.q_proj.weight")
    assert weight.format.name == fmt
    np.testing.assert_array_equal(dequantise(weight), want)
    before = c.fingerprint()
    (alone / "hf_quant_config.json").write_text(
        (alone / "hf_quant_config.json").read_text().replace("0.23.0", "0.24.0")
    )
    assert open_checkpoint(alone).fingerprint() != before


@pytest.mark.parametrize(
    ("quantization", "name", "field", "words"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "modelopt", "quant_algo", "hf_quant_config.json: .*W4A8_AWQ"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "modelopt", "group_size", "32"),
        (
            {"quant_algo": "FP8", "pre_quant_scale": True},
            "modelopt",
            "pre_quant_scale",
            "not known",
        ),
        ({"quant_algo": "FP8"}, "another", "producer.name", "another"),
        (["FP8"], "modelopt", "quantization", "objects are expected"),
    ],
)
def test_an_hf_quant_config_that_is_not_known(
    quantization: Any, name: str, field: str, words: str, tmp_path: Path
) -> None:
    folder = modelopt_alone(tmp_path / "m", "NVFP4, ModelOpt", quantization, name)
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(folder)
    assert error.value.field.endswith(field)


def test_groups_that_are_no_whole_number_of_32_columns(tmp_path: Path) -> None:
    settings, make, _ = KINDS["gptq 4 bits, 128, act-order"]
    tensors, _ = make(np.random.default_rng(1), N, K)
    index = np.arange(K) // 128
    index[0] = 2
    tensors[".g_idx"] = tensor("I32", index)
    with pytest.raises(CheckpointError, match="gives group 0 127 columns"):
        open_checkpoint(write(tmp_path / "m", settings, tensors))
    tensors[".g_idx"] = tensor("I32", index + 1)
    with pytest.raises(CheckpointError, match="names groups 1..3; there are 3"):
        open_checkpoint(write(tmp_path / "n", settings, tensors))


def test_a_last_group_may_be_short(tmp_path: Path) -> None:
    settings, make, _ = KINDS["gptq 4 bits, 128"]
    tensors, want = make(np.random.default_rng(1), 64, 320)
    weight = open_checkpoint(write(tmp_path / "m", settings, tensors)).tensor("m.q_proj.weight")
    assert weight.format.name == "I4G32"
    np.testing.assert_array_equal(dequantise(weight), want)


def test_a_zero_point_of_0_borrows_from_the_next(tmp_path: Path) -> None:
    """GPTQ's version 1 is words of zero points less 0x11111111, of which nothing may get lost."""
    zeros = [0, 5, 0, 0, 15, 1, 8, 3]
    stored = 0x381F0050 - 0x11111111
    settings, _, _ = KINDS["gptq 4 bits, 128"]
    tensors = {
        ".qweight": tensor("I32", np.zeros((16, 8))),
        ".qzeros": tensor("I32", np.array([[stored]])),
        ".scales": tensor("F16", np.ones((1, 8))),
    }
    weight = open_checkpoint(write(tmp_path / "m", settings, tensors)).tensor("m.q_proj.weight")
    assert dequantise(weight)[:, 0].tolist() == [-zero for zero in zeros]


@pytest.mark.parametrize(
    "kind",
    ["gptq 4 bits, 128", "awq, 128", "FP8, row", "FP8 of blocks", "NVFP4", "W8A8, channel"],
)
def test_experts_in_one_tensor_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    settings, make, _ = KINDS[kind]
    tensors, _ = make(np.random.default_rng(1), N, K)
    two = {s: (dtype, (2, *shape), bytes(data) * 2) for s, (dtype, shape, data) in tensors.items()}
    with pytest.raises(CheckpointError, match=r"m\.q_proj.*experts in one tensor"):
        open_checkpoint(write(tmp_path / "m", settings, two)).tensor("m.q_proj.weight")
