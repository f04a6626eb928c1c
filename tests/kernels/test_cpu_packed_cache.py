"""Tiles kept in a file: mapped where they are what would be packed, else packed and written."""

from __future__ import annotations

import dataclasses
import errno
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.cpu.packed_cache import PackedCache
from engineroom.kernels.weights import FORMATS, RawWeight

pytestmark = pytest.mark.cores

SHAPES = {"Q4_1": (70, 96), "BF16": (49, 37), "Q6_K": (48, 512), "F32": (1, 5)}


@pytest.fixture
def parts(tmp_path: Path) -> list[RawWeight]:
    """Weights as views of one mapped file, in which each begins where the one before ends."""
    sizes = [FORMATS[name].row_bytes(k) * n for name, (n, k) in SHAPES.items()]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(np.random.default_rng(1).bytes(sum(sizes)))
    with checkpoint.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    made, at = [], 0
    for (name, shape), size in zip(SHAPES.items(), sizes, strict=True):
        data = np.frombuffer(mapped, np.uint8, size, at)
        made.append(RawWeight(f"blk.{name}", FORMATS[name], shape, {"data": data}))
        at += size
    return made


class Packer:
    """Packs, and remembers what."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, parts: Sequence[RawWeight]) -> list[_native.PackedMatrix]:
        self.names += all_names(parts)
        return [_native.pack(part.format.name, part.data, *part.shape, 1) for part in parts]


def start(path: Path, parts: list[RawWeight], key: str = "key") -> tuple[list[str], list[bytes]]:
    """What one start of an engine packs, and all its tiles."""
    packer, cache = Packer(), PackedCache(path, key)
    tiles = [cache.tiles([part], packer)[0] for part in parts]
    cache.save()
    for part, matrix in zip(parts, tiles, strict=True):
        assert (matrix.format, matrix.shape) == (part.format.name, part.shape)
    return packer.names, [bytes(_native.tiles_of(matrix)) for matrix in tiles]


def all_names(parts: Sequence[RawWeight]) -> list[str]:
    return [part.name for part in parts]


def test_the_second_start_packs_nothing(tmp_path: Path, parts: list[RawWeight]) -> None:
    path = tmp_path / "cache" / "tiles"
    want = [bytes(_native.tiles_of(matrix)) for matrix in Packer()(parts)]
    assert start(path, parts) == (all_names(parts), want)
    assert start(path, parts) == ([], want)
    assert os.listdir(path.parent) == ["tiles"]


def test_a_matrix_outlives_the_cache_and_the_file(tmp_path: Path, parts: list[RawWeight]) -> None:
    path = tmp_path / "tiles"
    _, want = start(path, parts)
    view = _native.tiles_of(PackedCache(path, "key").tiles(parts[:1], Packer())[0])
    path.unlink()
    assert bytes(view) == want[0]
    assert not view.flags.writeable


def test_what_is_missing_is_added(tmp_path: Path, parts: list[RawWeight]) -> None:
    path = tmp_path / "tiles"
    start(path, parts[:2])
    packed, want = start(path, parts)
    assert packed == all_names(parts[2:])
    assert start(path, parts) == ([], want)


def test_a_layer_is_packed_whole_where_one_of_it_is_missing(
    tmp_path: Path, parts: list[RawWeight]
) -> None:
    path = tmp_path / "tiles"
    _, want = start(path, parts[:2])
    packer, cache = Packer(), PackedCache(path, "key")
    tiles = [*cache.tiles(parts[:2], packer), *cache.tiles(parts[1:3], packer)]
    assert packer.names == all_names(parts[1:3])
    assert [bytes(_native.tiles_of(matrix)) for matrix in tiles[:3]] == [*want, want[1]]
    cache.save()
    assert start(path, parts[:3])[0] == []


def test_rows_of_one_tensor_are_told_apart(tmp_path: Path, parts: list[RawWeight]) -> None:
    rows = [parts[0].rows(0, 35), parts[0].rows(35, 70)]
    halves = [dataclasses.replace(half, name="one name") for half in rows]
    path = tmp_path / "tiles"
    _, want = start(path, halves)
    assert want[0] != want[1]
    assert start(path, halves[::-1]) == ([], want[::-1])


def test_bytes_that_are_not_the_checkpoints_own_are_not_kept(
    tmp_path: Path, parts: list[RawWeight]
) -> None:
    own = [RawWeight(p.name, p.format, p.shape, {"data": p.data.copy()}) for p in parts]
    path = tmp_path / "tiles"
    start(path, parts)
    assert start(path, own)[0] == all_names(parts)


def flip(at: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[at] ^= 1
        return data

    return change


DAMAGE = {
    "empty": lambda data: bytearray(),
    "foreign": lambda data: bytearray(b"GGUF" + bytes(5000)),
    "magic": flip(3),
    "header's length": flip(23),
    "header's sum": flip(24),
    "header": flip(60),
    "first tile": flip(1 << 21),
    "last tile": flip(-1),
    "torn header": lambda data: data[:100],
    "torn": lambda data: data[:-64],
    "longer": lambda data: data + bytes(64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_written_anew(
    damage: str, tmp_path: Path, parts: list[RawWeight], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tiles"
    _, want = start(path, parts)
    path.write_bytes(DAMAGE[damage](bytearray(path.read_bytes())))
    with caplog.at_level(logging.INFO, "engineroom"):
        assert start(path, parts) == (all_names(parts), want)
        assert "are not used" in caplog.text and "written to" in caplog.text
        assert start(path, parts) == ([], want)
    assert "mapped from" in caplog.text


def test_another_checkpoint_or_build_is_not_used(
    tmp_path: Path, parts: list[RawWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles"
    start(path, parts)
    assert start(path, parts, "other")[0] == all_names(parts)
    assert start(path, parts, "other")[0] == []
    monkeypatch.setattr("engineroom.kernels.cpu.packed_cache._build", lambda: "newer")
    assert start(path, parts, "other")[0] == all_names(parts)


def test_a_full_disk_is_a_warning(
    tmp_path: Path,
    parts: list[RawWeight],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "cache" / "tiles"
    monkeypatch.setattr(os, "fsync", full)
    _, tiles = start(path, parts)
    assert len(tiles) == len(parts)
    assert "No space left on device" in caplog.text
    assert os.listdir(path.parent) == []


def test_a_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, parts: list[RawWeight], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    start(tmp_path / "file" / "tiles", parts)
    assert "the next start packs them again" in caplog.text


def test_refusals(tmp_path: Path, parts: list[RawWeight]) -> None:
    matrix = Packer()(parts[:1])[0]
    layout = _native.tiles_layout(matrix)
    path = tmp_path / "tiles"
    path.write_bytes(bytes(matrix.nbytes))
    with path.open("rb") as file:
        fd, size = file.fileno(), matrix.nbytes
        (mapped,) = _native.map_tiles(fd, size, [("Q4_1", layout, 0)])
        assert mapped.nbytes == size
        with pytest.raises(ValueError, match=f"has {size} bytes, should have {size + 1}"):
            _native.map_tiles(fd, size + 1, [])
        for form, at in (("Q4_1", 64), ("Q4_1", 1), ("Q4_1", 2**63), ("Q9", 0)):
            with pytest.raises(ValueError, match="does not lie in the file"):
                _native.map_tiles(fd, size, [(form, layout, at)])
        for i, value in ((3, 0), (4, -1), (5, -64), (6, 0), (6, layout[6] + 64)):
            wrong = [*layout[:i], value, *layout[i + 1 :]]
            with pytest.raises(ValueError, match="does not lie in the file"):
                _native.map_tiles(fd, size, [("Q4_1", wrong, 0)])
