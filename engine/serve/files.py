"""Files that clients keep here: OpenAI's /v1/files, each key's apart, on the disk under --data-dir.

A file is two: its bytes, and its description as JSON, which is written last and makes it exist. A
client's names are in the description alone; paths are made of ids that we drew.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

from .errors import ApiError
from .strict import Strict

_ID = re.compile(r"file-[0-9a-f]{24}")
_CHUNK = 1 << 20
_OVERHEAD = 4096  # bytes that a file counts beside its own, so that empty ones are not free
_MAX_NAME = 255


class StoredFile(msgspec.Struct, kw_only=True):
    """OpenAI's file object. created_at: Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    expires_at: None = None


class _HasId(Protocol):
    id: str


_Row = TypeVar("_Row", bound=_HasId)
After = Annotated[str, Meta(description="The id of the last one seen. Empty: from the first on.")]


class FileUpload(Strict, kw_only=True):
    """POST /v1/files, as multipart/form-data."""

    file: bytes
    purpose: Literal["batch"]


class FileQuery(Strict, kw_only=True):
    """Behind GET /v1/files?."""

    after: After = ""
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, Meta(description="Empty: any.")] = ""


class FileList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[StoredFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileStore:
    """owner: who may see a file, a name fit for a folder. Blocks on the disk; from any thread.

    Errors, of every method: ApiError("not_found"), of what is not there and of what is another
    owner's alike; OSError.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """max_bytes: that one owner may fill."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # of the quota: one file is taken in at a time
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.glob("*/*.new"):  # of a server that was killed
            left.unlink()

    def create(
        self, owner: str, source: BinaryIO, size: int, *, filename: str, purpose: str
    ) -> StoredFile:
        """Errors: ApiError("storage_full")."""
        with self._lock:
            used = self.used(owner)
            if used + size + _OVERHEAD > self._max_bytes:
                raise ApiError(
                    "storage_full",
                    f"{size} bytes more than the {used} that this key's files take would exceed "
                    f"{self._max_bytes}; delete files that are of no use any more",
                    param="file",
                )
            chunks = iter(lambda: source.read(_CHUNK), b"")
            file_id = new_file_id()
            return self.put(owner, file_id, chunks, filename=filename, purpose=purpose)

    def put(
        self, owner: str, file_id: str, chunks: Iterable[bytes], *, filename: str, purpose: str
    ) -> StoredFile:
        """Write a file of ours, whatever the quota; again: it is replaced by the same."""
        folder = self._folder / owner
        folder.mkdir(mode=0o700, exist_ok=True)
        size = 0
        with replacing(folder / f"{file_id}.data") as file:
            for chunk in chunks:
                size += file.write(chunk)
        name = "".join(c if c.isprintable() else "?" for c in filename)[:_MAX_NAME]
        made = StoredFile(
            id=file_id,
            bytes=size,
            created_at=int(time.time()),
            filename=name,
            purpose=purpose,
        )
        with replacing(folder / f"{file_id}.json") as file:
            file.write(msgspec.json.encode(made))
        return made

    def get(self, owner: str, file_id: str) -> StoredFile:
        described = self._path(owner, file_id, "json")
        try:
            return msgspec.json.decode(described.read_bytes(), type=StoredFile)
        except FileNotFoundError:
            raise _not_found(file_id) from None

    def path(self, owner: str, file_id: str) -> Path:
        """Where its bytes are."""
        self.get(owner, file_id)
        return self._path(owner, file_id, "data")

    def delete(self, owner: str, file_id: str) -> FileDeleted:
        self.get(owner, file_id)
        with contextlib.suppress(FileNotFoundError):
            self._path(owner, file_id, "json").unlink()
            self._path(owner, file_id, "data").unlink()
        return FileDeleted(id=file_id)

    def files(self, owner: str) -> list[StoredFile]:
        """All of an owner's, the newest first."""
        found = []
        for path in (self._folder / owner).glob("file-*.json"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found.append(msgspec.json.decode(path.read_bytes(), type=StoredFile))
        return sorted(found, key=lambda f: (f.created_at, f.id), reverse=True)

    def used(self, owner: str) -> int:
        """Bytes that an owner's files take."""
        return sum(f.bytes + _OVERHEAD for f in self.files(owner))

    def _path(self, owner: str, file_id: str, ending: str) -> Path:
        if _ID.fullmatch(file_id) is None:
            raise _not_found(file_id)
        return self._folder / owner / f"{file_id}.{ending}"


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end, whole and on the disk, or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def page_of(rows: list[_Row], after: str, limit: int) -> tuple[list[_Row], bool]:
    """(rows behind the one named `after`, whether there are more). Errors: ApiError."""
    ids = [row.id for row in rows]
    if after and after not in ids:
        raise ApiError("not_found", f"nothing here is called {after[:100]!r}", param="after")
    start = ids.index(after) + 1 if after else 0
    return rows[start : start + limit], len(rows) > start + limit


def _not_found(file_id: str) -> ApiError:
    return ApiError("not_found", f"no file {file_id[:100]!r} of this key's", param="file_id")


__all__ = [
    "After",
    "FileDeleted",
    "FileList",
    "FileQuery",
    "FileStore",
    "FileUpload",
    "StoredFile",
    "new_file_id",
    "page_of",
    "replacing",
]
