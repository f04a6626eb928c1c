"""How far an engine with a format is from the 16-bit model: mean KL over a fixed text, cached."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from .engines import OURS, Entry
from .places import WORKERS, Places, sha256
from .worker import Refused, Worker, WorkerFailed

# Prose that every Python installation carries. Its tokens are named by their hash in the results.
MODULES = ("heapq", "decimal", "difflib", "fractions", "statistics", "datetime", "argparse")
MODULES += ("optparse", "doctest", "textwrap", "pprint", "string", "shlex", "configparser")


def text() -> str:
    parts = []
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [getattr(module, "__about__", ""), module.__doc__ or ""]
        for public in sorted(getattr(module, "__all__", ())):
            parts.append(getattr(module, public).__doc__ or "")
    return "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())


def token_ids(places: Places, count: int) -> list[int]:
    """The first `count` tokens of the text, by the 16-bit folder's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(places.twin / "tokenizer.json"))
    ids = tokenizer.encode(text(), add_special_tokens=False).ids
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, {count} are wanted")
    return list(ids[:count])


def ids_hash(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def reference(places: Places, entries: list[Entry], ids: list[int], threads: int) -> Path:
    """Logits of the 16-bit folder in fp32 by transformers. Errors: NotPrepared, WorkerFailed."""
    (entry,) = (e for e in entries if e.engine == "transformers")
    entry.check(places)
    path = places.results / f"reference-{sha256(places.twin)[:16]}-{ids_hash(ids)}.npy"
    if path.exists():
        return path
    places.results.mkdir(parents=True, exist_ok=True)
    entry = dataclasses.replace(entry, options={"dtype": "float32"})
    command = entry.command(places, threads=threads, max_len=len(ids), max_seqs=1)
    part = path.with_suffix(".part.npy")
    with Worker(command, entry.environment) as worker:
        worker.receive(600)
        worker.ask(1800, do="logits", ids=ids, out=str(part))
    part.rename(path)
    return path


def divergence(
    places: Places,
    entry: Entry,
    ids: list[int],
    against: Path,
    *,
    threads: int,
    timeout: float,
) -> dict[str, Any]:
    """{"kl", "top1", "rows"}, or {"why"} where the engine gives no logits or failed.

    A peer's answer is kept by the hashes of its worker, weights, text and reference; ours is
    always anew.
    """
    cache = places.results / "kl.json"
    worker = sha256(WORKERS / (entry.start or entry.worker))[:16]
    key = " ".join((entry.name, worker, sha256(entry.weights(places))[:16], against.stem))
    known = json.loads(cache.read_text()) if cache.exists() else {}
    if entry.engine != OURS and key in known:
        return dict(known[key])
    extra: dict[str, Any] = {"logits": True} if entry.start else {}
    command = entry.command(
        places,
        threads=threads,
        max_len=len(ids) + 16,
        max_seqs=1,
        small=True,
        start=True,
        extra=extra,
    )
    try:
        with Worker(command, entry.environment) as worker:
            version = worker.receive(timeout).get("version")
            found = worker.ask(timeout, do="kl", ids=ids, reference=str(against))
    except Refused as error:
        found, version = {"why": str(error)}, None
    except WorkerFailed as error:
        return {"why": str(error)}
    if version is not None:
        found["version"] = version
    if entry.engine != OURS:
        known[key] = found
        places.results.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known, indent=1))
    return found
