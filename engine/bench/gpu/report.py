"""`engineroom bench gpu`: proof on a card by one command. Correctness, law 2, then time."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import torch

from ..facts import facts
from ..files import write
from ..tables import Column, Report, Table
from ..timing import Budget
from . import checks, engine_rows, law2
from .card import Card
from .case import Target
from .interpreter import mend
from .probe import Check, Probe, run_probe
from .rows import Row, figures
from .rows import rows as timed_rows
from .sizes import FULL, TINY, Sizes

REHEARSAL = (
    "**A rehearsal**: tiny shapes on Triton's interpreter, on the CPU. It shows that the command "
    "and its kernels run; it measures nothing, so there are no times."
)
_CHECKED = (
    Column("kind", "kind"),
    Column("name", "what"),
    Column("dtype", "dtype"),
    Column("shape", "shape"),
    Column("error", "error / bound", 3),
    Column("passed", "passed"),
    Column("detail", "detail"),
)
_TIMED = (
    Column("group", "operation"),
    Column("name", "shape"),
    Column("us", "median us", 1),
    Column("p99_us", "p99 us", 1),
    Column("repetitions", "reps"),
    Column("tbs", "TB/s", 2),
    Column("tflops", "TFLOP/s", 1),
    Column("share", "% of limit", 1),
    Column("limit", "limit"),
    Column("peer", "best peer"),
    Column("peer_us", "peer us", 1),
    Column("ratio", "peer / ours", 2),
    Column("target", "target"),
    Column("met", "met"),
    Column("note", "note"),
)
_WHOLE = (
    Column("model", "model"),
    Column("what", "what"),
    Column("shape", "shape"),
    Column("tok_s", "tok/s"),
    Column("first_token_ms", "first token ms", 1),
    Column("idle", "GPU idle %", 1),
    Column("target", "target"),
    Column("met", "met"),
    Column("note", "note"),
)
_TIME_OVER = "not run: out of time (--minutes gives more)"
_TIMED_NOTE = (
    "Buffers go round so that the L2 cache cannot hold them; launches are in a CUDA graph, timed "
    "by events. Limits are this run's own: a copy's bandwidth, and products of 8,192 cubed by "
    "cuBLAS. Peers read K and V in one piece, ours in pages."
)


def run(
    *,
    report: bool,
    minutes: float,
    output: str,
    model: str | None,
    rehearsal: bool,
    say: TextIO = sys.stderr,
) -> int:
    """The checks, and with `report` the tables, written to `output`. 1 where a check fails."""
    if rehearsal:
        mend()
    card, sizes = Card(), TINY if rehearsal else FULL
    budget = Budget(60 * minutes)
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    checked = list(_checked(card, sizes, rng, say))
    failed = [check for check in checked if not check.passed]
    tables = [correctness(checked)]
    if report:
        limits = card.limits()
        timed = time_rows(card, sizes, limits, budget, say, share=0.5 if sizes.models else 1.0)
        tables += [limits_table(limits), timed, _whole(card, sizes, model, budget, say)]
    print(tables[0].note)
    for check in failed:
        print(f"FAILED {check.kind}: {check.name} {check.dtype} {check.shape}: {check.detail}")
    if report:
        for table in tables[1:]:
            print(f"\n{table.title}\n{table.markdown()}")
        made = Report(
            "gpu",
            {**facts(), **card.facts(), "seed": seed},
            tables,
            [REHEARSAL] if rehearsal else [],
        )
        paths = write(made, {"md": f"{output}/report.md", "json": f"{output}/report.json"})
        print("\nwritten: " + ", ".join(map(str, paths)))
    return 1 if failed else 0


def _checked(card: Card, sizes: Sizes, rng: np.random.Generator, say: TextIO) -> Iterator[Check]:
    makers: Sequence[Callable[[], Iterator[Probe]]] = (
        lambda: checks.probes(card, sizes, rng),
        lambda: law2.probes(card, sizes, rng),
        lambda: engine_rows.probes(sizes),
    )
    for make in makers:
        for probe in make():
            check = run_probe(probe)
            verdict = "ok    " if check.passed else "FAILED"
            print(f"{verdict} {check.kind}: {check.name} {check.dtype}", file=say)
            yield check
        card.free()


def correctness(checked: Sequence[Check]) -> Table:
    """The checks as a table."""
    failed = sum(not check.passed for check in checked)
    note = f"{len(checked) - failed} of {len(checked)} checks passed, {failed} failed."
    return Table("Correctness and law 2", _CHECKED, [vars(check) for check in checked], note)


def limits_table(limits: dict[str, float | None]) -> Table:
    """What the card does at most, by measuring."""
    columns = (Column("limit", "limit"), Column("value", "measured", 2), Column("unit", "unit"))
    rows = [
        {
            "limit": name,
            "value": None if value is None else value / 1e12,
            "unit": "TB/s, read and write" if name == "copy" else "T operations/s",
        }
        for name, value in limits.items()
    ]
    return Table("Limits of this card", columns, rows)


def time_rows(
    card: Card,
    sizes: Sizes,
    limits: dict[str, float | None],
    budget: Budget,
    say: TextIO,
    share: float = 1.0,
) -> Table:
    """Every kernel's time; the rows may take `share` of what is left of the budget."""
    rows = list(timed_rows(card, sizes))
    own = Budget(budget.left * share)
    made: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        print(f"time {index + 1}/{len(rows)}: {row.group} {row.name}", file=say)
        if own.left <= 0:
            made.append(row.labels | {"note": _TIME_OVER})
            continue
        made.append(_timed(card, row, limits, own.share(len(rows) - index)))
        card.free()
    made += _law2_cost(made, sizes)
    return Table("Kernels", _TIMED, made, _TIMED_NOTE)


