"""Hours of saturation in small: does the server leak memory or blocks of the KV cache?

`python benchmarks/soak.py [--minutes 30] [--clients 48]` serves a model, keeps more clients than it
can run at once, breaks off a third of their requests at random moments, streamed and not, and reads
the resident memory of both processes and the blocks every few seconds. It prints the slope of
memory over the second half, and what is still owned when all is quiet; 1 where either is not zero.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

from served import family, serving

from engineroom.engine.bench.serve.client import Target, ask, fetch
from engineroom.engine.bench.serve.traffic import Lengths, Load, plan

_EVERY = 5.0  # seconds between two readings
_LEAK = 1.0  # MiB an hour and process above which memory is said to grow, beside its own noise


def resident(pid: int) -> dict[int, float]:
    """MiB of a process and of those below it."""
    found = {}
    for process in family(pid):
        status = Path(f"/proc/{process}/status").read_text()
        found[process] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    return found


def metric(port: int, name: str) -> float:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        text = page.read().decode()
    return float(re.search(rf"^engineroom_{name}\{{.*\}} (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: units an hour, and the standard error of that."""
    n = len(points)
    mean_x, mean_y = (sum(p[i] for p in points) / n for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in points)
    return 3600 * rise, 3600 * (rest / max(1, n - 2) / spread) ** 0.5


async def client(target: Target, seed: int, until: float, count: dict[str, int]) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        (request,) = plan(Load(users=1), 1, Lengths(96, 64, "lognormal"), 0.9, rng.randrange(2**32))
        body = target.body(request.prompt, min(request.output_len, 256), {"ignore_eos": True})
        if rng.random() < 0.3:
            body |= {"stream": False, "stream_options": None}
        sending = asyncio.ensure_future(ask(target, body))
        patience = rng.expovariate(1 / 2.0) if rng.random() < 0.33 else target.timeout
        done, _ = await asyncio.wait({sending}, timeout=patience)
        if not done:
            sending.cancel()
            await asyncio.wait({sending})
            count["broken off"] += 1
        elif body["stream"] and sending.result().error is not None:
            count["failed"] += 1
            print(sending.result().error, file=sys.stderr)
        else:
            count["answered"] += 1


async def soak(port: int, pid: int, minutes: float, clients: int) -> bool:
    target = Target(f"http://127.0.0.1:{port}/v1", "", "completions")
    target = replace(target, model=await _model(target))
    until = time.monotonic() + 60 * minutes
    count = {"answered": 0, "broken off": 0, "failed": 0}
    tasks = [asyncio.ensure_future(client(target, i, until, count)) for i in range(clients)]
    readings: dict[int, list[tuple[float, float]]] = {}
    while time.monotonic() < until:
        await asyncio.sleep(_EVERY)
        for process, mib in (await asyncio.to_thread(resident, pid)).items():
            readings.setdefault(process, []).append((time.monotonic(), mib))
    await asyncio.wait(tasks)
    await asyncio.sleep(2)  # the last ends are told
    owned = await asyncio.to_thread(metric, port, "owned_blocks")
    ends = ", ".join(f"{v} {k}" for k, v in count.items())
    print(f"{minutes:g} minutes, {clients} clients: {ends}")
    steady = True
    for process, points in readings.items():
        half = points[len(points) // 2 :]
        rise, error = slope(half)
        name = "server" if process == pid else "below it"
        print(
            f"{name}: {half[0][1]:.1f} MiB at half time, {half[-1][1]:.1f} at the end, slope "
            f"{rise:+.2f} MiB an hour (standard error {error:.2f})"
        )
        steady &= rise < _LEAK + 3 * error
    print(f"blocks owned when all is quiet: {owned:.0f}")
    return steady and owned == 0 and count["failed"] == 0


async def _model(target: Target) -> str:
    return str((await fetch(target, "models"))["data"][0]["id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--port", type=int, default=8143)
    args = parser.parse_args()
    flags = ["--max-model-len", "1024", "--max-num-seqs", "16"]
    flags += ["--max-waiting", str(2 * args.clients)]
    # A cache that is used to its last block within a minute: its pages grow no more.
    flags += ["--num-blocks", "1200"]
    with serving(args.model, args.port, *flags) as server:
        steady = asyncio.run(soak(args.port, server, args.minutes, args.clients))
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main())
