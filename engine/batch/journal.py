"""The journal: an append-only file of checksummed records, so that a crash loses no answer.

A record is a header and a payload. Header, little-endian, 24 bytes: magic, payload length (u32),
sequence number (u64), CRC-32 of the payload, CRC-32 of the header before it. A payload begins with
its kind: M, the manifest as JSON, first and once; R, one result.

What a crash can leave is a torn end: bytes after the last good record that hold no good record.
They are cut off. A bad record with a good one behind it is damage, and an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.cost import Cost
from .errors import DAMAGED, NOT_READ, NOT_WRITTEN, BatchError

FORMAT = 2  # of the records' payloads; the manifest has it
_MAGIC = b"\xebRJ\n"
_HEADER = struct.Struct("<4sIQII")
_RESULT = struct.Struct("<QIIIfHdddB")
_NONE = float("nan")  # an amount that is not known
_MAX_PAYLOAD = 1 << 30
_SYNC_RECORDS = 64  # an fsync at the latest after so many records,
_SYNC_SECONDS = 0.5  # or so long after the first of them


@dataclass(frozen=True, slots=True)
class Result:
    """One answered line: its place in the input, what it took, and its line of the output.

    seconds: from admission to the end. status: as in the line, 200 where it succeeded. cost: None
    where nobody counted it.
    """

    index: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float
    status: int
    line: bytes
    cost: Cost | None = None

    def pack(self) -> bytes:
        numbers = (self.index, self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        packed = _RESULT.pack(*numbers, self.seconds, self.status, *_amounts(self.cost))
        return b"R" + packed + self.line

    @classmethod
    def unpack(cls, payload: bytes) -> Result:
        """Errors: ValueError."""
        if payload[:1] != b"R" or len(payload) < 1 + _RESULT.size:
            raise ValueError(f"{len(payload)} bytes of kind {payload[:1]!r} are no result")
        values = _RESULT.unpack_from(payload, 1)
        index, prompt, completion, cached, seconds, status, joules, money, grams, estimated = values
        cost = None
        if not math.isnan(joules):
            cost = Cost(joules, _known(money), _known(grams), bool(estimated))
        line = payload[1 + _RESULT.size :]
        return cls(index, prompt, completion, cached, seconds, status, line, cost)


def _amounts(cost: Cost | None) -> tuple[float, float, float, bool]:
    if cost is None:
        return _NONE, _NONE, _NONE, False
    money, grams = (_NONE if value is None else value for value in (cost.money, cost.grams))
    return cost.joules, money, grams, cost.estimated


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


# ------------------------------------------------------------------------------------------ reading


class Reader:
    """The records of a journal, one at a time; after the last one `end` is where it ended.

    `torn` is how many bytes follow that are part of a record. Errors: BatchError.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.size = os.fstat(fd).st_size
        self.end = 0
        self.sequence = 0

    @property
    def torn(self) -> int:
        return self.size - self.end

    def payloads(self) -> Iterator[tuple[int, bytes]]:
        """(offset of the record, payload) of each."""
        while self.end < self.size:
            payload = _read(self._fd, self.end, self.size, self.sequence)
            if payload is None:
                self._check_tail()
                return
            offset = self.end
            self.end += _HEADER.size + len(payload)
            self.sequence += 1
            yield offset, payload

    def manifest(self) -> dict[str, Any] | None:
        """The first record. None where a crash left not even that."""
        for offset, payload in self.payloads():
            try:
                if payload[:1] != b"M":
                    raise ValueError(f"it is of kind {payload[:1]!r}")
                found = json.loads(payload[1:])
                if not isinstance(found, dict):
                    raise ValueError("it is no object")
            except ValueError as error:
                raise self._damage(offset, f"the first record is no manifest: {error}") from None
            return found
        return None

    def results(self) -> Iterator[tuple[int, Result]]:
        """(offset of the record, result) of each record after the manifest."""
        for offset, payload in self.payloads():
            try:
                yield offset, Result.unpack(payload)
            except ValueError as error:
                raise self._damage(offset, str(error)) from None

    def line(self, offset: int) -> bytes:
        """The output's line of the result at `offset`, its sum checked again."""
        return _line(self._fd, offset, self.size, self._path)

    def _check_tail(self) -> None:
        """Errors: BatchError where a good record follows a bad one."""
        at = self.end  # one that is good but for its number counts too
        overlap = len(_MAGIC) - 1
        while at < self.size:
            chunk = os.pread(self._fd, 1 << 20, at)
            found = chunk.find(_MAGIC)
            if found < 0:
                if len(chunk) <= overlap:
                    return
                at += len(chunk) - overlap
                continue
            at += found
            if _read(self._fd, at, self.size, None) is not None:
                raise self._damage(self.end, f"a good record with another number lies at byte {at}")
            at += 1

    def _damage(self, offset: int, why: str) -> BatchError:
        return BatchError(
            DAMAGED,
            f"{self._path}: record {self.sequence} at byte {offset} of {self.size} is damaged "
            f"({why}). To compute it and what follows again: truncate -s {offset} "
            f"{self._path}; to begin anew: --restart",
        )


