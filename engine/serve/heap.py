"""The server's heap: large blocks lie apart from it, so that they leave no gaps there."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 128 << 10  # bytes: glibc's own first value
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries need none


def keep_large_blocks_apart() -> None:
    """Give every block above 128 KiB pages of its own, also after the first was freed.

    asyncio reads a connection into a new block of 256 KiB that it then shrinks to what came. glibc,
    having freed one, takes the next from the heap, where bodies then lie as far apart: what was
    free there grew by 200 bytes a request for ten thousand requests and more.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)


__all__ = ["keep_large_blocks_apart"]
