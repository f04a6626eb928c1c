"""The server's memory: what keeps it from growing with the number of requests."""

from __future__ import annotations

import ctypes
import gc

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 128 << 10  # bytes: glibc's own first value
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries need none


def settle() -> None:
    """Once, when the program is loaded and before it serves.

    What is there now stays, and is left out of collections: Python lets garbage grow to a quarter
    of what it would have to look at, and stops everything for tens of milliseconds to look.

    Every block above 128 KiB gets pages of its own, also after the first was freed. asyncio reads a
    connection into a new block of 256 KiB that it then shrinks to what came. glibc, having freed
    one, takes the next from the heap, where bodies then lie as far apart: what was free there grew
    by 200 bytes a request for ten thousand requests and more.
    """
    gc.freeze()
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)


__all__ = ["settle"]
