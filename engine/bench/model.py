"""What benchmarks of a whole model share: its name and format, random requests, rounds, rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..config import EngineConfig
from ..core.sampling_params import SamplingParams
from ..engine import Engine
from ..tools.inspect import inspect_model
from ..tools.options import changed_options
from ..tools.session import raise_failure
from .facts import facts
from .files import write
from .progress import progress
from .tables import Column, Report, Table
from .timing import Repeats

_Result = TypeVar("_Result")
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_SHARE = 0.01  # of the model's bytes: formats below it (norms, biases) are not its format
LEAD = (
    Column("model", "model"),
    Column("format", "format"),
    Column("batch", "batch"),
    Column("input_len", "in"),
    Column("output_len", "out"),
    Column("warmup", "warm-up"),
    Column("repetitions", "reps"),
)


@dataclass(frozen=True)
class Subject:
    """The model that is measured: its name, and its weights' formats or how they are quantised."""

    name: str
    format: str
    backend: str

    @classmethod
    def of(cls, config: EngineConfig) -> Subject:
        """From headers alone. Errors: those of inspect_model."""
        report = inspect_model(config)
        rows = report["formats"]
        least = _SHARE * sum(row["bytes"] for row in rows)
        formats = "+".join(row["format"] for row in rows if row["bytes"] >= least)
        return cls(report["name"], report["quantization"] or formats, report["backend"])

    def row(self, batch: int, input_len: int, output_len: int, repeats: Repeats) -> dict[str, Any]:
        """The cells of LEAD."""
        return {
            "model": self.name,
            "format": self.format,
            "batch": batch,
            "input_len": input_len,
            "output_len": output_len,
            "warmup": repeats.warmup,
            "repetitions": repeats.counted,
        }


def arrivals(
    engine: Engine,
    rng: np.random.Generator,
    count: int,
    input_len: int,
    output_len: int,
    *,
    streamed: bool,
) -> list[list[float]]:
    """Per request and token: seconds from before the first request was added to when it was there.

    `count` requests of random token ids are added at once, and each goes on to `output_len` tokens,
    greedy. Without `streamed` a request is shown at its end alone: all its tokens have that moment.
    Errors: AdmissionError, RequestFailed.
    """
    params = _GREEDY.replace(max_tokens=output_len)
    prompts = rng.integers(0, engine.model_config.vocab_size, (count, input_len)).tolist()
    seen: dict[str, list[float]] = {str(i): [] for i in range(count)}
    start = time.perf_counter()
    for request_id, prompt in zip(seen, prompts, strict=True):
        engine.add_request(request_id, prompt, params, final_only=not streamed)
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            raise_failure(output)
            stamps = seen[output.request_id]
            stamps += [now] * (len(output.outputs[0].token_ids) - len(stamps))
    return list(seen.values())


def rounds(what: str, repeats: Repeats, once: Callable[[], _Result]) -> list[_Result]:
    """`once` for each round, on a terminal with a line that says how far; the counted results."""
    total = repeats.warmup + repeats.counted
    results = []
    for index in range(total):
        progress(f"{what}: {index + 1} of {total}")
        results.append(once())
    progress("")
    return results[repeats.warmup :]


def publish(
    table: Table,
    config: EngineConfig,
    backend: Mapping[str, Any],
    paths: Mapping[str, str | None],
) -> None:
    """Print the table, and write what has a path with where and how it was measured."""
    print(table.markdown())
    about = {**facts(), "backend": backend, "options": changed_options(config)}
    for path in write(Report(table.title.lower(), about, [table]), paths):
        if sys.stderr.isatty():
            print(f"written: {path}", file=sys.stderr)
