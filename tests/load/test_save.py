"""A checkpoint that is written appears whole or not at all, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.load.save import Tensor, write_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
VALUES = {f"m.{i}.weight": np.arange(i, i + 32, dtype=np.float32).reshape(4, 8) for i in range(5)}


def tensors(made: list[str] | None = None, stop_at: str = "") -> list[Tensor]:
    def one(name: str) -> Tensor:
        def make() -> np.ndarray:
            if name == stop_at:
                raise OSError("disk full")
            if made is not None:
                made.append(name)
            return VALUES[name]

        return Tensor(name, "F32", (4, 8), make)

    return [one(name) for name in VALUES]


@pytest.mark.parametrize("shard_bytes", [1, 256, 1 << 20])
def test_what_is_written_is_read(shard_bytes: int, tmp_path: Path) -> None:
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    out = tmp_path / "deep" / "out"
    write_checkpoint(out, CONFIG, tensors(), [beside], shard_bytes=shard_bytes)
    checkpoint = open_checkpoint(out)
    assert set(checkpoint.tensor_names) == set(VALUES)
    for name, want in VALUES.items():
        got = checkpoint.tensor(name)
        np.testing.assert_array_equal(got.data.view(np.float32).reshape(4, 8), want)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "tokenizer.json").read_text() == "{}"
    shards = list(out.glob("*.safetensors"))
    assert len(shards) == {1: 5, 256: 3, 1 << 20: 1}[shard_bytes]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_other_readers_read_it(tmp_path: Path) -> None:
    numpy_reader = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    write_checkpoint(tmp_path / "out", CONFIG, tensors())
    got = numpy_reader.load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == VALUES.keys()
    for name, want in VALUES.items():
        np.testing.assert_array_equal(got[name], want)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    out, made = tmp_path / "out", list[str]()
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(out, CONFIG, tensors(made, "m.3.weight"), shard_bytes=256, key="a")
    assert not out.exists() and made == ["m.0.weight", "m.1.weight", "m.2.weight"]
    made.clear()
    seen: list[str] = []
    write_checkpoint(
        out, CONFIG, tensors(made), shard_bytes=256, key="a", progress=lambda t: seen.append(t.name)
    )
    assert made == ["m.2.weight", "m.3.weight", "m.4.weight"] and seen == list(VALUES)
    write_checkpoint(tmp_path / "at once", CONFIG, tensors(), shard_bytes=256, key="a")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "at once" / file.name).read_bytes()


def test_what_was_made_otherwise_is_made_anew(tmp_path: Path) -> None:
    out, made = tmp_path / "out", list[str]()
    with pytest.raises(OSError):
        write_checkpoint(out, CONFIG, tensors(stop_at="m.4.weight"), shard_bytes=1, key="a")
    write_checkpoint(out, CONFIG, tensors(made), shard_bytes=1 << 20, key="b")
    assert made == list(VALUES)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    def refused(*given: Tensor) -> CheckpointError:
        with pytest.raises(CheckpointError) as error:
            write_checkpoint(tmp_path / "out", CONFIG, given)
        assert not (tmp_path / "out").exists()
        return error.value

    ones = np.ones(2, np.float32)
    error = refused(Tensor("a", "F32", (2,), ones), Tensor("a", "F32", (2,), ones))
    assert error.field == "a" and "comes twice" in str(error)
    assert "is F64; a checkpoint holds" in str(refused(Tensor("a", "F64", (2,), ones)))
    assert "takes 12 bytes, 8 were made" in str(refused(Tensor("a", "F32", (3,), ones)))
    assert "without tensors" in str(refused())
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(tmp_path / "there", CONFIG, tensors())
