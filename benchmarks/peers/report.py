"""A run's figures as a Markdown table: medians, ranges, ours beside the best peer of the class."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engineroom.engine.bench.cost import ModelCost

from .engines import CLASSES, OURS
from .run import SCHEMA, show_kl

CLASS_TITLES = {"4bit": "4-bit weights", "8bit": "8-bit weights", "bf16": "16-bit weights"}
CLASS_TITLES |= {"gemma": "Gemma 3 270M (Q4_K_M)"}


class BadReport(Exception):
    """A file that is no result of `run`, or does not fit the others."""


@dataclass(frozen=True)
class Metric:
    """One measured quantity: a block of the table."""

    workload: str
    name: str
    title: str
    unit: str
    more_is_better: bool


@dataclass(frozen=True)
class Cell:
    values: tuple[float, ...]
    modes: tuple[str, ...]
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def load(paths: Sequence[Path]) -> dict[str, Any]:
    """One result, or several of the same kind joined as further rounds. Errors: BadReport."""
    merged: dict[str, Any] | None = None
    for path in paths:
        try:
            result = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadReport(f"{path}: {error}") from error
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            raise BadReport(f"{path} is no result of `run` (schema {SCHEMA})")
        if merged is None:
            merged = result
            continue
        if result["machine"] != merged["machine"]:
            raise BadReport(f"{path} is of another machine: {result['machine']}")
        titles = {w["name"]: w["title"] for w in merged["workloads"]}
        for workload in result["workloads"]:
            if titles.setdefault(workload["name"], workload["title"]) != workload["title"]:
                raise BadReport(f"{path}: {workload['name']} is another workload there")
        for key in ("workloads", "entries"):
            known = {item["name"] for item in merged[key]}
            merged[key] += [item for item in result[key] if item["name"] not in known]
        merged["rows"] += result["rows"]
        merged["kl"] |= {
            k: v for k, v in result["kl"].items() if "kl" in v or k not in merged["kl"]
        }
        for key in ("versions", "costs", "left_out"):
            merged[key] |= result[key]
        merged["minutes"] += result["minutes"]
        if result["command"] not in merged["command"]:
            merged["command"] += "; " + result["command"]
    if merged is None:
        raise BadReport("no file was given")
    return merged


def metrics(result: Mapping[str, Any]) -> list[Metric]:
    out = []
    for workload in result["workloads"]:
        for name, unit, more in workload["metrics"]:
            title = workload["title"]
            if len(workload["metrics"]) > 1:
                title += ", decode" if name == "rate" else ", time to first token"
            out.append(Metric(workload["name"], name, title, unit, more))
    return out


def cell(result: Mapping[str, Any], entry: str, metric: Metric) -> Cell | None:
    """What was measured, or None where nothing was tried."""
    rows = [r for r in result["rows"] if r["entry"] == entry and r["workload"] == metric.workload]
    if not rows:
        return None
    good = [r for r in rows if metric.name in r.get("values", {})]
    errors = [r["error"] for r in rows if "error" in r]
    return Cell(
        tuple(r["values"][metric.name] for r in good),
        tuple(r.get("probe", {}).get("mode", "unknown") for r in good),
        errors[0] if errors else "",
    )


def limit_s(result: Mapping[str, Any], row: Mapping[str, Any], metric: Metric) -> float | None:
    """The least that this figure could have been at the row's own moment, in seconds: of a prompt's
    first token, or of one step of one stream. None where no such limit is known."""
    told = result["costs"].get(row["entry"])
    if told is None or metric.workload not in ("decode", "prompt", "long"):
        return None
    sizes = result["sizes"]
    cost = ModelCost.of(told)
    if metric.name == "first":
        tokens = sizes["prompt"] if metric.workload == "prompt" else sizes["long"][0]
        return cost.prompt_s(tokens, row["probe"])
    prompt, out = sizes[metric.workload]
    return cost.decode_s(1, prompt + out // 2, row["probe"])


def share(result: Mapping[str, Any], entry: str, metric: Metric) -> float | None:
    """How much of the machine's own limit was reached, 1 being all; the median of the rounds."""
    shares = []
    for row in result["rows"]:
        value = row.get("values", {}).get(metric.name)
        if row["entry"] != entry or row["workload"] != metric.workload or value is None:
            continue
        least = limit_s(result, row, metric)
        if least is not None:
            shares.append(least * value if metric.more_is_better else least / value)
    return statistics.median(shares) if shares else None


