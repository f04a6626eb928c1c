"""Writing a checkpoint: safetensors shards and a config.json, a tensor at a time, all or nothing.

Format: https://github.com/huggingface/safetensors (README, "Format"), and the index of a sharded
model as transformers writes it. The folder appears under its name when everything in it is on the
disk; until then it is called `NAME.part`. A run that was stopped goes on there: shards that it
finished are kept, and what they hold is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.weights import release_pages
from .mapped import CheckpointError
from .safetensors import STORED

SHARD_BYTES = 1 << 31  # of the tensors in a file
_PIECE = 1 << 24  # bytes of a tensor that are written at a time
_ALIGNMENT = 8  # of the first tensor: a view of any type may lie there


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor to be written: `dtype` in safetensors' words, `data` its bytes, row-major.

    data: anything with the buffer protocol, or a function that makes it when its turn comes; that
    of a tensor in a finished shard is not called.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any | Callable[[], Any]

    @property
    def nbytes(self) -> int:
        size = STORED[self.dtype].block_bytes
        for n in self.shape:
            size *= n
        return size

    def bytes(self) -> memoryview:
        """Errors: CheckpointError where there are more or fewer than the shape says."""
        data = memoryview(self.data() if callable(self.data) else self.data).cast("B")
        if data.nbytes != self.nbytes:
            raise CheckpointError(
                self.name,
                f"tensor {self.name!r}: {self.dtype} of shape {list(self.shape)} takes "
                f"{self.nbytes} bytes, {data.nbytes} were made",
            )
        return data


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[Tensor],
    copied_files: Iterable[Path] = (),
    *,
    key: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Tensor], None] | None = None,
) -> None:
    """Make `folder`: config.json of `config`, the tensors in their order, copies of files.

    Memory holds one tensor's bytes at a time where they are made by functions. key: what the
    tensors are made from and how; shards of an earlier run with another key are written anew.
    progress is told of each tensor once it is written, or found written.

    Errors: CheckpointError for a folder that exists, a tensor that comes twice, has a type that
    safetensors files of ours do not hold, or bytes that do not fit; OSError of the disk, after
    which the same call goes on from the shards that were finished.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise CheckpointError(
            "path", f"{folder} exists already; name a folder that does not, or remove it"
        )
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    home: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes), 1):
        name = f"model-{number:05}.safetensors"
        _write_shard(part / name, shard, key, progress)
        home |= dict.fromkeys((t.name for t in shard), name)
        total += sum(t.nbytes for t in shard)
    files = set(home.values())
    if len(files) == 1:
        os.replace(part / files.pop(), part / "model.safetensors")
        files = {"model.safetensors"}
    else:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
        files |= {_write_json(part / "model.safetensors.index.json", index)}
    for path in copied_files:
        files.add(path.name)
        _copy(path, part / path.name)
    files.add(_write_json(part / "config.json", config))
    for left in part.iterdir():  # of an earlier run that wrote otherwise
        if left.name not in files:
            left.unlink()
    _sync_folder(part)
    os.rename(part, folder)
    _sync_folder(folder.parent)


def _shards(tensors: Iterable[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    names: set[str] = set()
    size = 0
    for tensor in tensors:
        if tensor.name in names or tensor.dtype not in STORED:
            what = "comes twice" if tensor.name in names else f"is {tensor.dtype}"
            raise CheckpointError(
                tensor.name,
                f"tensor {tensor.name!r} {what}; a checkpoint holds each name once, as one of "
                f"{', '.join(STORED)}",
            )
        names.add(tensor.name)
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    if not names:
        raise CheckpointError("tensors", "a checkpoint without tensors is not written")
    if shard:
        yield shard


def _header(tensors: Iterable[Tensor], key: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": key}}
    at = 0
    for tensor in tensors:
        span = [at, at + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        at = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_shard(
    path: Path, tensors: list[Tensor], key: str, progress: Callable[[Tensor], None] | None
) -> None:
    header = _header(tensors, key)
    finished = _holds(path, header, len(header) + sum(t.nbytes for t in tensors))
    growing = path.with_suffix(".growing")
    if not finished:
        with open(growing, "wb") as file:
            file.write(header)
            for tensor in tensors:
                _write_released(file, tensor.bytes())
                if progress is not None:
                    progress(tensor)
            _sync(file)
        os.replace(growing, path)
    elif progress is not None:
        for tensor in tensors:
            progress(tensor)


def _write_released(file: Any, data: memoryview) -> None:
    """Write in pieces, so that of a view of another file no more than one is resident."""
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        file.write(piece)
        release_pages(np.frombuffer(piece, np.uint8))


def _holds(path: Path, header: bytes, nbytes: int) -> bool:
    """Whether a finished shard is there: it got its name when all of it was on the disk."""
    try:
        with open(path, "rb") as file:
            return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == nbytes
    except FileNotFoundError:
        return False


def _write_json(path: Path, value: Mapping[str, Any]) -> str:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        _sync(file)
    return path.name


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original, open(target, "wb") as copy:
        shutil.copyfileobj(original, copy)
        _sync(copy)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A name is on the disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["SHARD_BYTES", "Tensor", "write_checkpoint"]
