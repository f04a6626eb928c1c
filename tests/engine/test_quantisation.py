"""`quantization=` from the option to the answer: both backends alike, planned sizes, errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM, ConfigError, SamplingParams
from engineroom.engine.config import EngineConfig
from engineroom.engine.load.gguf import GgufFile
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.tools.inspect import inspect_model, render
from engineroom.kernels.cpu import _native
from engineroom.quant.policy import SCHEMES
from tests.data import data_path, model_path
from tests.load.stories260k import convert

EXACT: dict[str, Any] = {"activations": "float32", "kv_cache_dtype": "float32"}
methods = pytest.mark.parametrize("method", SCHEMES)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = data_path("stories260K/stories260K.bin").parent
    return convert(folder, tmp_path_factory.mktemp("stories260K"))


def greedy(path: Path, **options: Any) -> tuple[int, ...]:
    with LLM(str(path), max_num_seqs=2, max_model_len=128, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
        out = llm.generate(["Once upon a time"], params, use_tqdm=False)[0]
        return out.outputs[0].token_ids


@pytest.mark.torch
@methods
@pytest.mark.parametrize("form", ["hf", "F16", "Q8_0"])
def test_both_backends_quantise_alike(method: str, form: str, forms: dict[str, Path]) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    want = greedy(forms[form], device="reference", quantization=method, **EXACT)
    assert greedy(forms[form], device="cpu", quantization=method, **EXACT) == want


@methods
def test_the_plan_tells_sizes_and_what_stays(method: str, forms: dict[str, Path]) -> None:
    """stories260K: rows of 64, and down projections of 172 columns, which stay."""
    plain = inspect_model(EngineConfig(model=str(forms["F32"])))
    small = inspect_model(EngineConfig(model=str(forms["F32"]), quantization=method))
    text = render(small)
    assert small["memory"]["weights"] < plain["memory"]["weights"]
    assert f"quantised to   {method}, on load" in text
    assert f"quantised on load, {method}: " in text
    group = SCHEMES[method].layers.block_elements
    assert f"5 stay as they are: rows of 172 are no whole groups of {group}" in text
    assert plain["quantization"] is None and "quantised" not in render(plain)
    if method == "int8":
        head = _native.packed_bytes("INT8", 512, 64)
        assert small["memory"]["weights"] < plain["memory"]["weights"] / 2 + head


def test_what_cannot_be_asked_for(forms: dict[str, Path]) -> None:
    with pytest.raises(
        ConfigError, match="one of int8, int4, fp8, .*, not 'int3'; None keeps"
    ) as error:
        LLM(str(forms["F32"]), quantization="int3")
    assert error.value.field == "quantization"
    with pytest.raises(ConfigError, match=r"'int8' stores 8 bits .*Q4_1.* already"):
        LLM(str(model_path("smollm2")), quantization="int8")


def test_a_broken_tensor_is_named(forms: dict[str, Path], tmp_path: Path) -> None:
    path = str(shutil.copy(forms["F32"], tmp_path / "broken.gguf"))
    info = GgufFile(Path(path)).tensors["blk.1.attn_q.weight"]
    file = np.memmap(path, np.uint8, "r+")
    file[info.offset + 4 * 64 * 3 : info.offset + 4 * 64 * 3 + 4] = np.frombuffer(
        np.float32(np.nan).tobytes(), np.uint8
    )
    file.flush()
    with pytest.raises(CheckpointError, match=r"'blk.1.attn_q.weight': row 3 holds a NaN"):
        LLM(path, quantization="int4")
    LLM(path).close()


def test_a_real_model_keeps_its_answer() -> None:
    """SmolLM2 in five bits goes on in four and a half."""
    with LLM(str(model_path("smollm2")), quantization="int4", max_model_len=256) as llm:
        out = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=16),
        )[0]
    assert "Paris" in out.outputs[0].text
