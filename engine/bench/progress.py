"""One line on a terminal that says how far a benchmark is."""

from __future__ import annotations

import sys


def progress(text: str) -> None:
    """Show `text` in place of the last one; "" clears the line. Nothing where stderr is a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
