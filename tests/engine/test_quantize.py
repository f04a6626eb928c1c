"""`engineroom quantize`, from a 16-bit folder to the answer of what was made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM
from engineroom.engine import models
from engineroom.engine.cli import main
from engineroom.engine.config import ConfigError
from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.runtime.assemble import linear_weights
from engineroom.engine.runtime.load import open_model, raw_weights
from engineroom.engine.tools import quantize_solve as quantising
from engineroom.engine.tools.calibration import Taps, cut_piece, taps
from engineroom.engine.tools.quantize import QuantizeConfig, quantize
from engineroom.engine.tools.quantize_gguf import quantize_gguf
from engineroom.engine.tools.texts import Text
from engineroom.kernels.backend import KVSpec, StepInputs
from engineroom.kernels.cpu.backend import CpuBackend
from engineroom.quant.rounding import Integers, round_to_nearest
from engineroom.quant.values import dequantise
from tests.data import data_path
from tests.load.published import write_model
from tests.load.stories260k import convert
from tests.load.writers import write_safetensors

TEXT = Text("a story", "Once upon a time there was a little girl who had a red ball. " * 60)
EXACT: dict[str, Any] = {
    "dtype": "float32",
    "activations": "float32",
    "kv_cache_dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bf16. Its norms make some columns of the inputs large, as trained ones'."""
    place = tmp_path_factory.mktemp("quantize")
    stories = data_path("stories260K/stories260K.bin").parent
    tokenizer = convert(stories, place)["hf"]
    path = write_model("FP8 of tensors", tokenizer, place / "made", rounded=True)[1]
    checkpoint = open_checkpoint(path)
    tensors: dict[str, Any] = {}
    for name in checkpoint.tensor_names:
        weight = checkpoint.tensor(name)
        tensors[name] = (weight.format.name, weight.shape, weight.data.tobytes())
        if "layernorm" in name:
            tensors[name] = np.where(np.arange(weight.shape[0]) % 29 == 3, 12, 1).astype(np.float32)
    checkpoint.close()
    write_safetensors(path / "model.safetensors", tensors)
    return path


def made(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"context": 64, "samples": 4, "device": "cpu", **options}
    return quantize(QuantizeConfig(model=str(folder), out=str(out), **options), TEXT)


def logprobs(path: Path) -> np.ndarray:
    with LLM(str(path), max_num_seqs=1, max_model_len=128, **EXACT) as llm:
        return np.concatenate([rows for _, rows in llm.score_stream(TEXT.text[:200])])


