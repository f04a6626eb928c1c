"""One face over folders of safetensors and GGUF files; refusals that say how to mend."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint
from engineroom.quant.gguf import dequantise
from tests.data import data_path
from tests.load.stories260k import convert, gguf_tensors, hf_tensors, read_model, to_interleaved
from tests.load.writers import to_bf16, write_gguf, write_safetensors

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
W = np.arange(8, dtype=np.float32).reshape(2, 4)


def make_folder(folder: Path, config: Any = CONFIG, tensors: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors or {"a.weight": W, "b": W[0]})
    return folder


def test_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    c = open_checkpoint(folder)
    assert (c.kind, c.path, c.architecture) == ("safetensors", folder, "LlamaForCausalLM")
    assert c.metadata["hidden_size"] == 8
    assert c.generation_config == {"eos_token_id": [1, 2]}
    assert c.tensor_names == ("a.weight", "b")
    assert c.shape("a.weight") == (2, 4)
    assert c.total_bytes == 48
    assert (c.float_dtype, c.quantised, c.notes) == ("float32", False, ())
    np.testing.assert_array_equal(dequantise(c.tensor("a.weight")), W)
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.weigh'.*did you mean 'a\.weight'"):
        c.tensor("a.weigh")
    with pytest.raises(CheckpointError, match="no tensor"):
        c.shape("zzz")
    c.close()
    with pytest.raises(CheckpointError, match="was closed"):
        c.tensor("b")


@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_a_gguf_file(tmp_path: Path, inside_a_folder: bool) -> None:
    tensors = {
        "token_embd.weight": ("Q8_0", (2, 32), bytes(68)),
        "output_norm.weight": ("F32", (4,), bytes(16)),
    }
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "qwen2"}, tensors)
    c = open_checkpoint(tmp_path if inside_a_folder else path)
    assert (c.kind, c.path, c.architecture) == ("gguf", path, "qwen2")
    assert c.tensor_names == tuple(tensors)
    assert c.shape("token_embd.weight") == (2, 32)
    assert c.total_bytes == 84
    assert (c.float_dtype, c.quantised, c.notes) == ("float32", True, ())
    assert c.generation_config == {}
    c.close()


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_the_float_dtype_is_that_of_most_bytes(tmp_path: Path, kind: str, dtype: str) -> None:
    half = (kind, (4, 8), bytes(64))
    assert (
        open_checkpoint(
            make_folder(tmp_path / "m", tensors={"w": half, "norm": W[0], "norm2": W[1]})
        ).float_dtype
        == dtype
    )
    norm = ("F32", (4,), bytes(16))
    tensors = {"norm": norm, "norm2": norm, "w": half}
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    c = open_checkpoint(path)
    assert (c.float_dtype, c.quantised) == (dtype, False)


def test_shards_and_links_into_a_cache(tmp_path: Path) -> None:
    """The Hugging Face cache keeps files as links to blobs elsewhere; these are followed."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    write_safetensors(blobs / "1", {"a": W})
    write_safetensors(blobs / "2", {"b": ("BF16", (2, 4), to_bf16(W))})
    (blobs / "3").write_text(json.dumps(CONFIG))
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    (blobs / "4").write_text(json.dumps({"weight_map": weight_map}))
    names = ["m-1.safetensors", "m-2.safetensors", "config.json", "model.safetensors.index.json"]
    for blob, name in enumerate(names, 1):
        (folder / name).symlink_to(Path("../blobs") / str(blob))
    c = open_checkpoint(folder)
    assert c.tensor_names == ("a", "b")
    np.testing.assert_array_equal(dequantise(c.tensor("a")), W)
    np.testing.assert_array_equal(dequantise(c.tensor("b")), W)
    assert c.total_bytes == 32 + 16
    c.close()