def _read(fd: int, at: int, size: int, sequence: int | None) -> bytes | None:
    """The payload of a record that is good; with a sequence, of that number."""
    if at + _HEADER.size > size:
        return None
    head = os.pread(fd, _HEADER.size, at)
    if len(head) < _HEADER.size:
        return None
    magic, length, number, payload_sum, head_sum = _HEADER.unpack(head)
    good = magic == _MAGIC and zlib.crc32(head[:-4]) == head_sum
    if not good or at + _HEADER.size + length > size or (sequence not in (None, number)):
        return None
    payload = os.pread(fd, length, at + _HEADER.size)
    return payload if len(payload) == length and zlib.crc32(payload) == payload_sum else None


def _line(fd: int, offset: int, size: int, path: Path) -> bytes:
    payload = _read(fd, offset, size, None)
    if payload is None:
        raise BatchError(DAMAGED, f"{path}: the record at byte {offset} went bad")
    return Result.unpack(payload).line


# ------------------------------------------------------------------------------------------ writing


class Journal:
    """A journal open for appending, locked against a second run.

    Errors: BatchError, of every method.
    """

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise not_written(path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if restart:  # never cut before it is locked
                os.ftruncate(self._fd, 0)
        except OSError as error:
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise not_written(path, error) from error
            raise BatchError(
                NOT_WRITTEN, f"{path}: another run works on this batch; wait for it or end it"
            ) from None
        self.reader = Reader(self._fd, path)
        self._size = 0
        self._sequence = 0
        self._pending: list[bytes] = []
        self._first_pending = 0.0

    def begin(self, manifest: dict[str, Any]) -> None:
        """Cut off all there is and write the manifest."""
        self._cut(0)
        self._append(b"M" + json.dumps(manifest, sort_keys=True).encode())
        self.sync()
        sync_folder(self.path.parent)

    def go_on(self) -> None:
        """After the reader has read all: cut off a torn end and append behind the last record."""
        self._cut(self.reader.end)
        self._sequence = self.reader.sequence

    def add(self, result: Result) -> int:
        """Append a result, on disk at the latest with the next sync(). Returns its offset."""
        return self._append(result.pack())

    def sync_if_due(self) -> None:
        due = len(self._pending) >= _SYNC_RECORDS
        if due or (self._pending and time.monotonic() - self._first_pending >= _SYNC_SECONDS):
            self.sync()

    def sync(self) -> None:
        """Write what is pending and wait until it is on the disk."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        start = self._size - len(data)
        try:
            write_all(self._fd, data, start)
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next reader cuts it off
                os.ftruncate(self._fd, start)
            self._pending.clear()
            self._size = start
            raise not_written(self.path, error) from error
        self._pending.clear()

    def line(self, offset: int) -> bytes:
        """The output's line of the result at `offset`, its sum checked again."""
        return _line(self._fd, offset, self._size, self.path)

    def close(self) -> None:
        """Release the lock. What is pending is dropped: call sync() before."""
        os.close(self._fd)

    def _append(self, payload: bytes) -> int:
        if len(payload) > _MAX_PAYLOAD:
            raise BatchError(
                NOT_WRITTEN, f"a result of {len(payload)} bytes; at most {_MAX_PAYLOAD} are kept"
            )
        if not self._pending:
            self._first_pending = time.monotonic()
        record = pack_record(self._sequence, payload)
        self._pending.append(record)
        offset = self._size
        self._size += len(record)
        self._sequence += 1
        return offset

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as error:
            raise not_written(self.path, error) from error
        self._size = size


def pack_record(sequence: int, payload: bytes) -> bytes:
    head = _HEADER.pack(_MAGIC, len(payload), sequence, zlib.crc32(payload), 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little") + payload


def write_all(fd: int, data: bytes, at: int) -> None:
    """All of `data` at byte `at`. Errors: OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` last. Errors: BatchError."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise not_written(folder, error) from error


def not_written(path: Path, error: OSError) -> BatchError:
    return BatchError(
        NOT_WRITTEN,
        f"{path} cannot be written: {error.strerror or error}. What was answered before is kept; "
        "make room or rights and run the same command again",
    )


def not_read(path: Path, error: OSError) -> BatchError:
    return BatchError(NOT_READ, f"{path} cannot be read: {error.strerror or error}")


__all__ = [
    "FORMAT",
    "Journal",
    "Reader",
    "Result",
    "journal_path",
    "not_read",
    "not_written",
    "pack_record",
    "sync_folder",
    "write_all",
]
