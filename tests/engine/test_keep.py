"""`save=`: what is quantised on load is kept in a folder, from which the same answers come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM, ConfigError, SamplingParams
from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint
from engineroom.engine.runtime import keep
from engineroom.quant.own import SUFFIXES
from engineroom.quant.policy import SCHEMES
from tests.data import data_path
from tests.load.stories260k import convert
from tests.load.writers import to_bf16, write_safetensors


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = data_path("stories260K/stories260K.bin").parent
    made = convert(folder, tmp_path_factory.mktemp("stories260K"))
    made["bf16"] = made["hf"].with_name("bf16")
    shutil.copytree(made["hf"], made["bf16"])
    wide = open_checkpoint(made["hf"])
    tensors = {}
    for name in wide.tensor_names:
        tensor = wide.tensor(name)
        values = tensor.data.view(np.float32).reshape(tensor.shape)
        tensors[name] = ("BF16", tensor.shape, to_bf16(values))
    write_safetensors(made["bf16"] / "model.safetensors", tensors)
    return made


def answer(path: Path, **options: Any) -> tuple[tuple[int, ...], Any]:
    with LLM(str(path), max_num_seqs=2, max_model_len=128, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
        out = llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0]
        return out.token_ids, out.logprobs


@pytest.mark.parametrize("method", SCHEMES)
def test_answers_are_those_of_quantising_on_load(
    method: str, forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "small"
    want = answer(forms["bf16"], quantization=method)
    assert answer(forms["bf16"], quantization=method, save=str(folder)) == want
    assert answer(folder) == want
    monkeypatch.setattr(keep, "write_checkpoint", None)  # it is there: nothing is written again
    assert answer(forms["bf16"], quantization=method, save=str(folder)) == want
    names = open_checkpoint(folder).tensor_names
    assert names == open_checkpoint(forms["bf16"]).tensor_names
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert size < 0.9 * sum(p.stat().st_size for p in forms["bf16"].glob("*.safetensors"))


def test_each_tensor_is_read_once(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    as_packed = keep.as_packed
    monkeypatch.setattr(keep, "as_packed", lambda w, n: read.append(w.name) or as_packed(w, n))
    answer(forms["hf"], quantization="int4", save=str(tmp_path / "small"))
    assert read and len(read) == len(set(read))
    kept = open_checkpoint(tmp_path / "small")
    assert set(read) == {n for n in kept.tensor_names if kept.tensor(n).format.name[:3] == "INT"}


def test_what_cannot_be_kept(forms: dict[str, Path], tmp_path: Path) -> None:
    def refused(path: Path, words: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=words) as error:
            LLM(str(path), **options).close()
        assert error.value.field == "save"

    there = {"save": str(tmp_path / "small")}
    refused(forms["hf"], "needs quantization", **there)
    refused(forms["F16"], "is a GGUF file", quantization="int8", **there)
    answer(forms["hf"], quantization="int4", **there)
    refused(tmp_path / "small", "is quantised already", quantization="int4", save="other")
    refused(forms["hf"], "holds other weights than these", quantization="nf4", **there)
    copy = shutil.copytree(forms["hf"], tmp_path / "copy")
    with open(copy / "model.safetensors", "r+b") as file:  # other weights under the same scheme
        file.seek(-1, 2)
        file.write(b"\x3c")
    refused(copy, "holds other weights than these", quantization="int4", **there)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_another_width_are_named(suffix: str, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "engineroom", "scheme": "int8"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    fmt = SUFFIXES[suffix]
    width = fmt.row_bytes(256) - 1
    rows = ("U8", (3, width), bytes(3 * width))
    name = f"m.weight{suffix}"
    write_safetensors(tmp_path / "model.safetensors", {name: rows, "n": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match=f"{name}.*no row of {fmt.name}") as error:
        open_checkpoint(tmp_path)
    assert error.value.field == name
