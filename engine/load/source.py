"""Where a model comes from: a folder, a .gguf file, a short name, or a Hugging Face id.

A path that exists is used as it is and never touches the network. What does not resolve says what
was tried, what lies nearest, and how to mend it.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .catalogue import CATALOGUE
from .checkpoint import PICKLES
from .fetch import FetchError, fetch


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. `origin`: path, catalogue or hub, as text for people."""

    path: Path
    name: str
    origin: str


class SourceError(ValueError):
    """No model by that name: what was tried, what is nearest, how to mend it. `code`: errors.md."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def resolve(
    model: str,
    *,
    revision: str | None = None,
    progress: TextIO | None = None,
    fetcher: Callable[..., Path] = fetch,
) -> ModelSource:
    """The model's place on this machine; a short name or a Hugging Face id may be downloaded.

    `revision` (branch, tag or commit) applies to Hugging Face ids alone. Errors: SourceError.
    """
    if not model.strip() or "\0" in model:
        raise SourceError("E-MODEL-01", f"{model!r} names no model. {_how_to_name_one()}")
    path = Path(os.path.expanduser(model))
    if os.path.lexists(path):
        return _local(path)
    if model in CATALOGUE:
        try:
            found = fetcher(CATALOGUE[model], progress=progress)
        except FetchError as error:
            raise SourceError(error.code, str(error)) from error
        return ModelSource(found, model, f"the catalogue name {model}")
    if _looks_like_hub_id(model, path):
        return _hub(model, revision)
    raise SourceError("E-MODEL-01", _nothing_there(model, path))


# ----------------------------------------------------------------------------------- local paths


def _local(path: Path) -> ModelSource:
    absolute = path.absolute()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SourceError(
            "E-MODEL-01",
            f"{absolute} is a symbolic link to {os.readlink(path)}, which does not exist",
        ) from None
    except OSError as error:
        raise SourceError("E-MODEL-02", f"{absolute} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        _require_model_files(absolute)
        return ModelSource(absolute, absolute.name or str(absolute), f"the folder {absolute}")
    if not stat.S_ISREG(mode):
        raise SourceError(
            "E-MODEL-02",
            f"{absolute} is {_kind(mode)}, not a file or a folder; a model is mapped from disk",
        )
    # A pickle passes as well: `checkpoint` refuses it, and says how to convert it.
    if absolute.suffix.lower() not in (".gguf", *PICKLES):
        raise SourceError(
            "E-MODEL-02",
            f"{absolute} is a file, but not a .gguf file. A safetensors model is given as its "
            f"folder (the one with config.json): {absolute.parent}",
        )
    return ModelSource(absolute, absolute.stem, f"the file {absolute}")


def _require_model_files(folder: Path) -> None:
    """A folder that certainly holds no model is refused here, saying what it holds; whether its
    files make a whole model is for `checkpoint` to say."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise SourceError("E-MODEL-02", f"{folder} cannot be read: {error.strerror}") from error
    if any(n == "config.json" or n.endswith((".gguf", ".safetensors", *PICKLES)) for n in names):
        return
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    inner = [n for n in names if _describe(folder / n)]
    hint = f" Nearest: {folder / inner[0]} ({_describe(folder / inner[0])})." if inner else ""
    raise SourceError(
        "E-MODEL-02",
        f"{folder} holds no model: {shown or 'it is empty'}. A model folder has config.json and "
        f".safetensors files, or one .gguf file.{hint}",
    )


