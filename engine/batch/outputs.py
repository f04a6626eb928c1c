"""The output file, made from the journal at the end: JSON lines, or the same as a Parquet table.

It is a function of the journal's answers alone, so that it is the same byte for byte however often
the run was interrupted (a Parquet file: by one version of pyarrow).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DAMAGED, BatchError
from .journal import not_read, not_written, sync_folder
from .sources import pyarrow

_GROUP_ROWS, _GROUP_BYTES = 4096, 1 << 23  # of a row group: what is in memory at a time
_WHY = (
    "is not what the journal holds; remove the file and run the batch again: it is written anew "
    "from the journal"
)


def is_parquet(output: Path) -> bool:
    """By its name."""
    return output.suffix == ".parquet"


def check_output(output: Path) -> None:
    """Before anything runs. Errors: BatchError where the format's package is not installed."""
    if is_parquet(output):
        pyarrow()


def write_output(output: Path, lines: Iterable[bytes]) -> None:
    """All of `lines`, under another name until they are on the disk. Errors: BatchError."""
    fresh = output.with_name(output.name + ".new")
    try:
        with fresh.open("wb") as file:
            if is_parquet(output):
                _write_parquet(file, lines)
            else:
                file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, output)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise not_written(output, error) from error
    sync_folder(output.parent)


def verify_output(output: Path, lines: Iterable[bytes], count: int) -> None:
    """That the file is what write_output() makes of `count` lines. Errors: BatchError."""
    try:
        if is_parquet(output):
            _verify_parquet(output, lines, count)
        else:
            _verify_lines(output, lines, count)
    except OSError as error:
        raise not_read(output, error) from error


def _verify_lines(output: Path, lines: Iterable[bytes], count: int) -> None:
    with output.open("rb") as file:
        for number, line in enumerate(lines, start=1):
            found = file.read(len(line))
            if found != line:
                at = f"has {number - 1} lines of {count}" if not found else f"line {number} {_WHY}"
                raise BatchError(DAMAGED, f"{output} {at}")
        if file.read(1):
            raise BatchError(DAMAGED, f"{output} goes on at line {count + 1}, which {_WHY}")


# ----------------------------------------------------------------------------------------- Parquet


def _write_parquet(file: BinaryIO, lines: Iterable[bytes]) -> None:
    with pyarrow("parquet").ParquetWriter(file, _schema(), compression="zstd") as writer:
        for table in _tables(lines):
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def _verify_parquet(output: Path, lines: Iterable[bytes], count: int) -> None:
    row = 0
    try:
        with pyarrow("parquet").ParquetFile(output) as file:
            if file.metadata.num_rows != count:
                raise BatchError(DAMAGED, f"{output} has {file.metadata.num_rows} rows of {count}")
            for group, table in enumerate(_tables(lines)):
                found = file.read_row_group(group)
                if not found.equals(table):
                    pairs = zip(found.to_pylist(), table.to_pylist(), strict=False)
                    row += next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
                    raise BatchError(DAMAGED, f"{output} row {row + 1} {_WHY}")
                row += table.num_rows
    except ValueError as error:  # Arrow's
        raise BatchError(DAMAGED, f"{output} after row {row} {_WHY} ({error})") from None


def _schema() -> Any:
    pa = pyarrow()
    kinds = {
        "custom_id": pa.string(),
        "status_code": pa.int32(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "error": pa.string(),
        "response": pa.string(),
    }
    return pa.schema(list(kinds.items()))


def _tables(lines: Iterable[bytes]) -> Iterator[Any]:
    """One table for each row group."""
    rows: list[dict[str, Any]] = []
    size = 0
    for line in lines:
        rows.append(_row(line))
        size += len(line)
        if len(rows) == _GROUP_ROWS or size >= _GROUP_BYTES:
            yield pyarrow().Table.from_pylist(rows, schema=_schema())
            rows, size = [], 0
    if rows:
        yield pyarrow().Table.from_pylist(rows, schema=_schema())


def _row(line: bytes) -> dict[str, Any]:
    """A line of the JSON output by columns; `text` is the first choice's."""
    value = json.loads(line)
    body = value["response"]["body"]
    choice = (body.get("choices") or [{}])[0]
    text = choice["message"]["content"] if "message" in choice else choice.get("text")
    usage = body.get("usage", {})
    row = {
        "custom_id": value["custom_id"],
        "status_code": value["response"]["status_code"],
        "text": text,
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": body.get("error", {}).get("message"),
        "response": json.dumps(body, ensure_ascii=False),
    }
    # Arrow takes UTF-8 alone; a lone surrogate that a model spelt becomes "?".
    return {
        k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v
        for k, v in row.items()
    }


__all__ = ["check_output", "verify_output", "write_output"]
