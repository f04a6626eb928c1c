"""`engineroom bench serve URL`: level after level of load, a table, and a page to show."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..charts import Bars, Chart, Line, Lines
from ..facts import facts
from ..files import write
from ..progress import progress
from ..tables import Report, Table
from ..timing import percentile
from .client import Answer, ServerFailed, Target, ask, fetch
from .level import run as run_level
from .measures import RATES, WAITS, Limits, first, known, row, slowest, stretches
from .traffic import Lengths, Load, plan, text

_PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_SAMPLE = 400  # words of the text that tells how many tokens a word has
_LATE = 0.05  # seconds; a request sent later than that is said


@dataclass(frozen=True)
class Settings:
    """What to send to whom."""

    url: str
    model: str | None
    chat: bool
    key: str | None
    timeout: float
    loads: Sequence[Load]
    lengths: Lengths
    requests: int | None  # of each level; None is 64, or twice the users
    warmup: int  # requests before each level, not counted
    seed: int
    extra: Mapping[str, Any]
    limits: Limits


def run(settings: Settings, paths: Mapping[str, str | None]) -> int:
    """Measure every level, print the table, write the files.

    1 where a level had no answer at all, or nothing could be asked; what failed is said.
    """
    try:
        target = asyncio.run(_target(settings))
        ratio = asyncio.run(_words_per_token(target, settings))
    except (OSError, TimeoutError, ServerFailed) as error:
        print(f"engineroom: bench serve: {settings.url}: {error}", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    levels: list[tuple[Load, list[Answer]]] = []
    notes: list[str] = []
    for index, load in enumerate(settings.loads):
        answers, late = asyncio.run(_level(target, settings, load, index, ratio))
        failed = [answer.error for answer in answers if answer.error is not None]
        if failed:
            notes.append(f"{load.name}: {len(failed)} requests failed; the first: {failed[0]}")
        if late > _LATE:
            notes.append(
                f"{load.name}: the client sent a request {1e3 * late:.0f} ms late; what it "
                "measured is partly itself"
            )
        cells = row(answers, settings.limits)
        rows.append({"model": target.model, "load": load.name, "warmup": settings.warmup} | cells)
        levels.append((load, answers))
    tables = [Table("Rates", RATES, rows), Table("Waits", WAITS, rows)]
    print("\n\n".join(table.markdown() for table in tables))
    for note in notes:
        print(note, file=sys.stderr)
    about = {**facts(), **_about(settings, target)}
    for path in write(Report("serve", about, tables, notes, _charts(rows, levels)), paths):
        if sys.stderr.isatty():
            print(f"written: {path}", file=sys.stderr)
    return 0 if all(cells["requests"] for cells in rows) else 1


def _about(settings: Settings, target: Target) -> dict[str, Any]:
    lengths = settings.lengths
    return {
        "server": urlsplit(settings.url).netloc.rpartition("@")[2],
        "interface": target.path,
        "lengths": f"{lengths.input_mean} in, {lengths.output_mean} out, {lengths.spread}",
        "seed": settings.seed,
        "extra": dict(settings.extra),
        "limits ms": {
            name: value for name, value in vars(settings.limits).items() if value is not None
        },
    }


async def _target(settings: Settings) -> Target:
    """With the name of the model, asked for where none was given. Errors: ServerFailed."""
    path = "chat/completions" if settings.chat else "completions"
    target = Target(settings.url, settings.model or "", path, settings.key, settings.timeout)
    if settings.model is None:
        listed = await fetch(target, "models")
        try:
            names = [entry["id"] for entry in listed["data"]]
        except (KeyError, TypeError):
            raise ServerFailed("/models is no list of models; name one with --model") from None
        if len(names) != 1:
            found = ", ".join(map(str, names)) or "none"
            raise ServerFailed(f"it serves {len(names)} models ({found}); name one with --model")
        target = Target(settings.url, names[0], path, settings.key, settings.timeout)
    return target


async def _words_per_token(target: Target, settings: Settings) -> float:
    """By one request whose usage tells. Errors: ServerFailed where it fails or has no usage."""
    prompt = text(random.Random(settings.seed), _SAMPLE, 1.0)
    answer = await ask(target, target.body(prompt, 1, settings.extra))
    if answer.error is not None:
        hint = ""
        if "ignore_eos" in answer.error:
            hint = "; --no-ignore-eos leaves out what is not OpenAI's"
        raise ServerFailed(f"a first request failed: {answer.error}{hint}")
    if not answer.input_tokens:
        raise ServerFailed(
            "its stream tells no usage.prompt_tokens (stream_options.include_usage), without which "
            "neither lengths nor tokens a second can be known"
        )
    return _SAMPLE / answer.input_tokens


async def _level(
    target: Target, settings: Settings, load: Load, index: int, ratio: float
) -> tuple[list[Answer], float]:
    def requests(count: int, seed: int) -> Any:
        return plan(load, count, settings.lengths, ratio, seed)

    count = settings.requests or max(64, 2 * (load.users or 0))
    seed = settings.seed + 1000 * (index + 1)
    if settings.warmup:
        progress(f"{load.name}: warming up")
        await run_level(
            target, load, requests(settings.warmup, seed + 1), settings.extra, lambda _: None
        )

    def tell(done: int) -> None:
        progress(f"{load.name}: {done} of {count}")

    found = await run_level(target, load, requests(count, seed + 2), settings.extra, tell)
    progress("")
    return found


# ------------------------------------------------------------------------------------------ charts


def _charts(
    rows: Sequence[Mapping[str, Any]], levels: Sequence[tuple[Load, Sequence[Answer]]]
) -> list[Chart]:
    done = [cells for cells in rows if cells.get("first_median_ms") is not None]
    charts: list[Chart] = []

    def against(key: str, name: str) -> Line:
        points = [
            (cells["output_tokens_s"], cells[key]) for cells in done if cells.get(key) is not None
        ]
        return Line(name, points, [cells["load"] for cells in done if cells.get(key) is not None])

    if len(done) > 1:
        for key, title in (("first", "First token"), ("token", "Per token")):
            charts.append(
                Lines(
                    f"{title} against throughput",
                    "output tokens a second",
                    "ms",
                    [against(f"{key}_median_ms", "median"), against(f"{key}_p99_ms", "p99")],
                )
            )
    answered = [(load, [a for a in answers if a.error is None]) for load, answers in levels]
    lines = [
        Line(load.name, [(p, 1e3 * percentile(times, p)) for p in _PERCENTS])
        for load, answers in answered
        if (times := known(first(answer) for answer in answers))
    ]
    if lines:
        charts.append(Lines("First token by percentile", "percentile", "ms", lines))
    for load, answers in answered:
        if slow := slowest(answers):
            marks = [1e3 * (at - slow.sent) for at in slow.parts]
            title = f"The slowest request at {load.name}"
            tokens = f"{slow.input_tokens} tokens in, {slow.output_tokens} out"
            charts.append(Bars(title, "ms", stretches(slow), marks, tokens))
    return charts
