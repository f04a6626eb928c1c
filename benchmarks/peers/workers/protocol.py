"""The worker's side: JSON lines on stdin and stdout, the prompts of the workloads, KL, memory.

A worker is a script that calls `serve(Engine)`. Its one argument is a JSON object:
    model     path of the weights
    threads   int
    max_len   longest context in tokens
    max_seqs  most requests at once
    options   what the engine's own table adds
It answers {"ready": ...} once the model is loaded and then one line per line asked:
    {"do": "stream", "prompt": 16, "out": 128, "seed": 1}
        -> {"first_s": ..., "total_s": ..., "tokens": 128}     one request; seconds
    {"do": "batch", "count": 8, "prompt": 128, "out": 128, "seed": 1}
        -> {"total_s": ..., "tokens": 1024}                    all at once; generated tokens
    {"do": "kl", "ids": [...], "reference": "logits.npy"} -> {"kl": ..., "top1": ..., "rows": n}
    {"do": "logits", "ids": [...], "out": "logits.npy"}   -> {}    the reference itself
    {"do": "memory"} -> {"peak_mib": ...}
Ours alone answers two more, which the peers do not tell:
    {"do": "steps", "count": 8, "prompt": 64, "out": 32, "seed": 1}
        -> {"step_s": ..., "steps": 20}    median of the steps that decode all of them
    {"do": "cost"} -> the fields of cost.Cost, `products` left out
An answer {"error": ...} is a refusal or a failure; the worker goes on. Standard output belongs to
the protocol: whatever else prints there is sent to standard error.

Standard library only at import: each peer has its own environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

Ids = list[int]


class Engine(Protocol):
    """What a worker provides. A method that it cannot offer raises NotImplementedError(why)."""

    vocab: int

    def __init__(self, model: str, threads: int, max_len: int, max_seqs: int, **options: Any): ...

    def version(self) -> str: ...

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        """Greedy, never ending early: (seconds to the first token of the first, seconds to the
        last of all, tokens generated)."""

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        """(position, fp32 [n, V]): rows are logits (up to a constant) given ids[:position + 1]."""

    def steps(self, prompts: list[Ids], out: int) -> dict[str, Any]: ...

    def cost(self) -> dict[str, Any]: ...


def prompts(count: int, length: int, vocab: int, seed: int) -> list[Ids]:
    """Random ids, no two prompts alike; the first 100 ids are left to special tokens."""
    draw = random.Random(seed * 1_000_003 + length)
    return [[draw.randrange(100, vocab) for _ in range(length)] for _ in range(count)]


def peak_mib() -> float:
    """The most memory that was resident at once, mapped files included, in MiB: VmHWM, summed over
    this process and its children (a worker leads a process group of its own)."""
    group, total = os.getpgrp(), 0
    for entry in os.listdir("/proc"):
        try:
            if not entry.isdigit() or os.getpgid(int(entry)) != group:
                continue
            with open(f"/proc/{entry}/status", encoding="utf-8") as status:
                total += sum(int(x.split()[1]) for x in status if x.startswith("VmHWM:"))
        except OSError:  # it ended meanwhile
            continue
    return total / 1024


def log_softmax(rows: Any) -> Any:
    import numpy as np

    rows = rows.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def divergence(engine: Engine, ids: Ids, reference: str) -> dict[str, float]:
    """Mean KL(reference || engine) in nats over next-token distributions, and top-1 agreement."""
    import numpy as np

    truth = np.load(reference, mmap_mode="r")
    total, agree, seen = 0.0, 0, 0
    for position, rows in engine.logits(ids):
        for start in range(0, len(rows), 64):
            at = position + start
            ours = log_softmax(np.asarray(rows[start : start + 64]))
            want = log_softmax(np.asarray(truth[at : at + len(ours)]))
            total += float((np.exp(want) * (want - ours)).sum())
            agree += int((want.argmax(-1) == ours.argmax(-1)).sum())
            seen += len(ours)
    if seen != len(ids):
        raise ValueError(f"{seen} distributions for {len(ids)} tokens")
    return {"kl": total / seen, "top1": agree / seen, "rows": seen}


def save_logits(engine: Engine, ids: Ids, path: str) -> dict[str, float]:
    import numpy as np

    out = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(len(ids), engine.vocab)
    )
    for position, rows in engine.logits(ids):
        out[position : position + len(rows)] = rows
    out.flush()
    return {}


def answer(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    do = asked["do"]
    if do == "stream":
        (prompt,) = prompts(1, asked["prompt"], engine.vocab, asked["seed"])
        first, total, tokens = engine.run([prompt], asked["out"])
        return {"first_s": first, "total_s": total, "tokens": tokens}
    if do == "batch":
        many = prompts(asked["count"], asked["prompt"], engine.vocab, asked["seed"])
        _, total, tokens = engine.run(many, asked["out"])
        return {"total_s": total, "tokens": tokens}
    if do == "steps":
        many = prompts(asked["count"], asked["prompt"], engine.vocab, asked["seed"])
        return dict(engine.steps(many, asked["out"]))
    if do == "cost":
        return dict(engine.cost())
    if do == "memory":
        return {"peak_mib": getattr(engine, "peak_mib", peak_mib)()}
    if do == "kl":
        return dict(divergence(engine, asked["ids"], asked["reference"]))
    if do == "logits":
        return dict(save_logits(engine, asked["ids"], asked["out"]))
    raise ValueError(f"unknown request {do!r}")


def end_with_parent() -> None:
    """Linux: a parent that is killed takes its worker along, even a paused one."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def serve(kind: type[Engine]) -> None:
    """Load what the argument says and answer until standard input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not speak in the worker's name

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    asked = json.loads(sys.argv[1])
    options = asked.pop("options", {})
    started = time.perf_counter()
    engine = kind(**asked, **options)
    loaded = time.perf_counter() - started
    say({"ready": True, "version": engine.version(), "load_s": loaded})
    for line in sys.stdin:
        try:
            say(answer(engine, json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
    sys.stderr.flush()
    os._exit(0)  # engines with threads of their own take their time to leave, or never do
