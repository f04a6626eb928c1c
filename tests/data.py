"""Where tests find data that is not ours to publish; absent means skip, with the reason."""

import os
from pathlib import Path

import pytest

DATA = "ENGINEROOM_TEST_DATA"
MODELS = "ENGINEROOM_TEST_MODELS"
_FILES = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "gemma3-270m-q4_k_m.gguf",
}


def data_path(relative: str) -> Path:
    """A file or folder of the external test data, or skip."""
    root = os.environ.get(DATA)
    if not root:
        pytest.skip(f"{DATA} is not set: external test data is absent")
    path = Path(root) / relative
    if not path.exists():
        pytest.skip(f"{path} does not exist ({DATA}={root})")
    return path


def model_path(name: str) -> Path:
    """A real model's GGUF file: in ENGINEROOM_TEST_MODELS or the model cache, or skip."""
    file = _FILES[name]
    tried = [Path(d) / file for d in (os.environ.get(MODELS), _cache()) if d]
    for path in tried:
        if path.is_file():
            return path
    pytest.skip(f"{name}: {file} is in none of {[str(p.parent) for p in tried]}")


def _cache() -> str:
    base = os.environ.get("ENGINEROOM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "engineroom"
    )
    return os.path.join(base, "models")
