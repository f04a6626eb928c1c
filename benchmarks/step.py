"""What Python costs a step of a real model: schedule, inputs, commit, outputs, and what is left.

    python benchmarks/step.py [--model smollm2] [--requests 32] [--steps 100] [--rounds 3]
                              [--shown]

Decoding steps of so many requests that nobody reads before their end, or with `--shown` of which
every token is shown. Prints a Markdown table of microseconds a step: medians over the steps of all
rounds. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import engineroom
from engineroom import LLM, SamplingParams

PROMPT = 16
# What is printed, and the calls that it is the time of. One within another is counted once.
PARTS = {
    "schedule": "schedule",
    "inputs": "inputs",
    "commit": "commit",
    "outputs": "outputs, energy's shares and the step's record",
}


class Clock:
    """Seconds spent in the calls that it wraps, by part, since take() was last called."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, part: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)
        spent = self._spent

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - started

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        spent = dict(self._spent)
        self._spent.clear()
        return spent


class Native:
    """Stands for a compiled object, so that its run() can be wrapped."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.run = native.run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


def watch(engine: Any) -> Clock:
    """Wrap the parts of an engine's step; on the CPU's backend alone."""
    clock, runner = Clock(), engine._runner
    for owner in (runner._executable, runner._sampler):
        owner._native = Native(owner._native)
        clock.wrap(owner._native, "run", "native")
    clock.wrap(engine.scheduler, "schedule", "schedule")
    clock.wrap(runner._inputs, "build", "inputs")
    clock.wrap(runner._sampling, "build", "inputs")
    clock.wrap(engine.scheduler, "commit", "commit")
    clock.wrap(engine, "_outputs", "outputs")
    clock.wrap(engine.ledger, "charge", "outputs")
    clock.wrap(engine, "_record", "outputs")
    return clock


def measure(model: str, requests: int, steps: int, rounds: int, shown: bool) -> list[dict]:
    """Of every step that only decodes: seconds by part, "native", and "step", the whole."""
    length = PROMPT + steps + 8
    rng = random.Random(1)
    found = []
    options = {"max_model_len": length, "max_num_seqs": requests, "enable_prefix_caching": False}
    with LLM(model, device="cpu", **options) as llm:
        engine, params = (
            llm.engine,
            SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True),
        )
        clock = watch(engine)
        for round_ in range(rounds):
            for i in range(requests):
                prompt = [rng.randrange(100, 1000) for _ in range(1 + i % PROMPT)]
                engine.add_request(f"{round_}/{i}", prompt, params, final_only=not shown)
            for _ in range(steps - 1):
                started = time.perf_counter()
                engine.step()
                parts = clock.take() | {"step": time.perf_counter() - started}
                if all(kind == "decode" for *_, kind in engine.log.records[-1].requests):
                    found.append(parts)
            while engine.has_work:
                engine.step()
            clock.take()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shown", action="store_true", help="every token is shown")
    args = parser.parse_args()
    found = measure(args.model, args.requests, args.steps, args.rounds, args.shown)
    print(
        f"{datetime.date.today()}; Python {platform.python_version()}, "
        f"engineroom {engineroom.__version__}, numpy {np.__version__}"
    )
    shown = " --shown" * args.shown
    print(
        f"`python benchmarks/step.py --model {args.model} --requests {args.requests} "
        f"--steps {args.steps} --rounds {args.rounds}{shown}`, {len(found)} steps\n"
    )

    def row(name: str, values: list[float]) -> None:
        microseconds = [value * 1e6 for value in values]
        print(f"| {name} | {statistics.median(microseconds):.0f} | {min(microseconds):.0f} |")

    print("| part of a step | median, us | least, us |\n|---|---|---|")
    for part, name in PARTS.items():
        row(name, [step[part] for step in found])
    row("these together", [sum(step[part] for part in PARTS) for step in found])
    row("all that is not native", [step["step"] - step["native"] for step in found])
    row("native: the model and the sampler", [step["native"] for step in found])


if __name__ == "__main__":
    main()