def test_a_single_file_beside_an_index_is_used_and_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is ignored" in open_checkpoint(folder).notes[0]


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')\n"
    config = CONFIG | {
        "auto_map": {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"},
        "custom_code": True,
        "_attn_implementation_internal": "somebody/kernel",
        "a_key_nobody_knows": 1,
    }
    folder = make_folder(tmp_path / "m", config)
    for name in ("modeling_x.py", "__init__.py", "conftest.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    c = open_checkpoint(folder)
    assert dequantise(c.tensor("b")).tolist() == [0, 1, 2, 3]
    assert not canary.exists()
    assert "auto_map, custom_code, _attn_implementation_internal" in c.notes[0]
    assert "never run" in c.notes[0] and "modeling_x.py" in c.notes[1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.pkl", "m.ckpt"])
@pytest.mark.parametrize("by_file", [False, True])
def test_pickle_is_refused_with_the_way_out(tmp_path: Path, name: str, by_file: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / name if by_file else tmp_path)
    message = str(error.value)
    assert name in message and "weights_only=True" in message
    ast.parse(advice_in(message))
    assert 'save_file(state, "model.safetensors"' in message


def test_the_advice_for_pickles_works(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the advice converts with torch")
    pytest.importorskip("safetensors.torch", reason="the advice converts with safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shared = torch.from_numpy(W)
    torch.save({"a": shared, "b": shared.T, "c": shared}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    script = tmp_path / "advice.py"
    script.write_text(advice_in(str(error.value)))
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, timeout=120)
    c = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(dequantise(c.tensor("b")), W.T)
    np.testing.assert_array_equal(dequantise(c.tensor("c")), W)


def advice_in(message: str) -> str:
    """The Python lines of a refusal: all but its first line."""
    return textwrap.dedent(message.split("\n", 1)[1])


def test_checkpoint_quantisation_is_named(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "aqlm"}}
    with pytest.raises(CheckpointError, match=r"is 'aqlm'.*supported: 'gptq'.*16-bit") as error:
        open_checkpoint(make_folder(tmp_path / "m", config))
    assert error.value.field == "quantization_config.quant_method"
    config = CONFIG | {"quantization_config": None}
    assert open_checkpoint(make_folder(tmp_path / "n", config)).quantised is False


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("[]", "config.json", "not an object"),
        ("", "config.json", "Expecting value"),
        ('{"a": 1, "a": 2}', "config.json", "'a' appears twice"),
        ('{"a": Infinity}', "config.json", "not JSON"),
        ("{" * 100_000, "config.json", "Expecting"),
        ('{"a":' * 100_000, "config.json", "nested too deeply"),
        ("{}", "architectures", "must name the model class"),
        ('{"architectures": []}', "architectures", "must name"),
        ('{"architectures": [3]}', "architectures", "must name"),
        ('{"architectures": ["../x"]}', "architectures", "must name"),
        (json.dumps({"architectures": ["x" * 129]}), "architectures", "must name"),
        ('{"architectures": "Llama"}', "architectures", "must name"),
        (" " * (1 << 22) + "{}", "config.json", "at most 4194304"),
    ],
)
def test_a_config_that_is_not_one(tmp_path: Path, text: str, field: str, words: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        open_checkpoint(folder)
    assert error.value.field == field and words in str(error.value)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(folder)


def test_what_is_missing_is_listed_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"missing config\.json and model\.safetensors.*nothing"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"missing model\.safetensors.*readme\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder: /"):
        open_checkpoint(tmp_path / "gone")
    write_safetensors(tmp_path / "model.safetensors", {"a": W})
    with pytest.raises(CheckpointError, match="give the folder"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing config\.json, and"):
        open_checkpoint(tmp_path)


def test_several_gguf_files_in_a_folder_want_a_choice(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, {"general.architecture": "llama"}, {})
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "b.gguf").path == tmp_path / "b.gguf"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_close_unmaps_and_a_refused_file_is_not_left_mapped(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    folder, before = make_folder(tmp_path / "m"), descriptors()
    c = open_checkpoint(folder)
    assert mapped() == 1
    view = c.tensor("a.weight")
    c.close()
    assert mapped() == 1, "a view that is still held keeps its bytes"
    del view
    assert mapped() == 0
    (folder / "model.safetensors").write_bytes(b"\x07" * 64)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert mapped() == 0 and descriptors() == before, f"while {error} keeps the frames alive"
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(folder)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "bad.gguf")
    assert mapped() == 0 and descriptors() == before, f"while {error} keeps the frames alive"


# ------------------------------------------------------------------------------- stories260K


def test_the_stories260k_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    data = data_path("stories260K")
    paths = convert(data, tmp_path)
    model = read_model(data / "stories260K.bin")
    source = gguf_tensors(model)
    hf = open_checkpoint(paths["hf"])
    forms = {kind: open_checkpoint(paths[kind]) for kind in ("F32", "F16", "Q8_0")}
    assert set(hf.tensor_names) == set(hf_tensors(model)) and len(hf.tensor_names) == 47
    assert all(set(c.tensor_names) == set(source) for c in forms.values())
    for i in range(model.n_layers):
        for name, ours, heads in (
            ("q", "attn_q", model.n_heads),
            ("k", "attn_k", model.n_kv_heads),
        ):
            rows = dequantise(hf.tensor(f"model.layers.{i}.self_attn.{name}_proj.weight"))
            stored = source[f"blk.{i}.{ours}.weight"]
            np.testing.assert_array_equal(to_interleaved(rows, heads), stored)
            assert not np.array_equal(rows, stored)
        down = dequantise(hf.tensor(f"model.layers.{i}.mlp.down_proj.weight"))
        np.testing.assert_array_equal(down, source[f"blk.{i}.ffn_down.weight"])
    for name, values in source.items():
        np.testing.assert_array_equal(dequantise(forms["F32"].tensor(name)), values)
        half = dequantise(forms["F16"].tensor(name))
        wanted = values if values.ndim == 1 else values.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(half, wanted)
        weight = forms["Q8_0"].tensor(name)
        kind = "F32" if values.ndim == 1 else "F16" if values.shape[1] % 32 else "Q8_0"
        assert weight.format.name == kind, name
        limit = np.abs(values).max() / 127 * 0.63  # half a step and the scale's own rounding
        assert np.abs(dequantise(weight) - values).max() <= limit, name
    assert [c.float_dtype for c in forms.values()] == ["float32", "float16", "float32"]
    assert forms["Q8_0"].quantised and not forms["F16"].quantised
    tokens = forms["F32"].metadata["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[259] == "\u2581t"


def test_the_written_tokenizer_model_is_one(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    paths = convert(data_path("stories260K"), tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(paths["hf"] / "tokenizer.model"))
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.vocab_size()) == (0, 1, 2, 512)
    assert sp.is_byte(3) and sp.is_byte(258) and not sp.is_byte(259) and sp.is_control(1)
    text = "Once upon a  time, été\n"
    assert sp.decode(sp.encode(text)) == text
    tokens = open_checkpoint(paths["F32"]).metadata["tokenizer.ggml.tokens"]
    assert tokens == [sp.id_to_piece(i) for i in range(512)]
