"""What an engine's answers depend on, as hashes and plain values; where two such lists differ."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engineroom import __version__

if TYPE_CHECKING:
    from ..load.checkpoint import Checkpoint
    from ..runtime.assemble import LoadedModel

# Options that decide bits. Others (threads, batch sizes, blocks, memory) decide speed alone.
DECIDING = ("dtype", "quantization", "activations", "kv_cache_dtype")
_SPEED_ALONE = ("threads", "tuned")  # of what a backend says of itself
# What stands beside a folder's weights and decides how text becomes tokens.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json")
_NATIVE = "engineroom.kernels.cpu._native"
_ROOMS = ("engine", "kernels", "quant")


def how_computed(loaded: LoadedModel) -> dict[str, Any]:
    """All but the weights: no file of weights is read for it."""
    template = loaded.chat_template
    described = loaded.backend.describe()
    return {
        "name": loaded.source.name,
        "tokenizer": _tokenizer(loaded.checkpoint),
        "template": None if template is None else _sha256(template.source.encode()),
        "context": loaded.memory.max_model_len,
        "backend": {name: text for name, text in described.items() if name not in _SPEED_ALONE},
        **{name: getattr(loaded.config, name) for name in DECIDING},
    }


def all_facts(loaded: LoadedModel) -> dict[str, Any]:
    """how_computed(), every byte of the weights, and the engine's build. Reads the whole model:
    about a second a gigabyte."""
    return {
        **how_computed(loaded),
        "weights": weights_sha256(loaded.checkpoint),
        "config": _config(loaded.checkpoint),
        "build": {"engineroom": __version__, "code": _code(), "native": _native()},
    }


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Of every tensor's name, format, shape and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensor_names):
        if checkpoint.is_spare(name):
            continue
        weight = checkpoint.tensor(name)
        digest.update(f"{name} {weight.format.name} {weight.shape}\0".encode())
        for part, data in sorted(weight.buffers.items()):
            digest.update(f"{part} {data.nbytes}\0".encode())
            digest.update(data.data)
    return digest.hexdigest()


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Each leaf that differs, as "weights: ... before, ... now"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(old.get(key), new.get(key), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, two) in enumerate(zip(old, new, strict=True), start=1):
            yield from differences(one, two, f"{name}[{number}]")
    elif old != new:
        yield f"{name}: {_shown(old)} before, {_shown(new)} now"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _tokenizer(checkpoint: Checkpoint) -> str:
    """Of a folder's files, or of what a .gguf file's header says of its tokens."""
    if checkpoint.kind == "gguf":
        return _of_metadata(checkpoint, tokenizer=True)
    found = [checkpoint.path / name for name in _TOKENIZER_FILES]
    files = [hashlib.sha256(f.read_bytes()).digest() for f in found if f.exists()]
    return _sha256(b"".join(files))


def _config(checkpoint: Checkpoint) -> str:
    """Of what the checkpoint says of the model beside its weights and its tokenizer."""
    if checkpoint.kind == "gguf":
        return _of_metadata(checkpoint, tokenizer=False)
    return _sha256(_json([dict(checkpoint.metadata), dict(checkpoint.generation_config)]))


def _of_metadata(checkpoint: Checkpoint, *, tokenizer: bool) -> str:
    """The template has a hash of its own, since one may be given in its place."""
    metadata = checkpoint.metadata
    kept = {
        key: metadata[key]
        for key in sorted(metadata)
        if key.startswith("tokenizer.") == tokenizer and not key.endswith("chat_template")
    }
    return _sha256(_json(kept))


def _code() -> str:
    """Of every Python file of the package's rooms."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _native() -> str | None:
    """Of the native kernels, where they are loaded."""
    module = sys.modules.get(_NATIVE)
    file = getattr(module, "__file__", None)
    return None if file is None else _sha256(Path(file).read_bytes())


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = ["DECIDING", "all_facts", "differences", "how_computed", "weights_sha256"]