def entries_of(result: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [entry for entry in result["entries"] if entry["kind"] == kind]


def best(names: Iterable[str], cells: Mapping[str, Cell | None], more: bool) -> str | None:
    """The name with the best median among those that have one."""
    medians = {n: c.median for n in names if (c := cells.get(n)) is not None and c.values}
    if not medians:
        return None
    return (max if more else min)(medians, key=lambda n: medians[n])


def ratio(ours: float, theirs: float, more_is_better: bool) -> float:
    """How many times as good as theirs ours is; above 1 is better, whatever the unit."""
    return ours / theirs if more_is_better else theirs / ours


def markdown(result: Mapping[str, Any], plot: str = "") -> str:
    lines = [header(result), ""]
    if plot:
        lines += [f"![Ours beside the peers, as ratios to the best peer]({plot})", ""]
    lines.append(
        "Medians, with the least and the greatest of the rounds. Ratio: ours to the best peer of "
        "the class, then to the peer with the same file where that is another; above 1 where ours "
        "is better. Mode: of the machine when it was measured "
        "(near, far: [where the two cores share a cache, or do not](#beside-the-peers)). Of the "
        "limit: the time that a step's bytes take at the read bandwidth, or its operations at the "
        "dot peaks, both measured just before, as a share of the time that it took. What took over "
        f"{result['patience']:g} s was measured once, and so was the memory."
    )
    for kind in CLASSES:
        found = entries_of(result, kind)
        if found:
            lines += ["", f"### {CLASS_TITLES[kind]}", "", *_class_table(result, found)]
    failed = [
        f"* {row['entry']}, {row['workload']}, round {row['round'] + 1}: "
        f"{row['error'].splitlines()[0]}"
        for row in result["rows"]
        if "error" in row
    ]
    if failed:
        lines += ["", "### What failed", "", *dict.fromkeys(failed)]
    if result["left_out"]:
        lines += ["", "### What was left out", ""]
        lines += [f"* {why.splitlines()[0]}" for why in result["left_out"].values()]
    silent = [
        f"* {name}: {found['why'].splitlines()[0]}"
        for name, found in result["kl"].items()
        if "why" in found
    ]
    if silent:
        lines += ["", "### No KL divergence", "", *silent]
    return "\n".join(lines) + "\n"


def header(result: Mapping[str, Any]) -> str:
    versions: dict[str, str] = {}
    for entry in result["entries"]:
        version = result["versions"].get(entry["name"])
        if version:
            versions[entry["engine"]] = version
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    probes = [row["probe"] for row in result["rows"] if row.get("probe")]
    lines = [
        f"{result['machine']}; {result['threads']} threads; {result['date']}, "
        f"{result['minutes']:.0f} minutes; "
        f"Python {result['python']}; {said or 'no versions'}",
        f"`{result['command']}`",
    ]
    peaks = []
    for name, unit in (
        ("barrier_ns", "ns barrier"),
        ("read_gbs", "GB/s read"),
        ("int8_gops", "int8 GOP/s"),
        ("bf16_gflops", "bf16 GFLOP/s"),
    ):
        values = [p[name] for p in probes if p.get(name) is not None]
        if values:
            peaks.append(f"{min(values):.0f} .. {max(values):.0f} {unit}")
    if peaks:
        lines.append(f"The machine meanwhile: {', '.join(peaks)}.")
    types = result.get("types") or {}
    said = "; ".join(f"{f}: embedding {t['embedding']}" for f, t in types.items())
    if said:
        lines.append(f"Types of the embedding, to which the head is tied: {said}.")
    return "\n".join(lines)


def _class_table(result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| workload | engine | median | min .. max | ratio | of the limit | mode | KL to 16-bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = [e["name"] for e in entries if e["engine"] == OURS]
    theirs = [e["name"] for e in entries if e["engine"] != OURS]
    for metric in metrics(result):
        cells = {e["name"]: cell(result, e["name"], metric) for e in entries}
        against = best(theirs, cells, metric.more_is_better)
        for entry in entries:
            found = cells[entry["name"]]
            if found is None:
                continue
            name = entry["name"]
            shown = f"**{name}**" if name in ours else name
            near = show_kl(result["kl"].get(name))
            title = f"{metric.title}, {metric.unit}"
            if not found.values:
                lines.append(f"| {title} | {shown} | failed | | | | | {near} |")
                continue
            of = ""
            if name in ours and against is not None:
                same = [n for n in theirs if _format(n) == _format(name) and n != against]
                parts = []
                for peer in (against, *same):
                    other = cells[peer]
                    if other is not None and other.values:
                        number = ratio(found.median, other.median, metric.more_is_better)
                        parts.append(f"{number:.2f} of {peer}")
                of = "; ".join(parts)
            elif name == against:
                of = "best peer"
            spread = f"{_number(min(found.values))} .. {_number(max(found.values))}"
            if len(found.values) == 1:
                spread = "once"
            reached = share(result, name, metric)
            part = "" if reached is None else f"{reached:.0%}"
            modes = ", ".join(f"{m} {n}" for m, n in sorted(Counter(found.modes).items()))
            lines.append(
                f"| {title} | {shown} | {_number(found.median)} | {spread} | {of} | {part} | "
                f"{modes} | {near} |"
            )
    return lines


def _format(name: str) -> str:
    return name.rsplit(" ", 1)[-1].lower()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
