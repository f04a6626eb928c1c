"""The losses that `eval --keep` measured, kept beside the model for `inspect` to tell.

One JSON file: NAME.gguf.eval.json beside a file, engineroom-eval.json inside a folder. A result is
of one quantization and one way of multiplying, and of the very weights that were measured: their
fingerprint is part of it, so that a changed model has no measurements.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..config import ConfigError

_SCHEMA = "engineroom.eval/1"


def file_of(path: Path) -> Path:
    """Where the measurements of the model at `path` are kept."""
    return (
        path / "engineroom-eval.json" if path.is_dir() else path.with_name(path.name + ".eval.json")
    )


def save(report: dict[str, Any]) -> Path:
    """Keep a report of `evaluate`, in place of an older one of its kind. Errors: ConfigError."""
    model = report["model"]
    file = file_of(Path(model["path"]))
    kept = [r for r in _read(file) if _key(r) != _key(report)]
    text = json.dumps({"schema": _SCHEMA, "results": [*kept, report]}, indent=1)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text + "\n", "utf-8")
        os.replace(part, file)
    except OSError as error:
        raise ConfigError("save", f"{file} cannot be written: {error.strerror}") from error
    return file


def load(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    """What was measured of the weights with this fingerprint. Errors: ConfigError (damaged)."""
    return [r for r in _read(file_of(path)) if r["model"]["fingerprint"] == fingerprint]


def _key(report: dict[str, Any]) -> tuple[Any, ...]:
    model = report["model"]
    names = ("fingerprint", "quantization", "activations", "backend")
    return tuple(model[name] for name in names)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        kept = json.loads(file.read_text("utf-8"))
        if kept["schema"] != _SCHEMA:
            raise ValueError(f"its schema is {kept['schema']!r}, not {_SCHEMA!r}")
        results: list[dict[str, Any]] = kept["results"]
        for result in results:
            _key(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "save", f"{file} holds no measurements that can be read ({error!r}); delete it"
        ) from error
    return results


__all__ = ["file_of", "load", "save"]
