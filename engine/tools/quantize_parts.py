"""What calibration came to, tap by tap, in a folder beside what is made.

A tap's file is written whole or not at all, and all of them are for one key: what they were made
from and how. So a run that was killed goes on, and memory holds what one tap came to: a matrix is
read again when it is written to the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...quant.rounding import Rounded
from ..config import ConfigError

_FIELDS = ("q", "scale", "zero")


@dataclass(frozen=True, eq=False)
class Tapped:
    """A tap's matrices rounded, by key; what their columns were multiplied by [K] where not by 1,
    by `key_of("", expert)`; relative errors of layers; matrices of experts that saw too few
    tokens."""

    rounded: Mapping[str, Rounded]
    by: Mapping[str, np.ndarray] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    few: int = 0


class Parts:
    """Errors: ConfigError where the folder was begun for another key."""

    def __init__(self, folder: Path, key: str, restart: bool) -> None:
        self._folder = folder
        self._home: dict[str, Path] = {}
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        manifest = folder / "manifest.json"
        if manifest.exists():
            if json.loads(manifest.read_text("utf-8")) != {"key": key}:
                raise ConfigError(
                    "out",
                    f"{folder} was begun with other options, another text or another model; go on "
                    "with those, or begin anew with --restart",
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._write(manifest, lambda file: file.write(json.dumps({"key": key}).encode()))

    def load(self, index: int) -> Tapped | None:
        """What tap number `index` came to; None where no run has come so far."""
        path = self._path(index)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            keys = [name.removesuffix("/q") for name in arrays if name.endswith("/q")]
            self._home |= dict.fromkeys(keys, path)
            return Tapped(
                {key: _rounded(arrays, key) for key in keys},
                {name[2:]: arrays[name] for name in arrays if name[:2] == "by"},
                tuple(map(float, arrays["errors"])),
                int(arrays["few"]),
            )

    def save(self, index: int, tapped: Tapped) -> None:
        arrays = {
            f"{key}/{name}": getattr(rounded, name)
            for key, rounded in tapped.rounded.items()
            for name in _FIELDS
        }
        arrays |= {f"by{which}": by for which, by in tapped.by.items()}
        arrays |= {"errors": np.array(tapped.errors, np.float64), "few": np.array(tapped.few)}
        path = self._path(index)
        self._write(path, lambda file: np.savez(file, **arrays))
        self._home |= dict.fromkeys(tapped.rounded, path)

    def rounded(self, key: str) -> Rounded:
        """One matrix of a tap that was loaded or saved. Errors: KeyError."""
        with np.load(self._home[key], allow_pickle=False) as arrays:
            return _rounded(arrays, key)

    def _path(self, index: int) -> Path:
        return self._folder / f"tap-{index:04}.npz"

    def _write(self, path: Path, write: Callable[[Any], Any]) -> None:
        part = path.with_suffix(".growing")
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _rounded(arrays: Mapping[str, np.ndarray], key: str) -> Rounded:
    return Rounded(*(arrays[f"{key}/{name}"] for name in _FIELDS))


__all__ = ["Parts", "Tapped"]