def _timed(
    card: Card, row: Row, limits: dict[str, float | None], allowance: float
) -> dict[str, Any]:
    """One row beside its peers, whatever happens; building buffers takes of the allowance too."""
    try:
        case = row.make()
        each = allowance / (2 + len(case.peers))
        cells = figures(row, case, card.time(case.ours, each), limits)
    except Exception as error:
        return row.labels | {"note": _said(error)}
    notes = [f"{name}: {why}" for name, why in case.skipped.items()]
    best: tuple[float, str] | None = None
    for name, launches in case.peers.items():
        try:
            times = card.time(launches, each)
        except Exception as error:
            notes.append(f"{name}: {_said(error)}")
            continue
        if times is not None and (best is None or times.median < best[0]):
            best = times.median, name
    if best is not None:
        cells |= {"peer_us": best[0] * 1e6, "peer": best[1], "ratio": best[0] * 1e6 / cells["us"]}
    return cells | {"note": "; ".join(notes)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _law2_cost(rows: Sequence[dict[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """What the law costs a decoding layer: our 16-bit kernels at one batch beside the best peers',
    which do not keep it."""
    batch = max(t for t in sizes.linear_tokens if t <= sizes.batch)
    goal = Target("% slower", 10.0)
    cells: dict[str, Any] = {
        "group": "law 2's cost",
        "name": f"a layer's products and attention at batch {batch}",
        "target": goal.text,
    }
    parts = [
        row
        for row in rows
        if (row["group"].startswith("linear 16-bit") and f" {batch} x " in row["name"])
        or (row["group"] == "decode attention" and row["name"].startswith(f"{batch} x "))
    ]
    if parts and all(row.get("peer_us") for row in parts):
        ours, peers = (sum(row[key] for row in parts) for key in ("us", "peer_us"))
        cells |= {"us": ours, "peer_us": peers, "slower": 100 * (ours / peers - 1)}
        cells |= {"ratio": peers / ours, "met": goal.met(cells), "note": f"{cells['slower']:.1f}%"}
    return [cells]


def _whole(card: Card, sizes: Sizes, model: str | None, budget: Budget, say: TextIO) -> Table:
    rows: list[dict[str, Any]] = []
    for row in engine_rows.rows(card, sizes, model, budget.share):
        print(f"model: {row['model']}, {row['what']}", file=say)
        rows.append(row)
    note = "Random weights of the named shape; tokens of all requests over the whole run."
    return Table("Whole models", _WHOLE, rows, note)
