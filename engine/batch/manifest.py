"""What a batch's answers depend on, as hashes and plain values: the journal's first record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engineroom import __version__

from ..core.sampling_params import SamplingParams
from ..engine import Engine
from ..receipts.facts import differences, how_computed
from .errors import CHANGED, NOT_READ, BatchError
from .inputs import Inputs
from .journal import FORMAT
from .template import PLAIN, Prompting


def engine_facts(engine: Engine) -> dict[str, Any]:
    """The model and how it is computed, of a loaded engine; the weights by their fingerprint, which
    reads next to nothing of them."""
    loaded = engine.loaded
    return {**how_computed(loaded), "weights": loaded.checkpoint.fingerprint()}


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
    changes = list(differences(old, new))
    if changes:
        listed = "\n".join(f"  {change}" for change in changes[:8])
        raise BatchError(
            CHANGED,
            f"{path} was begun with something else, and answers of two kinds do not go into one "
            f"file:\n{listed}\nPut it back, name another output, or begin anew with --restart.",
        )


__all__ = ["check_same", "digest", "engine_facts", "make"]
