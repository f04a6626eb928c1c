"""Runs ours and theirs in turn, workload by workload, and writes every figure with its moment."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import kl, probe
from .engines import CLASSES, OURS, Entry
from .places import NotPrepared, Places
from .worker import Refused, Worker, WorkerFailed

SCHEMA = 2
GIVE_UP = 3  # an entry whose worker failed so often is left out of the rest of the run


@dataclass(frozen=True)
class Sizes:
    """Tokens and requests of the workloads. `QUICK` only shows that everything runs."""

    decode: tuple[int, int] = (16, 128)  # in, out
    prompt: int = 512
    batch: tuple[int, int] = (128, 128)
    counts: tuple[int, int] = (8, 32)
    context: int = 2048
    context_out: int = 128
    long: tuple[int, int] = (4096, 64)
    text: int = 2000
    repeats: int = 3  # of the two short workloads, of which the median counts


QUICK = Sizes((8, 8), 48, (16, 8), (4, 8), 128, 16, (192, 8), 96, 1)


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    metrics: tuple[tuple[str, str, bool], ...]  # (name, unit, more is better)
    once: bool = False  # it does not vary: measured in the first round alone


def workloads(sizes: Sizes) -> tuple[Workload, ...]:
    (one_in, one_out), (many_in, many_out) = sizes.decode, sizes.batch
    few, many = sizes.counts
    rate = (("rate", "tok/s", True),)
    return (
        Workload("decode", f"one stream ({one_in} in, {one_out} out), decode", rate),
        Workload(
            "prompt", f"prompt of {sizes.prompt}, time to first token", (("first", "s", False),)
        ),
        Workload("batch8", f"{few} x ({many_in} in, {many_out} out), whole run", rate),
        Workload("batch32", f"{many} x ({many_in} in, {many_out} out), whole run", rate),
        Workload("start", "process start to first token", (("first", "s", False),)),
        Workload(
            "memory",
            f"peak resident memory, context {sizes.context}",
            (("peak", "MiB", False),),
            once=True,
        ),
        Workload(
            "long",
            f"long context ({sizes.long[0]} in, {sizes.long[1]} out)",
            (("first", "s", False), ("rate", "tok/s", True)),
        ),
    )


NAMES = tuple(w.name for w in workloads(Sizes()))


# ------------------------------------------------------------------------------- one measurement


def decode_rate(answer: Mapping[str, Any]) -> float:
    """Tokens per second after the first one, of one request."""
    return (answer["tokens"] - 1) / (answer["total_s"] - answer["first_s"])


@dataclass
class Residents:
    """The loaded workers of a run. All are paused but the one that is asked."""

    places: Places
    sizes: Sizes
    threads: int
    timeout: float
    workers: dict[str, Worker] = field(default_factory=dict)
    warmed: set[tuple[str, str]] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of ours

    def environment(self, entry: Entry) -> dict[str, str]:
        threads = str(self.threads)
        binding = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}"}
        compiled = {"PYTHONDONTWRITEBYTECODE": ""}  # kept from the warm-up, as installers leave it
        return {"OMP_NUM_THREADS": threads, **binding, **compiled, **entry.environment}

    def get(self, entry: Entry) -> Worker:
        worker = self.workers.get(entry.name)
        if worker is None:
            limit = max(self.sizes.long[0] + self.sizes.long[1], self.sizes.context) + 16
            command = entry.command(
                self.places, threads=self.threads, max_len=limit, max_seqs=self.sizes.counts[1]
            )
            worker = Worker(command, self.environment(entry))
            self.versions[entry.name] = str(worker.receive(self.timeout).get("version"))
            self.workers[entry.name] = worker
            if entry.engine == OURS:
                told = worker.ask(self.timeout, do="cost")
                self.costs[entry.name] = {**told, "products": entry.products}
            self.warmed = {(name, what) for name, what in self.warmed if name != entry.name}
        worker.go()
        return worker

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def measure(self, entry: Entry, workload: str, seed: int) -> tuple[dict[str, float], float]:
        """The workload's metrics, and the seconds it took, loading and warming up left out.

        Errors: WorkerFailed, Refused.
        """
        started = time.perf_counter()
        if workload in ("start", "memory"):
            return self._fresh(entry, workload, seed), time.perf_counter() - started
        worker = self.get(entry)
        try:
            if not entry.warm and (entry.name, workload) not in self.warmed:
                self._ask(worker, workload, seed + 500, warm=True)
                self.warmed.add((entry.name, workload))
            started = time.perf_counter()
            repeats = self.sizes.repeats if workload in ("decode", "prompt") else 1
            answers = [self._ask(worker, workload, seed + i) for i in range(repeats)]
        except Refused:
            worker.pause()
            raise
        except WorkerFailed:
            self.workers.pop(entry.name, None)
            raise
        took = time.perf_counter() - started
        worker.pause()
        return _values(workload, answers), took

    def _ask(self, worker: Worker, workload: str, seed: int, warm: bool = False) -> dict[str, Any]:
        sizes = self.sizes
        if workload in ("batch8", "batch32"):
            count = sizes.counts[0 if workload == "batch8" else 1]
            prompt, out = sizes.batch
            asked: dict[str, Any] = {"do": "batch", "count": count}
        else:
            shapes = {"decode": sizes.decode, "prompt": (sizes.prompt, 1), "long": sizes.long}
            prompt, out = shapes[workload]
            asked = {"do": "stream"}
        out = min(out, 4) if warm else out
        return worker.ask(self.timeout, **asked, prompt=prompt, out=out, seed=seed)

    def _fresh(self, entry: Entry, workload: str, seed: int) -> dict[str, float]:
        """A process of its own: to its first token, or one stream that fills the context."""
        sizes, start = self.sizes, workload == "start"
        command = entry.command(
            self.places,
            threads=self.threads,
            max_len=sizes.context,
            max_seqs=1,
            small=True,
            start=start,
        )
        with Worker(command, self.environment(entry)) as worker:
            worker.receive(self.timeout)
            if start:
                worker.ask(self.timeout, do="stream", prompt=sizes.decode[0], out=1, seed=seed)
                return {"first": time.perf_counter() - worker.started}
            out = sizes.context_out
            prompt = sizes.context - out
            worker.ask(self.timeout, do="stream", prompt=prompt, out=out, seed=seed)
            return {"peak": worker.ask(60, do="memory")["peak_mib"]}


def _values(workload: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if workload == "decode":
        return {"rate": statistics.median(decode_rate(a) for a in answers)}
    if workload == "prompt":
        return {"first": statistics.median(a["first_s"] for a in answers)}
    (answer,) = answers
    if workload == "long":
        return {"first": answer["first_s"], "rate": decode_rate(answer)}
    return {"rate": answer["tokens"] / answer["total_s"]}


# ------------------------------------------------------------------------------------- whole run


@dataclass(frozen=True)
class Plan:
    rounds: int
    classes: Sequence[str]
    engines: Sequence[str]  # parts of names; empty: all
    workloads: Sequence[str]
    sizes: Sizes
    threads: int
    timeout: float
    with_kl: bool = True
    patience: float = 10  # seconds: what takes longer is measured in the first round alone
    minutes: float = 25  # no measurement starts later


def chosen(
    entries: Sequence[Entry], engines: Sequence[str], classes: Sequence[str] = CLASSES
) -> list[Entry]:
    """Those of the classes whose names contain one of `engines`; empty: all of them."""
    wanted = [e.lower() for e in engines]
    return [
        entry
        for entry in entries
        if entry.kind in classes
        and (not wanted or any(part in entry.name.lower() for part in wanted))
    ]


def ready(
    places: Places, entries: Sequence[Entry], say: Callable[[str], None]
) -> tuple[list[Entry], dict[str, str]]:
    """Those that can run, and why the others cannot. Errors: NotPrepared where no peer can that was
    asked for, or nothing at all."""
    out, missing = [], {}
    for entry in entries:
        try:
            entry.check(places)
            out.append(entry)
        except NotPrepared as error:
            missing[entry.name] = str(error)
    if any(e.peer for e in entries) and not any(e.peer for e in out):
        raise NotPrepared("\n".join(("no peer is prepared:", *missing.values())))
    if not out:
        raise NotPrepared("\n".join(("none of these can run here:", *missing.values())))
    for line in missing.values():
        say(f"left out: {line}")
    return out, missing


def run(
    places: Places,
    entries: Sequence[Entry],
    plan: Plan,
    file: Path | None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """Measure, printing each figure as it comes; the result is written after every one."""
    picked, left_out = ready(places, chosen(entries, plan.engines, plan.classes), say)
    started = time.monotonic()
    probe.build(places)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown_command(),
        "python": platform.python_version(),
        "threads": plan.threads,
        "rounds": plan.rounds,
        "patience": plan.patience,
        "sizes": dataclasses.asdict(plan.sizes),
        "workloads": [
            {"name": w.name, "title": w.title, "metrics": [list(m) for m in w.metrics]}
            for w in workloads(plan.sizes)
            if w.name in plan.workloads
        ],
        "entries": [{"name": e.name, "engine": e.engine, "kind": e.kind} for e in picked],
        "left_out": left_out,
        "versions": {},
        "costs": {},
        "types": types(places),
        "kl": {},
        "rows": [],
    }

    def save() -> None:
        result["minutes"] = (time.monotonic() - started) / 60
        if file is not None:
            part = file.with_name(file.name + ".part")
            part.write_text(json.dumps(result, indent=1))
            part.rename(file)

    if plan.with_kl:
        _divergences(places, entries, picked, plan, result, say)
        save()
    residents = Residents(places, plan.sizes, plan.threads, plan.timeout)
    result["versions"], result["costs"] = residents.versions, residents.costs
    failures: dict[str, int] = {}
    done: set[tuple[str, str]] = set()  # what is not measured again
    try:
        for round_ in range(plan.rounds):
            for workload in workloads(plan.sizes):
                if workload.name not in plan.workloads:
                    continue
                turn = [e for e in picked if (e.name, workload.name) not in done]
                turn = [e for e in turn if not e.only or workload.name in e.only]
                if turn:
                    say(f"\nround {round_ + 1}: {workload.title}")
                for entry in turn:
                    if failures.get(entry.name, 0) >= GIVE_UP:
                        continue
                    if time.monotonic() - started > 60 * plan.minutes:
                        say(f"stopped after {plan.minutes:g} minutes; --minutes allows more")
                        return result
                    took = _measure(residents, entry, workload, round_, result, failures, say)
                    if workload.once or took > plan.patience:
                        done.add((entry.name, workload.name))
                    save()
    finally:
        residents.close()
    say(f"\n{result['minutes']:.1f} minutes")
    return result


def _measure(
    residents: Residents,
    entry: Entry,
    workload: Workload,
    round_: int,
    result: dict[str, Any],
    failures: dict[str, int],
    say: Callable[[str], None],
) -> float:
    """One row of the result. Returns the seconds that its measurement took."""
    took = 0.0
    row: dict[str, Any] = {"entry": entry.name, "workload": workload.name, "round": round_}
    moment = probe.measure(residents.places, residents.threads)
    try:
        row["values"], took = residents.measure(entry, workload.name, seed=1000 * round_ + 1)
        figures = ", ".join(
            f"{row['values'][name]:9.2f} {unit:5}" for name, unit, _ in workload.metrics
        )
    except WorkerFailed as error:
        row["error"] = str(error)
        figures = f"FAILED: {error}"
        if not isinstance(error, Refused):
            failures[entry.name] = failures.get(entry.name, 0) + 1
            if failures[entry.name] >= GIVE_UP:
                figures += f"\n  {entry.name} failed {GIVE_UP} times and is left out from here on"
    row["probe"] = moment
    result["rows"].append(row)
    near = show_kl(result["kl"].get(entry.name))
    say(f"  {entry.name:32} {figures} | KL {near} | {probe.show(moment)}")
    return took


def _divergences(
    places: Places,
    entries: Sequence[Entry],
    picked: Sequence[Entry],
    plan: Plan,
    result: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    try:
        ids = kl.token_ids(places, plan.sizes.text)
        against = kl.reference(places, list(entries), ids, plan.threads)
    except (NotPrepared, WorkerFailed, OSError, ImportError, ValueError) as error:
        say(f"no KL divergence: {error}")
        return
    say(f"KL to the 16-bit model (transformers, fp32) over {len(ids)} tokens of docstrings")
    result["text"] = {"tokens": len(ids), "hash": kl.ids_hash(ids)}
    for entry in picked:
        if entry.has_twin:
            found = kl.divergence(
                places, entry, ids, against, threads=plan.threads, timeout=plan.timeout
            )
        else:
            found = {"why": "there is no 16-bit model of this file to compare it with"}
        result["kl"][entry.name] = found
        more = f", top-1 {found['top1']:.3f}" if "top1" in found else f" ({found['why']})"
        say(f"  {entry.name:32} {show_kl(found)}{more}")


def show_kl(found: Mapping[str, Any] | None) -> str:
    return f"{found['kl']:.4f}" if found and "kl" in found else "n/a"


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next(x.split(":", 1)[1].strip() for x in info if "model name" in x)
    except (OSError, StopIteration):
        pass
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"


def shown_command() -> str:
    """The command, without where this machine keeps things."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
            continue
        if word in ("--folder", "--json"):
            skip = True
            continue
        words.append(word)
    return " ".join(["python -m benchmarks.peers", *words])


def types(places: Places) -> dict[str, Any]:
    path = places.folder / "models" / "types.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