def _kind(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if is_kind(mode):
            return name
    return "a special file"


def _nothing_there(model: str, path: Path) -> str:
    parts = [f"No model at {path.absolute()} (does not exist).", *_nearest(model, path)]
    return " ".join([*parts, _how_to_name_one()])


def _nearest(model: str, path: Path) -> list[str]:
    """A sentence for each thing that could have been meant: a path here, a short name."""
    nearest = _nearest_path(path)
    names = difflib.get_close_matches(model.lower(), CATALOGUE, n=1)
    parts = []
    if nearest is not None:
        what = _describe(nearest)
        parts.append(f"Nearest: {nearest}{f' ({what})' if what else ''}.")
    if names:
        parts.append(f"Nearest short name: {names[0]}.")
    return parts


def _nearest_path(path: Path) -> Path | None:
    """The existing path most like this one: each missing component is replaced by its closest
    neighbour; None where a component has no neighbour close to it."""
    path = path.absolute()
    here = Path(path.anchor)
    for part in path.parts[1:]:
        if (here / part).exists():
            here = here / part
            continue
        try:
            names = [entry.name for entry in os.scandir(here)]
        except OSError:
            return None
        close = difflib.get_close_matches(part, names, n=1)
        if not close:
            return None
        here = here / close[0]
    return here


def _describe(path: Path) -> str:
    """ "config.json, 2 safetensors" for a model, "" for anything else."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return "a .gguf file"
    try:
        names = [entry.name for entry in os.scandir(path)]
    except OSError:
        return ""
    found = ["config.json"] if "config.json" in names else []
    for ending in ("safetensors", "gguf"):
        count = sum(n.endswith("." + ending) for n in names)
        if count:
            found.append(f"{count} {ending}")
    return ", ".join(found)


def _how_to_name_one() -> str:
    return (
        "A model is a folder with config.json and .safetensors files, a .gguf file, a short name "
        f"({', '.join(CATALOGUE)}), or a Hugging Face id (organisation/name)."
    )


# -------------------------------------------------------------------------- the Hugging Face hub


def _looks_like_hub_id(model: str, path: Path) -> bool:
    """organisation/name, unless the first part is a folder here: then it is a mistyped path."""
    if not _HUB_ID.fullmatch(model) or model.lower().endswith((".gguf", ".safetensors")):
        return False
    return not path.parent.is_dir()


def _hub(model: str, revision: str | None) -> ModelSource:
    tried = f"{model!r}: nothing lies at {Path(model).absolute()}, and as a Hugging Face id "
    meant = " ".join([*_nearest(model, Path(model)), _how_to_name_one()])
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SourceError(
            "E-MODEL-03",
            tried + "it needs huggingface_hub, which is not installed.\n"
            "Install it: pip install 'engineroom[hub]'. " + meant,
        )
    import huggingface_hub

    try:
        folder = _snapshot(huggingface_hub, model, revision)
    except SourceError:
        raise
    except Exception as error:  # the library's and its HTTP client's errors share no base
        first = next((line for line in str(error).splitlines() if line.strip()), "no details")
        raise SourceError(
            "E-MODEL-03",
            tried + f"it could not be fetched: {type(error).__name__}: {first[:300]}\n"
            "Check the spelling, the network, and for a gated model `hf auth login`. " + meant,
        ) from error
    return ModelSource(folder, model, f"the Hugging Face id {model}")


def _snapshot(hub: Any, model: str, revision: str | None) -> Path:
    """The model's files: its safetensors and their configuration, or its only GGUF file."""
    try:
        names = [s.rfilename for s in hub.HfApi().model_info(model, revision=revision).siblings]
    except hub.errors.HfHubHTTPError:
        raise  # the hub answered: no such model, or no right to it
    except Exception:  # no answer (each version of the library has its own types for that)
        names = []
    if not names:  # a complete earlier download will do
        try:
            return Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
        except hub.errors.LocalEntryNotFoundError:
            raise ConnectionError(
                "the hub did not answer, and this model was not downloaded here before"
            ) from None
    gguf = [n for n in names if n.lower().endswith(".gguf")]
    if any(n.endswith(".safetensors") for n in names) or not gguf:
        return Path(
            hub.snapshot_download(model, revision=revision, allow_patterns=list(_HUB_FILES))
        )
    if len(gguf) > 1:
        raise SourceError(
            "E-MODEL-03",
            f"{model} holds {len(gguf)} .gguf files ({', '.join(sorted(gguf)[:8])}); download the "
            f"one you want and give its path, for example: "
            f"hf download {model} {sorted(gguf)[0]} --local-dir .",
        )
    return Path(hub.hf_hub_download(model, gguf[0], revision=revision))
