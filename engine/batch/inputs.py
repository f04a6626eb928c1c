"""The input files: indexed once by one pass, then read line by line as the engine has room.

A line costs 20 bytes of memory while the batch runs (offset, line number; and the journal's place
of its answer), and 12 more while custom_ids are compared: a million lines, 32 MB.
"""

from __future__ import annotations

import bisect
import filecmp
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..core.request import SamplingParams
from .errors import BAD_REQUEST, CHANGED, DUPLICATE, NOT_READ, BatchError, LineError
from .journal import not_read, not_written
from .requests import BatchRequest, from_json, from_text

FORMATS = ("jsonl", "text")
_MAX_LINE = 1 << 26
_BUCKETS = 256  # custom_ids are compared bucket by bucket, so that no table of all is needed
_WINDOW_LINES, _WINDOW_BYTES = 512, 1 << 23  # parsed at a time and put in order


@dataclass(frozen=True)
class InputFile:
    """One file as it was indexed."""

    path: Path
    sha256: str
    bytes: int
    lines: int  # that hold a request
    first: int  # index of its first line over all files
    changed_ns: int


class Inputs:
    """Lines of several files, numbered 0..len - 1 over all of them; blank lines are skipped.

    parse: a line and its text custom_id -> a request. Errors: BatchError, of every method.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        format: str,
        params: SamplingParams,
        models: frozenset[str],
        record: bool,
    ) -> None:
        """record: a bad line is no error here; read() raises its LineError."""
        self._params = params
        self._models = models
        self._text = format == "text"
        self._record = record
        self._several = len(paths) > 1
        self._offsets = array("Q")
        self._numbers = array("I")
        self._open: tuple[int, BinaryIO] | None = None
        self.files: list[InputFile] = []
        ids = _Ids()
        for path in paths:
            self.files.append(self._scan(path, ids))
        self._starts = [f.first for f in self.files]
        ids.check(self._id_and_place)

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> str:
        """ "prompts.jsonl line 7"."""
        return f"{self._file(index).path} line {self._numbers[index]}"

    def read(self, index: int) -> BatchRequest:
        """Errors: LineError besides."""
        return self._parse(self._line(index), index)

    def windows(self, wanted: Callable[[int], bool]) -> Iterator[list[int]]:
        """The indices of lines that are `wanted`, some hundred at a time."""
        window: list[int] = []
        size = 0
        for index in range(len(self)):
            if not wanted(index):
                continue
            size += self._length(index)
            window.append(index)
            if len(window) == _WINDOW_LINES or size >= _WINDOW_BYTES:
                yield window
                window, size = [], 0
        if window:
            yield window

    def check_unchanged(self) -> None:
        """Errors: BatchError where a file is not the one that was indexed."""
        for file in self.files:
            try:
                now = os.stat(file.path)
            except OSError as error:
                raise not_read(file.path, error) from error
            if (now.st_size, now.st_mtime_ns) != (file.bytes, file.changed_ns):
                raise BatchError(CHANGED, f"{file.path} was changed while the batch ran")

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    # --------------------------------------------------------------------------------- private

    def _scan(self, path: Path, ids: _Ids) -> InputFile:
        digest = hashlib.sha256()
        first, offset, number = len(self._offsets), 0, 0
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                while line := file.readline(_MAX_LINE + 1):
                    number += 1
                    if len(line) > _MAX_LINE:
                        raise BatchError(
                            BAD_REQUEST,
                            f"{path} line {number} has over {_MAX_LINE} bytes, which no request is",
                        )
                    digest.update(line)
                    if line.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                        self._note(line, path, ids)
                    offset += len(line)
        except OSError as error:
            raise not_read(path, error) from error
        lines = len(self._offsets) - first
        return InputFile(path, digest.hexdigest(), offset, lines, first, status.st_mtime_ns)

    def _note(self, line: bytes, path: Path, ids: _Ids) -> None:
        index = len(self._offsets) - 1
        if self._text:
            return  # ids are line numbers; the text is checked as it is read
        try:
            ids.add(self._parse(line, index).custom_id, index)
        except LineError as error:
            if not self._record:
                raise BatchError(
                    BAD_REQUEST,
                    f"{path} line {self._numbers[index]}: {error}. Nothing ran; with --on-error "
                    "record bad lines become errors of the output",
                ) from None
            if error.custom_id is not None:
                ids.add(error.custom_id, index)

    def _parse(self, line: bytes, index: int) -> BatchRequest:
        if not self._text:
            return from_json(line, self._params, self._models)
        where = f"line-{self._numbers[index]}"
        if self._several:
            where = f"file-{bisect.bisect_right(self._starts, index)}-{where}"
        return from_text(line.rstrip(b"\r\n"), where, self._params)

    def _id_and_place(self, index: int) -> tuple[str | None, str]:
        try:
            return self.read(index).custom_id, self.place(index)
        except LineError as error:
            return error.custom_id, self.place(index)

    def _file_number(self, index: int) -> int:
        number = bisect.bisect_right(self._starts, index) - 1
        while not self.files[number].lines:  # an empty file begins where the next one does
            number -= 1
        return number

    def _file(self, index: int) -> InputFile:
        return self.files[self._file_number(index)]

    def _length(self, index: int) -> int:
        file = self._file(index)
        last = index + 1 == file.first + file.lines
        return (file.bytes if last else self._offsets[index + 1]) - self._offsets[index]

    def _line(self, index: int) -> bytes:
        number = self._file_number(index)
        try:
            if self._open is None or self._open[0] != number:
                self.close()
                self._open = (number, self.files[number].path.open("rb"))
            self._open[1].seek(self._offsets[index])
            return self._open[1].readline(_MAX_LINE)
        except OSError as error:
            raise not_read(self.files[number].path, error) from error


class _Ids:
    """Finds a custom_id that comes twice, from 8 bytes of each one's hash."""

    def __init__(self) -> None:
        self._hashes = [array("Q") for _ in range(_BUCKETS)]
        self._indices = [array("I") for _ in range(_BUCKETS)]

    def add(self, custom_id: str, index: int) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=8).digest()
        bucket = digest[0] % _BUCKETS
        self._hashes[bucket].append(int.from_bytes(digest, "little"))
        self._indices[bucket].append(index)

    def check(self, look: Callable[[int], tuple[str | None, str]]) -> None:
        """look: index -> (custom_id, place). Errors: BatchError naming both places."""
        for hashes, indices in zip(self._hashes, self._indices, strict=True):
            first: dict[int, int] = {}
            for digest, index in zip(hashes, indices, strict=True):
                earlier = first.setdefault(digest, index)
                if earlier == index:
                    continue
                (one, here), (two, there) = look(earlier), look(index)
                if one == two:
                    raise BatchError(
                        DUPLICATE,
                        f"custom_id {one!r} stands in {here} and in {there}; nothing ran. "
                        "Answers are told apart by it: give each request its own",
                    )


def spool(source: BinaryIO, output: Path, begun: bool) -> Path:
    """Standard input as a file beside the output, so that another run can go on with it.

    Where nothing comes, the file of an earlier run is kept. begun: the journal has records, so that
    anything but the same bytes is refused. Errors: BatchError.
    """
    path = output.with_name(output.name + ".input")
    fresh = output.with_name(output.name + ".input.new")
    try:
        size = 0
        with fresh.open("wb") as file:
            while chunk := source.read(1 << 20):
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        old = path.exists()
        same = not size or (old and filecmp.cmp(fresh, path, shallow=False))
        if old and (same or begun):
            fresh.unlink()
        else:
            os.replace(fresh, path)
    except OSError as error:
        raise not_written(fresh, error) from error
    if old and begun and not same:
        raise BatchError(
            CHANGED,
            f"standard input is not what {path} kept of it when the batch began; give the same, "
            "nothing (< /dev/null) to go on with that file, or --restart",
        )
    return path


def check_format(name: str) -> None:
    """Errors: BatchError."""
    if name not in FORMATS:
        raise BatchError(NOT_READ, f"format={name!r} is not one of {', '.join(FORMATS)}")


__all__ = ["FORMATS", "InputFile", "Inputs", "check_format", "spool"]
