"""The process's heap: what loading freed goes back to the system."""

from __future__ import annotations

import ctypes

# glibc's malloc_trim(3); other C libraries have none and give memory back by themselves.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed() -> None:
    """Return freed memory that the C library keeps for later: a vocabulary leaves 15 MiB of it."""
    if _TRIM is not None:
        _TRIM(ctypes.c_size_t(0))
