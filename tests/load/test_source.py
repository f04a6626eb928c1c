"""Where a model comes from, and what a wrong name is answered with."""

from __future__ import annotations

import os
import socket
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.fetch import FetchError
from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.load.source import SourceError, resolve


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **rest: object) -> None:
        raise AssertionError("a local path touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def safetensors_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model-1.safetensors").write_bytes(b"")
    (path / "model-2.safetensors").write_bytes(b"")
    return path


def refused(model: str, code: str) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(model)
    assert caught.value.code == code
    assert "repo id" not in str(caught.value).lower()
    return str(caught.value)


def test_a_folder_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = safetensors_folder(tmp_path / "my-model")
    file = tmp_path / "other.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(folder)).path == folder
    assert resolve(str(folder)).name == "my-model"
    assert resolve(str(file)).path == file
    assert resolve(str(file)).name == "other"
    monkeypatch.chdir(tmp_path)
    assert resolve("my-model").path == folder  # relative: the result is absolute
    assert resolve("./other.gguf").path == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/my-model").path == folder


def test_links_are_followed(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "model")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert resolve(str(link)).path.samefile(folder)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "gone")
    assert "symbolic link" in refused(str(dangling), "E-MODEL-01")


def test_a_path_wins_over_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = safetensors_folder(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2").path == folder


def test_a_mistyped_path_names_what_was_tried_and_the_nearest(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "models" / "llama")
    said = refused(str(tmp_path / "modles" / "lama"), "E-MODEL-01")
    assert f"No model at {tmp_path}/modles/lama (does not exist)" in said
    assert f"Nearest: {folder} (config.json, 2 safetensors)" in said
    assert "a short name (smollm2" in said


def test_a_mistyped_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    said = refused(str(tmp_path / "model-q5.gguf"), "E-MODEL-01")
    assert f"Nearest: {tmp_path}/model-q4.gguf (a .gguf file)" in said


def test_a_mistyped_relative_path_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = safetensors_folder(tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    assert f"Nearest: {folder}" in refused("models/lama", "E-MODEL-01")


def test_a_mistyped_short_name_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Nearest short name: smollm2" in refused("smolm2", "E-MODEL-01")
    assert "Nearest short name: smollm2" in refused("SmolLM2", "E-MODEL-01")


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_a_name_that_is_none(name: str) -> None:
    refused(name, "E-MODEL-01")


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    safetensors_folder(tmp_path / "inner")
    said = refused(str(tmp_path), "E-MODEL-02")
    assert "inner, notes.txt" in said
    assert f"Nearest: {tmp_path}/inner (config.json, 2 safetensors)" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it is empty" in refused(str(empty), "E-MODEL-02")


def test_a_weights_file_names_its_folder(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path / "model")
    said = refused(str(folder / "model-1.safetensors"), "E-MODEL-02")
    assert said.endswith(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "model.ckpt"])
def test_a_pickle_is_left_to_the_one_who_says_how_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path / name, tmp_path):
        if path.is_file() or name.islower():
            with pytest.raises(CheckpointError, match="pickle"):
                open_checkpoint(resolve(str(path)).path)


def test_special_files_are_refused_without_being_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)  # opening it would wait for a writer for ever
    assert "a named pipe" in refused(str(pipe), "E-MODEL-02")
    assert "a character device" in refused("/dev/null", "E-MODEL-02")


def test_a_short_name_is_fetched_and_its_troubles_keep_their_code(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"

    def fetcher(entry: Any, **rest: object) -> Path:
        assert entry.name == "smollm2"
        return file

    source = resolve("smollm2", fetcher=fetcher)
    assert (source.path, source.name) == (file, "smollm2")

    def broken(entry: Any, **rest: object) -> Path:
        raise FetchError("E-FETCH-01", "no network")

    with pytest.raises(SourceError, match="no network") as caught:
        resolve("smollm2", fetcher=broken)
    assert caught.value.code == "E-FETCH-01"


# ------------------------------------------------------------------------- the hub, as a stub


class _Hub(types.ModuleType):
    """What source.py uses of huggingface_hub, with a repository's files given."""

    def __init__(self, files: list[str] | Exception, folder: Path, local: bool = False) -> None:
        super().__init__("huggingface_hub")
        self.calls: list[tuple[str, Any]] = []

        class HfHubHTTPError(Exception):
            pass

        class LocalEntryNotFoundError(Exception):
            pass

        self.errors = SimpleNamespace(
            HfHubHTTPError=HfHubHTTPError, LocalEntryNotFoundError=LocalEntryNotFoundError
        )
        hub = self

        class HfApi:
            def model_info(self, model: str, revision: str | None) -> Any:
                hub.calls.append(("model_info", revision))
                if isinstance(files, Exception):
                    raise files
                return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files])

        self.HfApi = HfApi

        def snapshot_download(model: str, **options: Any) -> str:
            hub.calls.append(("snapshot", options))
            if options.get("local_files_only") and not local:
                raise LocalEntryNotFoundError
            return str(folder)

        def hf_hub_download(model: str, name: str, revision: str | None) -> str:
            hub.calls.append(("file", name))
            return str(folder / name)

        self.snapshot_download = snapshot_download
        self.hf_hub_download = hf_hub_download


def use(hub: _Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Hub:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    hub.__spec__ = SimpleNamespace(name="huggingface_hub")  # type: ignore[assignment]
    return hub


def test_a_hub_id_fetches_weights_and_configuration_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_evil.py"]
    hub = use(_Hub(files, tmp_path), monkeypatch, tmp_path)
    source = resolve("someone/model", revision="abc")
    assert (source.path, source.name) == (tmp_path, "someone/model")
    options = hub.calls[-1][1]
    assert options["revision"] == "abc"
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def test_a_hub_id_with_one_gguf_fetches_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(_Hub(["README.md", "m.gguf"], tmp_path), monkeypatch, tmp_path)
    assert resolve("someone/model").path == tmp_path / "m.gguf"


def test_a_hub_id_with_many_gguf_asks_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(_Hub(["a-q4.gguf", "b-q8.gguf"], tmp_path), monkeypatch, tmp_path)
    assert "holds 2 .gguf files (a-q4.gguf, b-q8.gguf)" in refused("someone/model", "E-MODEL-03")


def test_offline_a_complete_earlier_download_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(_Hub(ConnectionError("down"), tmp_path, local=True), monkeypatch, tmp_path)
    assert resolve("someone/model").path == tmp_path


def test_offline_without_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(_Hub(ConnectionError("down"), tmp_path), monkeypatch, tmp_path)
    said = refused("someone/model", "E-MODEL-03")
    assert f"nothing lies at {tmp_path}/someone/model" in said
    assert "the hub did not answer" in said


def test_a_mistyped_path_that_could_be_a_hub_id_names_the_nearest_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = safetensors_folder(tmp_path / "models" / "llama")
    use(_Hub(ConnectionError("no route"), tmp_path), monkeypatch, tmp_path)
    said = refused("modles/llama", "E-MODEL-03")
    assert f"nothing lies at {tmp_path}/modles/llama" in said
    assert f"Nearest: {folder} (config.json, 2 safetensors)" in said


def test_what_the_hub_refuses_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub([], tmp_path)
    refusal = hub.errors.HfHubHTTPError("404 Client Error: no such repository")
    hub = use(_Hub(refusal, tmp_path), monkeypatch, tmp_path)
    hub.errors.HfHubHTTPError = type(refusal)
    assert "404 Client Error" in refused("someone/model", "E-MODEL-03")
    assert hub.calls == [("model_info", None)]


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'engineroom[hub]'" in refused("someone/model", "E-MODEL-03")
