"""Figures for docs/performance.md: cold start, tokens per second, scheduler time, lines per room.

    python benchmarks/baseline.py [--model smollm2] [--rounds 5] [--device cpu]

Prints a Markdown table with the machine, the date and the versions. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("src", "engine", "kernels", "quant", "tests", "examples", "benchmarks")


def cold_start(model: str, rounds: int, device: str) -> list[float]:
    """Seconds from process start to the first byte of a one-token answer."""
    command = [
        sys.executable,
        "-m",
        "engineroom",
        "complete",
        "-m",
        model,
        "hi",
        "--max-tokens",
        "1",
        "--device",
        device,
    ]
    times = []
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(rounds + 1):  # the first warms the file cache and leaves compiled modules
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env=environment
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            times.append(time.perf_counter() - started)
            process.stdout.read()
    return times[1:]


def throughput(model: str, rounds: int, device: str) -> dict[str, list[float]]:
    """Tokens per second: one stream's decode, a 256-token prompt, and 8 requests of 32/32."""
    from engineroom import LLM, SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    out: dict[str, list[float]] = {
        "one stream, decode tok/s": [],
        "prompt of 256, tok/s": [],
        "8 x (32 in, 32 out), generated tok/s": [],
    }
    options = {"max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False}
    with LLM(model, device=device, **options) as llm:
        llm.generate([[1] * 16], greedy, use_tqdm=False)
        for round_ in range(rounds):
            ids = [(7 * round_ + i) % 1000 + 100 for i in range(256)]
            one = llm.generate([ids[:16]], greedy, use_tqdm=False)[0].timings
            out["one stream, decode tok/s"].append(31 / one.decode_s)
            prompt = llm.generate([ids], greedy.replace(max_tokens=1), use_tqdm=False)[0].timings
            out["prompt of 256, tok/s"].append(256 / prompt.time_to_first_token_s)
            started = time.perf_counter()
            llm.generate([ids[i : i + 32] for i in range(8)], greedy, use_tqdm=False)
            out["8 x (32 in, 32 out), generated tok/s"].append(
                8 * 32 / (time.perf_counter() - started)
            )
    return out


def scheduler_time(num_running: int = 256, steps: int = 400) -> list[float]:
    """Microseconds of schedule() + commit() per decode step with `num_running` requests."""
    from engineroom.engine.core.plan import StepOutcome
    from engineroom.engine.core.request import Request
    from engineroom.engine.core.sampling_params import SamplingParams
    from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig

    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=num_running,
            max_num_batched_tokens=8192,
            max_model_len=4096,
            num_blocks=num_running * 64,
            block_size=16,
        )
    )
    params = SamplingParams(max_tokens=steps + 100, ignore_eos=True)
    for i in range(num_running):
        scheduler.add(
            Request(
                request_id=str(i),
                prompt_token_ids=[i] * 32,
                params=params,
                max_tokens=steps + 100,
                seed=i,
            )
        )
    times = []
    for step in range(steps):
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        outcome = StepOutcome([step] * plan.num_logit_rows)
        resumed = time.perf_counter()
        scheduler.commit(plan, outcome)
        times.append((time.perf_counter() - resumed + planned - started) * 1e6)
    return times[10:]


def lines_per_room() -> dict[str, int]:
    suffixes = {".py", ".cpp", ".hpp", ".pyi"}
    return {
        room: sum(
            len(path.read_text().splitlines())
            for path in sorted((ROOT / room).rglob("*"))
            if path.suffix in suffixes
        )
        for room in ROOMS
    }


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"


def row(name: str, values: list[float], digits: int = 2) -> str:
    spread = f"{min(values):.{digits}f} .. {max(values):.{digits}f}"
    return f"| {name} | {statistics.median(values):.{digits}f} | {spread} | {len(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or reference")
    args = parser.parse_args()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("engineroom", "torch", "numpy")
    )
    print(f"{machine()}; {datetime.date.today()}; Python {platform.python_version()}, {versions}")
    command = f"--model {args.model} --rounds {args.rounds} --device {args.device}"
    print(f"`python benchmarks/baseline.py {command}`\n")
    print("| figure | median | min .. max | n |\n|---|---|---|---|")
    started = cold_start(args.model, args.rounds, args.device)
    print(row("cold start to the first token, s", started))
    for name, values in throughput(args.model, args.rounds, args.device).items():
        print(row(name, values, 1))
    print(row("schedule + commit at 256 running, us per step", scheduler_time(), 0))
    print("\n| room | lines |\n|---|---|")
    for room, count in lines_per_room().items():
        print(f"| {room} | {count} |")


if __name__ == "__main__":
    main()