def matrices(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    found = {
        name: dequantise(checkpoint.tensor(name).made())
        for name in checkpoint.tensor_names
        if "_proj" in name
    }
    checkpoint.close()
    return found


FORMATS = {
    "W4A16": Integers(4, 128, True),
    "W4A16_ASYM": Integers(4, 128, False),
    "W8A16": Integers(8, -1, True),
    "W8A8": Integers(8, -1, True),
}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_what_was_rounded(format: str, folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "out", method="rtn", format=format)
    wide, small = matrices(folder), matrices(tmp_path / "out")
    assert wide.keys() == small.keys()
    for name, values in wide.items():
        expected = round_to_nearest(values, FORMATS[format]).values()
        np.testing.assert_array_equal(small[name], expected)


@pytest.mark.parametrize("format", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_is_read_to_four_bits_of_each_value(format: str, folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "out", method="rtn", format=format)
    wide, small = matrices(folder), matrices(tmp_path / "out")
    for name, values in wide.items():
        floor = np.abs(values).max() / 448 / 512
        assert (np.abs(small[name] - values) <= np.abs(values) / 14 + floor).all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_weights_are_nearer_than_rounded_ones(
    method: str, folder: Path, tmp_path: Path
) -> None:
    """By the logprobs of the calibration text itself; the written folder is loaded."""
    want = logprobs(folder)
    made(folder, tmp_path / "rtn", method="rtn", group_size=32)
    report = made(folder, tmp_path / method, method=method, group_size=32)
    far = [float(np.square(logprobs(tmp_path / x) - want).mean()) for x in ("rtn", method)]
    assert far[1] < far[0]
    assert 0 < report["mean_relative_error"] < 0.02


def test_what_awq_multiplies_columns_by_is_divided_out_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of two fold into norms and up layers exactly; what is left is rounding to 4 bits."""
    asked = []

    def scales(parts: Any, hessian: np.ndarray, *rest: Any) -> np.ndarray:
        asked.append(len(hessian))
        return factors(len(hessian))

    def factors(count: int) -> np.ndarray:
        return np.exp2(np.arange(count) % 3 - 1).astype(np.float32)

    monkeypatch.setattr(quantising.calibrate, "awq_scales", scales)
    made(folder, tmp_path / "awq", method="awq", group_size=32)
    assert asked == [128, 128, 256] * 2  # q, k and v; gate and up; down: not o, of grouped queries
    wide, small = matrices(folder), matrices(tmp_path / "awq")
    for name, values in wide.items():
        found = small[name]
        if "o_proj" not in name:
            found = found / factors(found.shape[1])
        if "up_proj" in name:
            found = found * factors(found.shape[0])[:, None]
        assert np.linalg.norm(found - values) < 0.2 * np.linalg.norm(values), name
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "awq")
    for name in before.tensor_names:
        if "layernorm" in name:
            norms = [dequantise(c.tensor(name)) for c in (before, after)]
            np.testing.assert_array_equal(norms[1] * factors(128), norms[0])
    before.close()
    after.close()


def test_a_killed_run_goes_on_and_makes_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folder, tmp_path / "whole", method="awq")
    solved = []
    solve = quantising.solve

    def dies(*arguments: Any) -> Any:
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(1)
        return solve(*arguments)

    monkeypatch.setattr(quantising, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path / "out", method="awq")
    assert not (tmp_path / "out").exists()
    counted = []
    monkeypatch.setattr(quantising, "solve", lambda *a: counted.append(1) or solve(*a))
    with pytest.raises(ConfigError, match="begun with other options"):
        made(folder, tmp_path / "out", method="gptq")
    made(folder, tmp_path / "out", method="awq")
    assert len(counted) == 8 - 5
    assert not (tmp_path / "out.work").exists()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_folder_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "out", method="gptq", format="W4A16_ASYM")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((folder / "config.json").read_text())
    assert settings["format"] == "pack-quantized"
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 128
    assert settings["ignore"] == ["lm_head"]
    assert (tmp_path / "out" / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "awq", "format": "W8A16"}, "awq makes 4-bit integers, not W8A16"),
        ({"method": "gptq", "format": "FP8_BLOCK"}, "gptq makes integers"),
        ({"format": "W3A16"}, "'W3A16' is not made"),
        ({"format": "W8A8", "group_size": 32}, "no groups to choose"),
        ({"group_size": 48}, "group_size is one of"),
        ({"context": 8192, "method": "gptq"}, "one sample takes 8192"),
    ],
)
def test_what_cannot_be_made_is_refused(
    options: dict[str, Any], why: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        made(folder, tmp_path / "out", **options)


def test_an_existing_folder_and_a_quantised_model_are_refused(folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "out", method="rtn")
    with pytest.raises(ConfigError, match="exists already"):
        made(folder, tmp_path / "out", method="rtn")
    with pytest.raises(ConfigError, match="is quantised already"):
        made(tmp_path / "out", tmp_path / "again", method="rtn")


def test_a_tap_is_the_value_of_the_whole_model_bit_for_bit(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    module, config = open_model(checkpoint)
    program = models.record(module, config.replace(dtype="float32"))
    weights = dict(raw_weights(checkpoint, module, config))
    backend = CpuBackend(activations="float32", threads=1)
    ids = np.random.default_rng(1).integers(3, 500, (2, 40)).astype(np.int32)
    found = taps(program, linear_weights(program)[:-1])
    assert [len(t.weights) for t in found] == [3, 1, 2, 1] * config.num_layers
    at, table = np.arange(40, dtype=np.int32), np.arange(3, dtype=np.int32)[None]
    spec = KVSpec(1, config.num_kv_heads, config.head_dim, 16, "float32")
    for tap, given in Taps(program, weights, backend, ids).go(found):
        whole, tables = cut_piece(program, tap.value, {}, 0)
        assert not tables
        packed = {name: backend.pack(weights[name]) for name in whole.weights}
        executable = backend.lower(whole, packed, backend.allocate_kv(spec, 3))
        ends = np.array([0, 40], np.int32)
        for i, sequence in enumerate(ids):
            step = StepInputs(sequence, at, ends, ends[1:], table, at, at)
            np.testing.assert_array_equal(
                executable.run(step).numpy(), given.rows[40 * i : 40 * i + 40]
            )


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_a_gguf_file_of_another(format: str, tmp_path: Path) -> None:
    """Its metadata is the same; the gguf package reads the same values of it as we do."""
    gguf = pytest.importorskip("gguf", reason="the oracle is the gguf package, which is absent")
    source = convert(data_path("stories260K/stories260K.bin").parent, tmp_path / "made")["F32"]
    out = tmp_path / "out.gguf"
    method = "rtn" if format == "Q8_0" else "imatrix"
    config = QuantizeConfig(
        model=str(source), out=str(out), format=format, method=method, context=32, samples=2
    )
    report = quantize_gguf(config, TEXT)
    checkpoint, before = open_checkpoint(out), open_checkpoint(source)
    read = gguf.GGUFReader(out)
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in read.tensors}
    made = 0
    for name in before.tensor_names:
        weight = checkpoint.tensor(name)
        np.testing.assert_array_equal(dequantise(weight), theirs[name].reshape(weight.shape))
        made += weight.format is not before.tensor(name).format
    assert made == report["weights"] > 0
    if format == "Q4_K":  # rows of 64 are no whole blocks of 256
        assert checkpoint.tensor("blk.0.attn_q.weight").format.name == "Q4_0"
    changed = {k for k, v in before.metadata.items() if checkpoint.metadata[k] != v}
    assert changed <= {"general.file_type"}
    checkpoint.close()
    before.close()
    with pytest.raises(ConfigError, match="exists already"):
        quantize_gguf(config, TEXT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "x", "-o", "y", "--method", "awq", "--format", "Q4_K"], "rtn, imatrix"),
        (["quantize", "x", "-o", "y", "--format", "W8A8", "--group-size", "32"], "no groups"),
        (["eval", "x", "--text", "no-such-file"], "no UTF-8 text can be read of it"),
    ],
)
def test_a_wrong_option_is_the_callers_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("engineroom: E-CONFIG-01")
    assert said in error
