"""What the machine can do at this moment, so that every figure says in which mode it was taken."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from .places import HERE, NotPrepared, Places

# Barrier latency of two threads, ns. Below the first the two cores share a cache ("near"), below
# the second they do not ("far"); above it something else is running.
NEAR, FAR = 90.0, 600.0
BUSY = 0.2  # share of the processors' time that something else takes


def build(places: Places) -> None:
    """Compile probe.cpp where it is not compiled yet. Errors: NotPrepared."""
    if places.probe.exists():
        return
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise NotPrepared(f"{compiler[0]} is not on the path: the probe needs a C++ compiler")
    places.folder.mkdir(parents=True, exist_ok=True)
    part = places.probe.with_suffix(f".{os.getpid()}")
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    done = subprocess.run(
        [*compiler, *flags, str(HERE / "probe.cpp"), "-o", str(part)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotPrepared(f"probe.cpp does not compile:\n{done.stderr[-2000:]}")
    part.rename(places.probe)


def measure(places: Places, threads: int) -> dict[str, Any]:
    """{"barrier_ns", "read_gbs", "int8_gops", "bf16_gflops", "mode"}; a figure may be None."""
    others = others_share()
    done = subprocess.run(
        [str(places.probe), str(threads)], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    found["others"] = others
    found["mode"] = mode(found["barrier_ns"], others)
    return found


def others_share(seconds: float = 0.25) -> float | None:
    """Share of the processors' time that others take now, 0 to 1; None where nothing tells it."""
    try:
        before = _processor_times()
        time.sleep(seconds)
        after = _processor_times()
    except (OSError, ValueError):
        return None
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return 1 - (spent[3] + spent[4]) / sum(spent) if sum(spent) else None  # idle, waiting for disks


def _processor_times() -> list[int]:
    first = Path("/proc/stat").read_text("ascii").splitlines()[0]
    return [int(field) for field in first.split()[1:9]]


def mode(barrier_ns: float | None, others: float | None = None) -> str:
    if others is not None and others > BUSY:
        return "busy"
    if barrier_ns is None:
        return "unknown"
    return "near" if barrier_ns < NEAR else "far" if barrier_ns < FAR else "busy"


def show(found: dict[str, Any]) -> str:
    def number(name: str, digits: int) -> str:
        value = found.get(name)
        return "n/a" if value is None else f"{value:.{digits}f}"

    others = found.get("others")
    more = f", others {others:.0%}" if others is not None and others > BUSY else ""
    return (
        f"barrier {number('barrier_ns', 0)} ns ({found.get('mode', 'unknown')}), "
        f"read {number('read_gbs', 1)} GB/s, int8 {number('int8_gops', 0)} GOP/s, "
        f"bf16 {number('bf16_gflops', 0)} GFLOP/s{more}"
    )
