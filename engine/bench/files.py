"""Writing a report to files, in each kind that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .page import html
from .tables import Report

KINDS: dict[str, Callable[[Report], str]] = {
    "json": Report.json,
    "csv": Report.csv,
    "md": Report.markdown,
    "html": html,
}


def write(report: Report, paths: Mapping[str, str | None]) -> list[Path]:
    """Write `report` as each of KINDS that has a path; their folders are made."""
    made = []
    for kind, name in paths.items():
        if name is not None:
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(KINDS[kind](report), "utf-8")
            made.append(path)
    return made
