"""The same figures as an SVG: per class and workload a group of bars, each engine one colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from .engines import CLASSES, OURS
from .report import CLASS_TITLES, best, cell, entries_of, metrics, ratio

LABEL, WIDTH, BAR, GAP = 300, 1000, 15, 14
PANEL = 340
PLOT = WIDTH - LABEL - 110
# Ours in one colour with shades; the peers in colours that differ in lightness too.
OUR_COLOURS = ("#c2410c", "#ea8c55", "#7c2d12")
COLOURS = {
    "llama.cpp": ("#1d4ed8", "#7da2f0"),
    "OpenVINO GenAI": ("#0f766e",),
    "vLLM": ("#7e22ce",),
    "transformers": ("#737373",),
}


def svg(result: Mapping[str, Any]) -> str:
    """Bars are ratios to the best peer of the class, which is 1: longer is better, whatever the
    unit, and the figure itself stands beside each bar."""
    body: list[str] = []
    y = 76.0
    for kind in CLASSES:
        entries = entries_of(result, kind)
        if not entries:
            continue
        body.append(text(16, y, CLASS_TITLES[kind], size=16, weight="bold"))
        y += 22
        colours = _colours(entries)
        for metric in metrics(result):
            cells = {e["name"]: cell(result, e["name"], metric) for e in entries}
            theirs = [e["name"] for e in entries if e["engine"] != OURS]
            known = [e["name"] for e in entries if (c := cells[e["name"]]) and c.values]
            against = best(theirs, cells, metric.more_is_better) or (known[0] if known else None)
            if against is None:
                continue
            other = cells[against]
            assert other is not None
            ratios = {}
            for name in known:
                found = cells[name]
                assert found is not None
                ratios[name] = ratio(found.median, other.median, metric.more_is_better)
            scale = PLOT / max(1.25, *ratios.values())
            body.append(text(16, y + 10, metric.title, size=12, weight="bold"))
            better = "more is better" if metric.more_is_better else "less is better"
            body.append(text(WIDTH - 16, y + 10, f"{metric.unit}, {better}", end=True, grey=True))
            y += 16
            top = y
            one, bottom = LABEL + scale, top + BAR * len(known) + 1
            body.append(
                f'<line x1="{one:.1f}" y1="{top - 3:.1f}" x2="{one:.1f}" y2="{bottom:.1f}" '
                'stroke="#111827" stroke-width="1" stroke-dasharray="3 2"/>'
            )
            for name in known:
                found = cells[name]
                assert found is not None
                width = max(1.0, ratios[name] * scale)
                body.append(text(LABEL - 8, y + BAR - 4, name, end=True))
                body.append(
                    f'<rect x="{LABEL}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 2}" '
                    f'fill="{colours[name]}"/>'
                )
                digits = 0 if found.median >= 100 else 1 if found.median >= 10 else 2
                shown = f"{found.median:.{digits}f}  ({ratios[name]:.2f})"
                body.append(text(LABEL + width + 6, y + BAR - 4, shown, halo=True))
                y += BAR
            y += GAP
        y += 12
    title = "engineroom beside the peers"
    note = f"{result['machine']}, {result['date']}; bars are ratios to the best peer (dashed)"
    return page(title, note, y, body)


def page(title: str, note: str, height: float, body: Sequence[str]) -> str:
    """A whole SVG: its title and note take the first 56 pixels."""
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#fbfbf9"/>',
        text(16, 26, title, size=18, weight="bold"),
        text(16, 44, note, size=12, grey=True),
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Line:
    """One curve of `axes`: its points, joined; `dashed` ones carry no dots and no name."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def axes(title: str, unit: str, left: float, top: float, lines: Sequence[Line]) -> list[str]:
    """Curves over two logarithmic axes, ticks at the first line's x and at 1, 2 and 5 of y, as the
    parts of a `page`: PANEL pixels square below the title, with names at the curves' ends."""
    points = [point for line in lines for point in line.points]
    low, high = min(y for _, y in points) / 1.2, max(y for _, y in points) * 1.2
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / first) / math.log(last / first) if last > first else 0.5
        return left + PANEL * across, top + PANEL * math.log(high / y) / math.log(high / low)

    out = [text(left, top - 12, f"{title}, {unit}", size=13, weight="bold")]
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high))):
        for tick in (10.0**power * step for step in (1, 2, 5)):
            if low <= tick <= high:
                _, y = at(first, tick)
                out.append(
                    f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}" '
                    'stroke="#e4e4e0"/>'
                )
                out.append(text(left - 6, y + 4, f"{tick:g}", end=True))
    for tick, _ in lines[0].points:
        x, _ = at(tick, low)
        out.append(text(x - 4, top + PANEL + 16, f"{tick:g}"))
    for line in lines:
        places = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>'
        )
        if not line.dashed:
            out += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in places
            ]
    ends = [(at(*line.points[-1]), line.name) for line in lines if not line.dashed]
    below = -math.inf
    for (x, y), name in sorted(ends, key=lambda end: end[0][1]):
        below = max(y, below + 13)  # names of curves that meet stand under one another
        out.append(text(x + 8, below + 4, name, halo=True))
    return out


def _colours(entries: list[Mapping[str, Any]]) -> dict[str, str]:
    used: dict[str, int] = {}
    out = {}
    for entry in entries:
        engine = entry["engine"]
        shades = OUR_COLOURS if engine == OURS else COLOURS.get(engine, ("#404040",))
        out[entry["name"]] = shades[used.get(engine, 0) % len(shades)]
        used[engine] = used.get(engine, 0) + 1
    return out


def text(
    x: float,
    y: float,
    said: str,
    *,
    size: int = 11,
    weight: str = "normal",
    end: bool = False,
    grey: bool = False,
    halo: bool = False,
) -> str:
    anchor = ' text-anchor="end"' if end else ""
    behind = ' paint-order="stroke" stroke="#fbfbf9" stroke-width="3"' if halo else ""
    colour = "#52525b" if grey else "#18181b"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}"{anchor}{behind}>{escape(said)}</text>'
    )
