"""Where the peers, their weights and cached results lie, and the commands that find them."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORKERS = HERE / "workers"
VARIABLE = "ENGINEROOM_PEERS"


class NotPrepared(Exception):
    """Something that `prepare` makes is not there; the message names it."""


def default_folder() -> Path:
    """$ENGINEROOM_PEERS, else the folder peers of engineroom's cache."""
    asked = os.environ.get(VARIABLE)
    if asked:
        return Path(asked).absolute()
    cache = os.environ.get("ENGINEROOM_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache = os.path.join(base, "engineroom")
    return Path(cache).absolute() / "peers"


@dataclass(frozen=True)
class Places:
    """Names inside one peers folder; nothing here creates anything."""

    folder: Path

    def venv(self, peer: str) -> Path:
        return self.folder / peer / "venv"

    def python(self, peer: str) -> Path:
        return self.venv(peer) / "bin" / "python"

    def marker(self, step: str) -> Path:
        """Written last: a step whose marker exists is whole."""
        return self.folder / f".{step}.done"

    def log(self, step: str) -> Path:
        return self.folder / f"{step}.log"

    def gguf(self, format: str) -> Path:
        """SmolLM2 as Q4_1 (as it ships), Q4_0, Q8_0 or BF16; Gemma 3 270M as Q4_K_M."""
        name = "gemma3-270m" if format == "Q4_K_M" else "smollm2"
        return self.folder / "models" / f"{name}-{format}.gguf"

    @property
    def twin(self) -> Path:
        """The 16-bit twin: a folder of bf16 safetensors."""
        return self.folder / "models" / "smollm2-bf16"

    def openvino(self, format: str) -> Path:
        """One of int8, fp32."""
        return self.folder / "models" / f"smollm2-openvino-{format}"

    @property
    def llama_source(self) -> Path:
        return self.folder / "llamacpp" / "source"

    @property
    def llama_build(self) -> Path:
        return self.folder / "llamacpp" / "build"

    def llama_tool(self, name: str) -> Path:
        return self.llama_build / "bin" / name

    @property
    def results(self) -> Path:
        """Cached references and KL divergences."""
        return self.folder / "results"

    @property
    def probe(self) -> Path:
        """The compiled probe, named by its source so that a changed one is built anew."""
        return self.folder / f"probe-{_probe_digest()}"


@functools.cache
def _probe_digest() -> str:
    return hashlib.sha256((HERE / "probe.cpp").read_bytes()).hexdigest()[:12]


def sha256(path: Path) -> str:
    """Of a file, or of a folder's weight files and configuration, names included."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
