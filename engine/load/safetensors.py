"""Safetensors files: a bounded reader of one file's header, and of the index of a sharded model.

Format: https://github.com/huggingface/safetensors (README, "Format"): eight bytes of header length,
a JSON object, then the tensors' bytes without gaps. Every number is checked against the file.
"""

from __future__ import annotations

import math
import re
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.weights import BF16, F16, F32, Format, RawWeight
from .mapped import CheckpointError, MappedFile, no_such_tensor, read_small, shown
from .strict_json import parse_object

MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAX_INDEX = 100_000_000
MAX_DIMS = 8
FORMATS: Mapping[str, Format] = {f.name: f for f in (F32, F16, BF16)}
# What the parts of quantised weights are stored as (quant/parts.py): elements of that many bytes.
STORED: Mapping[str, Format] = {
    **FORMATS,
    **{
        name: Format(name, 1, int(kind[1]), (("value", kind, 1),))
        for name, kind in (
            ("F8_E4M3", "u1"),
            ("I8", "i1"),
            ("U8", "u1"),
            ("I32", "i4"),
            ("I64", "i8"),
        )
    },
}
_BARE_NAME = re.compile(r"[^/\\\0]{1,250}\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; `offset` counts from byte 0 of its file. A scalar has shape (1,)."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One .safetensors file: `tensors` by name, and their bytes as views of the map.

    `formats`: what its tensors may be, by dtype.
    Errors: CheckpointError, its `field` naming the header field or the tensor at fault.
    """

    def __init__(self, path: Path, formats: Mapping[str, Format] = FORMATS) -> None:
        self._formats = formats
        self.file = MappedFile(path)
        try:
            self.tensors = self._read()
        except BaseException:
            self.file.close()
            raise

    def tensor(self, name: str) -> RawWeight:
        """One tensor, its data a view of the mapped file. Errors: CheckpointError."""
        info = self.tensors.get(name)
        if info is None:
            raise no_such_tensor(self.file.name, name, self.tensors)
        data = self.file.view(info.offset, info.nbytes)
        return RawWeight(name, info.format, info.shape, {"data": data})

    def close(self) -> None:
        self.file.close()

    def _fail(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(field, f"{self.file.name}: {shown(field)}: {message}")

    def _read(self) -> dict[str, TensorInfo]:
        size = self.file.size
        if size < 8:
            raise self._fail("header length", f"takes 8 bytes; the file has {size}")
        (length,) = struct.unpack_from("<Q", self.file.buffer)
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise self._fail(
                "header length",
                f"{length} bytes; it must be at least 2, at most {MAX_HEADER}, and within the "
                f"file, which has {size - 8} more",
            )
        raw = self.file.buffer[8 : 8 + length]
        if raw[:1] != b"{":
            raise self._fail("header", f"starts with {raw[:1]!r}, not b'{{'")
        header = parse_object(raw, f"{self.file.name}: header")
        self._check_metadata(header.pop("__metadata__", {}))
        tensors = [self._entry(name, entry, 8 + length) for name, entry in header.items()]
        at, last = 8 + length, "header"
        for t in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
            if t.offset != at:
                what = "a gap" if t.offset > at else "an overlap"
                raise self._fail(
                    f"{t.name} data_offsets",
                    f"begins at byte {t.offset} but {shown(last)} ends at {at}: {what}",
                )
            at, last = t.offset + t.nbytes, t.name
        if at != size:
            raise self._fail(
                "data_offsets",
                f"the tensors end at byte {at}, the file at {size}; it is damaged or was not "
                "fetched completely",
            )
        return {t.name: t for t in tensors}

    def _check_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__", "must map names to texts")

    def _entry(self, name: str, entry: Any, data: int) -> TensorInfo:
        if not name:
            raise self._fail("header", "a tensor without a name")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._fail(name, "must hold exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in self._formats:
            raise self._fail(
                f"{name} dtype",
                f"{_short(dtype)} is not supported (supported: {', '.join(self._formats)})",
            )
        if not _is_sizes(shape) or len(shape) > MAX_DIMS:
            raise self._fail(
                f"{name} shape", f"{_short(shape)} is not a list of at most {MAX_DIMS} sizes"
            )
        if 0 in shape:
            raise self._fail(f"{name} shape", f"{shape} has a dimension of 0")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail(f"{name} data_offsets", f"{_short(offsets)} is not [begin, end]")
        begin, end = offsets
        if data + end > self.file.size:
            raise self._fail(
                f"{name} data_offsets",
                f"ends at byte {data + end}, the file at {self.file.size}; it is damaged or was "
                "not fetched completely",
            )
        nbytes = math.prod(shape) * self._formats[dtype].block_bytes
        if nbytes != end - begin:
            raise self._fail(
                f"{name} data_offsets",
                f"{dtype} of shape {shape} takes {nbytes} bytes, the offsets span {end - begin}",
            )
        return TensorInfo(name, self._formats[dtype], tuple(shape) or (1,), data + begin, nbytes)


def read_index(path: Path) -> dict[str, str]:
    """weight_map of a model.safetensors.index.json: tensor name -> bare file name.

    Errors: CheckpointError for an entry that is not the bare name of a .safetensors file; a path
    there once led readers out of the model's folder (CVE-2026-69112).
    """
    index = parse_object(read_small(path, MAX_INDEX), path.name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map", f"{path.name}: weight_map must map tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _BARE_NAME.fullmatch(file):
            raise CheckpointError(
                "weight_map",
                f"{path.name}: weight_map of {shown(tensor)!r} is {_short(file)}, not the bare "
                "name of a .safetensors file in the same folder",
            )
    return weight_map


def open_shards(
    folder: Path, index: Mapping[str, str], formats: Mapping[str, Format] = FORMATS
) -> dict[str, SafetensorsFile]:
    """Every file that an index names, by name; listed and present tensors must agree both ways.

    Errors: CheckpointError naming the first tensors that are listed and absent or the reverse.
    """
    shards: dict[str, SafetensorsFile] = {}
    listed: dict[str, set[str]] = {}
    for tensor, file in index.items():
        listed.setdefault(file, set()).add(tensor)
    try:
        for file in sorted(listed):
            shards[file] = SafetensorsFile(folder / file, formats)
            _compare(file, listed[file], shards[file].tensors.keys())
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise
    return shards


def _compare(file: str, listed: set[str], present: Any) -> None:
    for missing, where, absent in (
        (sorted(listed - present), "the index lists in", "does not hold"),
        (sorted(present - listed), "lie in", "the index does not list there"),
    ):
        if missing:
            names = ", ".join(map(repr, map(shown, missing[:3]))) + ", …" * (len(missing) > 3)
            clause = f"which {absent} them" if absent.startswith("does") else f"but {absent}"
            raise CheckpointError(
                missing[0], f"{len(missing)} tensors that {where} {file}, {clause}: {names}"
            )


def _is_sizes(value: Any) -> bool:
    """A list of integers >= 0 (bool is none)."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(value: Any) -> str:
    return shown(reprlib.repr(value))


__all__ = [
    "STORED",
    "CheckpointError",
    "SafetensorsFile",
    "TensorInfo",
    "open_shards",
    "read_index",
]
