"""The texts that `eval` scores and `quantize` calibrates with where none is given.

Documentation strings of the standard library: prose and code that every Python installation
carries. They change with Python's version, so results name a text by its hash. The two texts share
no module: a model is never judged by what it was calibrated with.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError

_EVALUATION = (
    *("heapq", "decimal", "difflib", "fractions", "statistics", "datetime", "argparse"),
    *("optparse", "doctest", "textwrap", "pprint", "string", "shlex", "configparser"),
)
_CALIBRATION = (
    *("collections", "itertools", "functools", "random", "logging", "pathlib", "unittest"),
    *("email.message", "http.client", "urllib.request", "socket", "sqlite3", "threading"),
    *("subprocess", "tempfile", "zipfile", "tarfile", "csv", "json", "pickle", "re"),
    *("smtplib", "imaplib", "ftplib", "calendar", "locale", "gettext", "turtle", "cmd"),
)


@dataclass(frozen=True)
class Text:
    """A text and what results call it."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def evaluation_text(path: str | None = None) -> Text:
    """A UTF-8 file's text, else the default one. Errors: ConfigError("text")."""
    return _of_file(path) if path is not None else _of_modules("evaluation", _EVALUATION)


def calibration_text(path: str | None = None) -> Text:
    """As evaluation_text, of other modules."""
    return _of_file(path) if path is not None else _of_modules("calibration", _CALIBRATION)


def _of_file(path: str) -> Text:
    try:
        return Text(Path(path).name, Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", f"{path}: no UTF-8 text can be read of it: {error}") from error


def _of_modules(what: str, modules: Sequence[str]) -> Text:
    """Each module's own documentation, then that of its public names, in their order."""
    parts: list[object] = []
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:  # tkinter and sqlite3 are left out of some builds of Python
            continue
        parts += [getattr(module, "__about__", ""), module.__doc__]
        for public in sorted(getattr(module, "__all__", ())):
            thing = getattr(module, public, None)
            parts.append(thing.__doc__ if callable(thing) or isinstance(thing, type) else "")
    said = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
    if not said:
        raise ConfigError(
            "text",
            "Python runs without documentation strings (-OO), of which the default text is made; "
            "give a text with --text FILE",
        )
    return Text(f"default {what} text", "\n\n".join(said) + "\n")


__all__ = ["Text", "calibration_text", "evaluation_text"]
