"""The input files: indexed once by one pass, then read row by row as the engine has room.

A row costs 20 bytes of memory while the batch runs (where it lies, its number; and the journal's
place of its answer), and 12 more while custom_ids are compared: a million rows, 32 MB.
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

from ..core.sampling_params import SamplingParams
from .errors import BAD_REQUEST, CHANGED, DUPLICATE, NOT_READ, BatchError, LineError
from .journal import not_read, not_written
from .requests import BatchRequest, from_json
from .sources import FORMATS, Row, Source, open_source
from .template import PLAIN, Prompting, Prompts

_BUCKETS = 256  # custom_ids are compared bucket by bucket, so that no table of all is needed
_WINDOW_ROWS, _WINDOW_CHARACTERS = 512, 1 << 23  # parsed at a time and put in order


@dataclass(frozen=True)
class InputFile:
    """One file as it was indexed."""

    path: Path
    sha256: str
    bytes: int
    lines: int  # that hold a request
    changed_ns: int


class Inputs:
    """Rows of several files, numbered 0..len - 1 over all of them; blank lines are skipped.

    Errors: BatchError, of every method.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        format: str,
        prompting: Prompting = PLAIN,
        params: SamplingParams,
        models: frozenset[str],
        record: bool,
        url: str | None = None,
    ) -> None:
        """record: a bad row is no error here; read() raises its LineError. url: the only one that
        requests may have, where it is given."""
        if format not in FORMATS:
            raise BatchError(NOT_READ, f"format={format!r} is not one of {', '.join(FORMATS)}")
        self._format = format
        self._unit = "row" if format == "parquet" else "line"
        self._params = params
        self._models = models
        self._url = url
        self._prompts = Prompts(format, prompting, params)
        # Rows are numbered where they have no ids of their own.
        self._numbered = format != "jsonl" and prompting.id_column is None
        self._record = record
        self._several = len(paths) > 1
        self._offsets = array("Q")
        self._numbers = array("I")
        self._open: tuple[int, Source] | None = None
        self.files: list[InputFile] = []
        self._starts: list[int] = []  # the first row of each file
        ids = _Ids()
        for path in paths:
            self.files.append(self._scan(path, ids))
        ids.check(self._id_and_place)

    def __len__(self) -> int:
        return len(self._offsets)

    def place(self, index: int) -> str:
        """ "prompts.jsonl line 7", or "table.parquet row 7"."""
        return self._place(self.files[self._file_number(index)].path, index)

    def read(self, index: int) -> BatchRequest:
        """Errors: LineError besides."""
        number = self._file_number(index)
        try:
            if self._open is None or self._open[0] != number:
                self.close()
                self._open = (number, self._source(self.files[number].path))
            row = self._open[1].read(self._offsets[index])
        except OSError as error:
            raise not_read(self.files[number].path, error) from error
        return self._parse(row, index)

    def windows(
        self, wanted: Callable[[int], bool]
    ) -> Iterator[list[tuple[int, BatchRequest | LineError]]]:
        """(index, request or why it is none) of rows that are `wanted`, some hundred at a time."""
        window: list[tuple[int, BatchRequest | LineError]] = []
        size = 0
        for index in range(len(self)):
            if not wanted(index):
                continue
            try:
                request = self.read(index)
                size += len(request.text)
                window.append((index, request))
            except LineError as error:
                window.append((index, error))
            if len(window) == _WINDOW_ROWS or size >= _WINDOW_CHARACTERS:
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

    def _source(self, path: Path) -> Source:
        return open_source(path, self._format, self._prompts.columns)

    def _scan(self, path: Path, ids: _Ids) -> InputFile:
        first = len(self._offsets)
        self._starts.append(first)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            source = self._source(path)
            try:
                for at, number, row in source.scan():
                    self._offsets.append(at)
                    self._numbers.append(number)
                    self._note(row, path, ids)
            finally:
                source.close()
        except OSError as error:
            raise not_read(path, error) from error
        lines = len(self._offsets) - first
        return InputFile(path, digest, status.st_size, lines, status.st_mtime_ns)

    def _note(self, row: Row, path: Path, ids: _Ids) -> None:
        index = len(self._offsets) - 1
        if self._format == "text":
            return  # ids are line numbers; the text is checked as it is read
        custom_id = None
        try:
            custom_id = self._parse(row, index).custom_id
        except LineError as error:
            if not self._record:
                raise BatchError(
                    BAD_REQUEST,
                    f"{self._place(path, index)}: {error}. Nothing ran; with --on-error record "
                    "bad lines become errors of the output",
                    why=str(error),
                    line=self._numbers[index],
                ) from None
            custom_id = error.custom_id
        if custom_id is not None and not self._numbered:
            ids.add(custom_id, index)

    def _place(self, path: Path, index: int) -> str:
        return f"{path} {self._unit} {self._numbers[index]}"

    def _parse(self, row: Row, index: int) -> BatchRequest:
        if self._format == "jsonl" and isinstance(row, bytes):
            return from_json(row, self._params, self._models, self._url)
        custom_id = self._given_id(index) if self._numbered else None
        if isinstance(row, LineError):
            row.custom_id = custom_id
            raise row
        return self._prompts.request(row, custom_id or "")

    def _given_id(self, index: int) -> str:
        name = f"{self._unit}-{self._numbers[index]}"
        return f"file-{self._file_number(index) + 1}-{name}" if self._several else name

    def _id_and_place(self, index: int) -> tuple[str | None, str]:
        try:
            return self.read(index).custom_id, self.place(index)
        except LineError as error:
            return error.custom_id, self.place(index)

    def _file_number(self, index: int) -> int:
        # An empty file begins where the next one does, which bisect_right passes over.
        return bisect.bisect_right(self._starts, index) - 1


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
                        why=f"custom_id {one!r} comes a second time",
                        line=int(there.rpartition(" ")[2]),
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


__all__ = ["InputFile", "Inputs", "spool"]
