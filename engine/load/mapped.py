"""One checkpoint file, mapped read-only, and the error that every reader of one raises."""

from __future__ import annotations

import difflib
import hashlib
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...kernels.weights import release_pages

MAX_MESSAGE = 4000  # characters


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what, why with numbers, how to mend it.

    `field` names the header field, tensor, metadata key or file that is at fault. Names come from
    files that nobody vouches for: what is not printable is escaped, and no message is endless.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(_printable(message, MAX_MESSAGE, keep="\n"))
        self.field = shown(field)


class MappedFile:
    """A regular file's bytes as a read-only memory map; nothing is read before it is touched.

    The file must not be truncated by others while it is mapped: the system answers a read beyond
    the new end with SIGBUS, which no reader can turn into an error.
    Errors: CheckpointError where the path is no readable regular file or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        fd = _open_regular(path)
        try:
            status = os.fstat(fd)
            self.size, self._changed_ns = status.st_size, status.st_mtime_ns
            if not self.size:
                raise CheckpointError("file", f"{path} is empty (0 bytes); fetch it again")
            self._map: mmap.mmap | None = mmap.mmap(fd, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError("file", f"cannot map {path}: {error.strerror}") from None
        finally:
            os.close(fd)

    @property
    def buffer(self) -> mmap.mmap:
        if self._map is None:
            raise CheckpointError("file", f"{self.path} was closed; open the checkpoint again")
        return self._map

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes [offset, offset + nbytes) as uint8, a view; the caller checks the range."""
        return np.frombuffer(self.buffer, dtype=np.uint8, count=nbytes, offset=offset)

    def fingerprint(self) -> str:
        """What tells this file from others and from itself changed: its size, its time of change
        and a SHA-256 of 64 pages spread over it."""
        pages = range(0, self.size, max(4096, self.size // 64))
        digest = hashlib.sha256()
        for at in pages:
            digest.update(self.buffer[at : at + 4096])
            release_pages(self.view(0, self.size))  # a page may bring 2 MiB around it
        return f"{self.size}.{self._changed_ns}.{digest.hexdigest()}"

    def let_go(self) -> None:
        """Give the pages read so far back to the system; what is read again comes from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the map: at once, or when the last view of it is dropped. Twice does nothing."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                pass  # views are alive; the map goes with the last of them


def shown(name: str, most: int = 120) -> str:
    """A name from a file, fit for one line of a message or a log."""
    return _printable(name, most)


def _printable(text: str, most: int, keep: str = "") -> str:
    cut = text if len(text) <= most else text[:most] + "…"
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in cut
    )


def read_small(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes. Errors: CheckpointError."""
    fd = _open_regular(path)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(
                path.name, f"{path} has {size} bytes; such a file may have at most {limit}"
            )
        return file.read(size)


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file (links are followed: the Hugging Face cache is made of them).

    Opened without blocking and checked on the descriptor, so that a FIFO or a device in a file's
    place neither hangs the reader nor slips in between a check and the opening.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(path.name, f"cannot open {path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(path.name, f"{path} is not a regular file")
    return fd


def no_such_tensor(where: str, name: str, known: Iterable[str]) -> CheckpointError:
    """The error for a tensor that a checkpoint does not hold, with the nearest that it does."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {shown(near[0])!r}?" if near else ""
    have = f"it has {len(names)}"
    return CheckpointError(name, f"{where} has no tensor {shown(name)!r} ({have}){hint}")
