"""The rows of one input file, whatever its format: listed once in order, then read by their place.

What is no row (a CSV record with a field too many, a missing value) is listed as its LineError.
"""

from __future__ import annotations

import bisect
import csv
import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import BAD_REQUEST, NOT_READ, BatchError, LineError

FORMATS = ("jsonl", "text", "csv", "parquet")
MAX_LINE = 1 << 26
_ROWS = 64  # of a Parquet file in memory at a time
_BUFFER = 1 << 20

Row = bytes | Mapping[str, str] | LineError


class Source(ABC):
    """One open file. Errors: BatchError, and OSError of reading."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[int, int, Row]]:
        """(where to read it again, number from 1, row) of each that is not blank."""

    @abstractmethod
    def read(self, at: int) -> Row:
        """The row that scan() gave with `at`; quick where it follows the one read before."""

    @abstractmethod
    def close(self) -> None: ...


def open_source(path: Path, format: str, columns: Sequence[str]) -> Source:
    """columns: those that the rows of a table must have. Errors: BatchError, OSError."""
    match format:
        case "csv":
            return _Csv(path, columns)
        case "parquet":
            return _Parquet(path, columns)
        case _:
            return _Lines(path)


def guess_format(paths: Sequence[str]) -> str:
    """By the names' endings: csv, parquet, else jsonl. Errors: BatchError where they differ."""
    found = {{".csv": "csv", ".parquet": "parquet"}.get(Path(p).suffix, "jsonl") for p in paths}
    if len(found) > 1:
        raise BatchError(
            NOT_READ, f"inputs of several formats ({', '.join(sorted(found))}); one batch has one"
        )
    return found.pop() if found else "jsonl"


class _Lines(Source):
    """Lines, whole as they stand in the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb")
        self._number = 0

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        self._file.seek(0)
        at = self._number = 0
        while line := self._line():
            if line.strip():
                yield at, self._number, line
            at += len(line)

    def read(self, at: int) -> Row:
        self._file.seek(at)
        return self._line()

    def close(self) -> None:
        self._file.close()

    def _line(self) -> bytes:
        self._number += 1
        line = self._file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise BatchError(
                BAD_REQUEST,
                f"{self._path} line {self._number} has over {MAX_LINE} bytes, which no request is",
            )
        return line


class _Csv(_Lines):
    """RFC 4180 in UTF-8: a header, then a record a row; a quoted field may span lines."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path)
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
        header = self._record()
        if header is None or isinstance(header, LineError):
            self.close()
            raise BatchError(NOT_READ, f"{path}: no header of CSV: {header or 'it is empty'}")
        names = [name.removeprefix("\ufeff") for name in header]
        try:
            _check_columns(path, columns, names)
        except BatchError:
            self.close()
            raise
        self._width = len(names)
        self._places = {name: names.index(name) for name in columns}

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        self._file.seek(0)
        self._number = 0
        self._record()  # the header
        while True:
            at, number = self._file.tell(), self._number + 1
            record = self._record()
            if record is None:
                return
            if record:
                yield at, number, self._row(record)

    def read(self, at: int) -> Row:
        self._file.seek(at)
        return self._row(self._record() or [])

    def _record(self) -> list[str] | LineError | None:
        """The record where the file stands; [] for a blank line, None at the end."""
        lines = iter(lambda: self._line().decode("utf-8", "surrogateescape"), "")
        try:
            return next(csv.reader(lines, strict=True), None)
        except csv.Error as error:
            return LineError(f"not CSV: {error}")

    def _row(self, record: list[str] | LineError) -> Row:
        if isinstance(record, LineError):
            return record
        if len(record) != self._width:
            return LineError(f"the row has {len(record)} fields and the header {self._width}")
        row = {name: record[place] for name, place in self._places.items()}
        for name, value in row.items():
            if not value:
                return _missing(name)
            if not value.isascii() and any("\udc80" <= c <= "\udcff" for c in value):
                return LineError(f"column {name!r} is not UTF-8", field=name)
        return row


class _Parquet(Source):
    """Rows in order, some dozen in memory; whole row groups are skipped by the footer alone."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        parquet = pyarrow("parquet")
        self._path = path
        self._columns = list(columns)
        try:
            # Pages as they are needed: with pre_buffer a row group would be read at once.
            self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
        except ValueError as error:
            raise BatchError(NOT_READ, f"{path} is no Parquet file: {error}") from None
        try:
            schema = self._file.schema_arrow
            _check_columns(path, columns, schema.names)
            for name in columns:
                _check_type(path, name, schema.field(name).type)
        except BatchError:
            self.close()
            raise
        counts = self._file.metadata
        self._starts = [0]  # the first row of each row group
        for group in range(counts.num_row_groups):
            self._starts.append(self._starts[-1] + counts.row_group(group).num_rows)
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._first = self._after = 0  # rows in memory
        self._values: list[list[Any]] = []

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        for at in range(self._starts[-1]):
            yield at, at + 1, self.read(at)

    def read(self, at: int) -> Row:
        try:
            self._load(at)
        except ValueError as error:  # Arrow's
            raise BatchError(
                NOT_READ, f"{self._path} row {at + 1} cannot be read: {error}"
            ) from None
        row = {}
        for name, values in zip(self._columns, self._values, strict=True):
            value = values[at - self._first]
            if value is None:
                return _missing(name)
            row[name] = value if isinstance(value, str) else _plain(value)
        return row

    def close(self) -> None:
        self._file.close()

    def _load(self, at: int) -> None:
        """Have row `at` in memory."""
        group = bisect.bisect_right(self._starts, at) - 1
        if group != self._group or at < self._first:
            self._group = group
            self._after = self._starts[group]
            self._batches = self._file.iter_batches(
                _ROWS, row_groups=[group], columns=self._columns, use_threads=False
            )
        while at >= self._after or at < self._first:
            batch = next(self._batches)
            self._first, self._after = self._after, self._after + batch.num_rows
            if at < self._after:  # else it is passed over
                self._values = [batch.column(name).to_pylist() for name in self._columns]


def _check_columns(path: Path, wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        found = list(names).count(name)
        if found == 1:
            continue
        why = f"column {name!r} is there {found} times"
        if not found:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            why = f"no column {name!r}{hint} It has {', '.join(map(repr, names))}"[:1000]
        raise BatchError(NOT_READ, f"{path}: {why}")


def _check_type(path: Path, name: str, type: Any) -> None:
    types = pyarrow().types
    inner = type.value_type if types.is_dictionary(type) else type
    kinds = ("string", "large_string", "integer", "floating", "boolean", "decimal", "date")
    if not any(getattr(types, f"is_{kind}")(inner) for kind in kinds):
        raise BatchError(
            NOT_READ,
            f"{path}: column {name!r} has the type {type}; a prompt takes text, numbers, dates "
            "and true or false",
        )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _missing(name: str) -> LineError:
    return LineError(f"column {name!r} is empty in this row", field=name)


def pyarrow(module: str = "") -> Any:
    """The package or a module of it. Errors: BatchError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise BatchError(
            NOT_READ,
            "Parquet needs the package pyarrow, which is not installed here; pip install "
            "'engineroom[parquet]' brings it",
        ) from error
    return pyarrow.parquet if module else pyarrow


__all__ = ["FORMATS", "MAX_LINE", "Row", "Source", "guess_format", "open_source", "pyarrow"]
