"""What a batch's answers depend on, as hashes and plain values: the journal's first record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engineroom import __version__

from ..core.request import SamplingParams
from ..engine import Engine
from .errors import CHANGED, NOT_READ, BatchError
from .inputs import Inputs
from .journal import FORMAT
from .template import PLAIN, Prompting

# Options that decide bits. Others (threads, batch sizes, blocks, memory) decide speed alone.
_DECIDING = ("dtype", "quantization", "activations", "kv_cache_dtype")
_SPEED_ALONE = ("threads", "tuned")  # of what a backend says of itself
# What stands beside a folder's weights and decides how text becomes tokens.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json")


def engine_facts(engine: Engine) -> dict[str, Any]:
    """The model and how it is computed, of a loaded engine."""
    loaded = engine.loaded
    template = loaded.chat_template
    described = loaded.backend.describe()
    return {
        "name": loaded.source.name,
        "weights": loaded.checkpoint.fingerprint(),
        "tokenizer": _tokenizer(loaded.checkpoint.path),
        "template": None if template is None else _sha256(template.source.encode()),
        "context": loaded.memory.max_model_len,
        "backend": {name: text for name, text in described.items() if name not in _SPEED_ALONE},
        **{name: getattr(loaded.config, name) for name in _DECIDING},
    }


def make(
    model: Mapping[str, Any],
    inputs: Inputs,
    params: SamplingParams,
    format: str,
    prompting: Prompting = PLAIN,
) -> dict[str, Any]:
    """The manifest of a batch; equal for equal bytes, wherever the files lie.

    Errors: BatchError for parameters that cannot be written down.
    """
    if not params.replayable:
        raise BatchError(
            NOT_READ, "logits_processor is a Python function, which no manifest can name"
        )
    files = [{"sha256": f.sha256, "bytes": f.bytes, "lines": f.lines} for f in inputs.files]
    made = {
        "journal": FORMAT,
        "engineroom": __version__,
        "model": dict(model),
        "inputs": files,
        "format": format,
        "prompting": prompting.as_plain(),
        "params": params.to_dict(),
    }
    return dict(json.loads(json.dumps(made)))  # as the journal gives it back


def digest(manifest: Mapping[str, Any]) -> bytes:
    """SHA-256; seeds and ids of the batch derive from it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).digest()


def check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Errors: BatchError naming each difference."""
    changes = list(_differences("", old, new))
    if changes:
        listed = "\n".join(f"  {change}" for change in changes[:8])
        raise BatchError(
            CHANGED,
            f"{path} was begun with something else, and answers of two kinds do not go into one "
            f"file:\n{listed}\nPut it back, name another output, or begin anew with --restart.",
        )


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(inner, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, two) in enumerate(zip(old, new, strict=True), start=1):
            yield from _differences(f"{name}[{number}]", one, two)
    elif old != new:
        yield f"{name}: {_shown(old)} before, {_shown(new)} now"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _tokenizer(path: Path) -> str:
    """Of a folder's files; a .gguf file holds its own, and `weights` names it."""
    if not path.is_dir():
        return "in the weights' file"
    found = [path / name for name in _TOKENIZER_FILES if (path / name).exists()]
    return _sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in found))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = ["check_same", "digest", "engine_facts", "make"]
