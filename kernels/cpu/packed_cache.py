"""Packed weights kept in a file: the next start maps their tiles instead of packing them again.

The file is the magic, the length and the CRC-32 of a JSON header, the header, and from the next
multiple of 2 MiB on every matrix's tiles. It is written whole beside its place and renamed into it,
so that what lies there was complete. It is used only where the header's key, size and sums are the
expected ones; anything else is packed, said and written anew. Another process that maps the file
shares its memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..weights import RawWeight, mapping_of
from . import _native

_MAGIC = b"engineroom tiles"
_HEAD = struct.Struct("<16sQI")  # magic, bytes and CRC-32 of the header
_MAX_HEADER = 1 << 26
_ALIGN = 1 << 21
_SAMPLE = 4096  # bytes at each end of a matrix whose sum is compared
_log = logging.getLogger("engineroom")


class PackedCache:
    """The packed weights of one checkpoint at `path`; `key` says what they were packed from.

    Never an error: a file that cannot be used or written costs a line in the log.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = f"{key} {_build()}"
        self._known = self._open()
        self._used: dict[str, _native.PackedMatrix] = {}
        self._packed = 0

    def tiles(
        self,
        parts: Sequence[RawWeight],
        pack: Callable[[Sequence[RawWeight]], list[_native.PackedMatrix]],
    ) -> list[_native.PackedMatrix]:
        """The tiles of `parts`: of the file or, where it lacks any, what `pack` makes of all.

        Bytes that are no view of a mapped file are not the checkpoint's own, and are not kept.
        """
        names = [_name(part) for part in parts]
        known = [tiles for name in names if (tiles := self._known.get(name or "")) is not None]
        if len(known) < len(parts):
            known = pack(parts)
        for name, tiles in zip(names, known, strict=True):
            if name is not None:
                self._used[name] = tiles
                self._packed += name not in self._known
        return known

    def save(self) -> None:
        """Write the file where any of its matrices had to be packed."""
        if not self._packed:
            _log.info(f"packed weights mapped from {self._path}")
            return
        try:
            num_bytes = self._write()
        except OSError as error:
            _log.warning(
                f"cannot keep the packed weights in {self._path}: {error.strerror or error}; "
                "the next start packs them again"
            )
            return
        _log.info(f"packed weights ({num_bytes / 1e6:.0f} MB) written to {self._path}")

    def _open(self) -> dict[str, _native.PackedMatrix]:
        try:
            with self._path.open("rb") as file:
                return self._read(file.fileno())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            _log.info(f"packed weights in {self._path} are not used: {error}")
            return {}

    def _read(self, fd: int) -> dict[str, _native.PackedMatrix]:
        head = os.pread(fd, _HEAD.size, 0)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise ValueError("it is no such file")
        _, length, crc = _HEAD.unpack(head)
        text = os.pread(fd, min(length, _MAX_HEADER), _HEAD.size)
        if len(text) != length or zlib.crc32(text) != crc:
            raise ValueError("its header is damaged")
        header = json.loads(text)
        if header["key"] != self._key:
            raise ValueError("they are of another checkpoint or another build of engineroom")
        entries: dict[str, list[Any]] = header["matrices"]
        matrices = _native.map_tiles(
            fd,
            header["num_bytes"],
            [(form, layout, at) for form, layout, at, _ in entries.values()],
        )
        for (name, entry), matrix in zip(entries.items(), matrices, strict=True):
            if _sum(matrix) != entry[3]:
                raise ValueError(f"{name} is damaged")
        return dict(zip(entries, matrices, strict=True))

    def _write(self) -> int:
        entries: dict[str, list[Any]] = {}
        at = 0
        for name, matrix in self._used.items():
            layout = list(_native.tiles_layout(matrix))
            entries[name] = [matrix.format, layout, at, _sum(matrix)]
            at += matrix.nbytes  # a whole number of 64 bytes
        start = _up(_HEAD.size + len(json.dumps(entries)) + len(self._key) + 32 * len(entries))
        for entry in entries.values():
            entry[2] += start
        header = {"key": self._key, "num_bytes": start + at, "matrices": entries}
        text = json.dumps(header).encode()
        assert _HEAD.size + len(text) <= start
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, len(text), zlib.crc32(text)))
                file.write(text)
                file.seek(start)
                for matrix in self._used.values():
                    file.write(_native.tiles_of(matrix).data)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return start + at


def _name(part: RawWeight) -> str | None:
    """What the file calls a matrix of its checkpoint; None for bytes of elsewhere."""
    mapping = mapping_of(next(iter(part.buffers.values())))
    if mapping is None:
        return None
    return f"{part.name} {part.packed_format.name} {list(part.shape)} at {mapping[1]}"


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _sum(matrix: _native.PackedMatrix) -> int:
    tiles = _native.tiles_of(matrix).data
    return zlib.crc32(tiles[-_SAMPLE:], zlib.crc32(tiles[:_SAMPLE]))


def _build() -> str:
    """The native module that lays tiles out: another build may lay them out in another way."""
    status = os.stat(_native.__file__)
    return f"{status.st_size}.{status.st_mtime_ns}"
