"""How the cost of a decode step grows with the batch and with the context, for ours, beside the
least that its bytes and operations could take at the same moment."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engineroom.engine.bench.cost import ModelCost

from . import plot, probe
from .engines import OURS, Entry
from .places import Places
from .run import machine, ready, shown_command
from .worker import Worker

TRIES = 3  # of a point, until the machine stays in one mode
DEFAULT = ("engineroom Q4_1", "engineroom Q8_0", "engineroom bf16")


@dataclass(frozen=True)
class Points:
    """What is measured: batches of short requests, and one request at each context, in tokens.

    A context is the longest of its steps; `prompt` is that of each request of a batch.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    prompt: int = 64
    out: int = 32  # tokens: the step that counts is the median of those that decode every request
    context_out: int = 16

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        return {"batch": self.batches, "context": self.contexts}

    def request(self, axis: str, value: int) -> tuple[int, int, int]:
        """(requests, tokens in, tokens out) of a point."""
        if axis == "batch":
            return value, self.prompt, self.out
        return 1, value - self.context_out, self.context_out


QUICK = Points((1, 2, 4), (64, 128), 16, 12, 8)
TITLES = {"batch": "one step against the batch", "context": "one step against the context"}


def measure(
    places: Places,
    entries: Sequence[Entry],
    points: Points,
    *,
    rounds: int,
    threads: int,
    timeout: float,
    file: Path | None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """All points of each round, the entries in turn at each. Errors: NotPrepared, WorkerFailed."""
    picked, _ = ready(places, [e for e in entries if e.engine == OURS], say)
    probe.build(places)
    result: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown_command(),
        "threads": threads,
        "entries": [entry.name for entry in picked],
        "rows": [],
    }
    workers: dict[str, Worker] = {}
    costs: dict[str, ModelCost] = {}
    try:
        for entry in picked:
            command = entry.command(
                places,
                threads=threads,
                max_len=max(points.contexts),
                max_seqs=max(points.batches),
            )
            worker = workers[entry.name] = Worker(command, entry.environment)
            worker.receive(timeout)
            told = worker.ask(timeout, do="cost")
            costs[entry.name] = ModelCost.of({**told, "products": entry.products})
            worker.pause()
        for round_ in range(rounds):
            for axis, values in points.axes.items():
                for value in values:
                    for entry in picked:
                        row = _point(places, workers[entry.name], points, axis, value, threads)
                        batch, prompt, out = points.request(axis, value)
                        least = costs[entry.name].decode_s(batch, prompt + out // 2, row["probe"])
                        row |= {"entry": entry.name, "round": round_, "least_s": least}
                        result["rows"].append(row)
                        say(
                            f"  {entry.name:20} {axis} {value:5} {1e3 * row['step_s']:8.2f} ms, "
                            f"least {_ms(least)} ms | {probe.show(row['probe'])}"
                        )
    finally:
        for worker in workers.values():
            worker.close()
    if file is not None:
        file.write_text(json.dumps(result, indent=1))
    return result


def _point(
    places: Places, worker: Worker, points: Points, axis: str, value: int, threads: int
) -> dict[str, Any]:
    """A row, measured again where the machine's mode was another one afterwards."""
    count, prompt, out = points.request(axis, value)
    for _ in range(TRIES):
        before = probe.measure(places, threads)
        answer = worker.ask(600, do="steps", count=count, prompt=prompt, out=out, seed=value)
        worker.pause()
        if probe.measure(places, threads)["mode"] == before["mode"]:
            break
    return {"axis": axis, "value": value, "step_s": answer["step_s"], "probe": before}


# ------------------------------------------------------------------------------------- the report


def median(
    result: Mapping[str, Any], entry: str, axis: str, value: int
) -> tuple[float, float | None, float | None]:
    """(seconds of a step, the least they could be, the share of the limit): medians of the rounds,
    the share of each round's own moment."""
    rows = [
        r for r in result["rows"] if (r["entry"], r["axis"], r["value"]) == (entry, axis, value)
    ]
    step = statistics.median(r["step_s"] for r in rows)
    known = [(r["least_s"], r["least_s"] / r["step_s"]) for r in rows if r["least_s"] is not None]
    if not known:
        return step, None, None
    least, share = (statistics.median(column) for column in zip(*known, strict=True))
    return step, least, share


def values_of(result: Mapping[str, Any], axis: str) -> list[int]:
    return sorted({row["value"] for row in result["rows"] if row["axis"] == axis})


def markdown(result: Mapping[str, Any], link: str) -> str:
    names = result["entries"]
    lines = [
        f"{result['machine']}; {result['threads']} threads; {result['date']}",
        f"`{result['command']}`",
        "",
        f"![A step's time against batch and context]({link})",
        "",
        "Milliseconds of one decode step: measured, the least that its bytes at the read bandwidth "
        "or its operations at the dot peaks could take at that moment, and the share reached; "
        "medians of the rounds.",
    ]
    for axis in TITLES:
        lines += ["", "| " + " | ".join([axis, *(f"{n} | least | share" for n in names)]) + " |"]
        lines.append("|---" * (1 + 3 * len(names)) + "|")
        for value in values_of(result, axis):
            cells = [f"{value:,}"]
            for name in names:
                step, least, share = median(result, name, axis, value)
                shown = "n/a" if share is None else f"{share:.0%}"
                cells += [_ms(step), _ms(least), shown]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def svg(result: Mapping[str, Any]) -> str:
    """Two panels of curves; dashed is the least that the machine could take."""
    body: list[str] = []
    for column, axis in enumerate(TITLES):
        lines = []
        for name, colour in zip(result["entries"], COLOURS, strict=False):
            points = [(v, median(result, name, axis, v)) for v in values_of(result, axis)]
            lines.append(plot.Line(name, colour, [(v, 1e3 * step) for v, (step, _, _) in points]))
            least = [(v, 1e3 * low) for v, (_, low, _) in points if low is not None]
            if least:
                lines.append(plot.Line(name, colour, least, dashed=True))
        body += plot.axes(TITLES[axis], "ms", 60 + column * 490, 90, lines)
    note = f"{result['machine']}, {result['date']}; dashed: what bytes and operations must take"
    return plot.page("A decode step of engineroom", note, 90 + plot.PANEL + 34, body)


COLOURS = ("#c2410c", "#0f766e", "#1d4ed8", "#7e22ce", "#737373")


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1e3 * seconds:.2f}"
