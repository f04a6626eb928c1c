"""Figures of a report as data, and as SVG in a page of their own colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 34, 44
_COLOURS = 6  # classes c0 to c5 of the page's style


@dataclass(frozen=True)
class Line:
    """One series: points (x, y) in order of x, and a label of each where they have names."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Lines:
    """Series over two axes that begin at 0."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]

    def svg(self) -> str:
        xs = [x for line in self.lines for x, _ in line.points]
        ys = [y for line in self.lines for _, y in line.points]
        frame = _Frame(_ticks(max(xs, default=1.0)), _ticks(max(ys, default=1.0)))
        parts = [frame.axes(self.x, self.y)]
        for index, line in enumerate(self.lines):
            kind = f"c{index % _COLOURS}"
            places = [(frame.x(x), frame.y(y)) for x, y in line.points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {kind}" points="{path}"/>')
            for i, (x, y) in enumerate(places):
                told = line.labels[i] if i < len(line.labels) else line.name
                value = f"{told}: {_short(line.points[i][0])} {self.x}, "
                value += f"{_short(line.points[i][1])} {self.y}"
                parts.append(
                    f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{escape(value)}</title></circle>"
                )
            at = _TOP + 10 + 18 * index
            parts.append(
                f'<rect class="dot {kind}" x="{_WIDTH - _RIGHT + 14}" y="{at - 8}" width="10" '
                f'height="10" rx="2"/>{_text(_WIDTH - _RIGHT + 30, at + 1, line.name)}'
            )
        return _svg(self.title, _HEIGHT, parts)


@dataclass(frozen=True)
class Bars:
    """One row of time: stretches (name, start, end), and marks on it."""

    title: str
    unit: str
    stretches: Sequence[tuple[str, float, float]]
    marks: Sequence[float] = ()
    note: str = ""

    def svg(self) -> str:
        ticks = _ticks(max((end for _, _, end in self.stretches), default=1.0))
        frame = _Frame(ticks, (0.0, 1.0), right=20, left=20)
        parts = []
        for index, (name, start, end) in enumerate(self.stretches):
            x, width = frame.x(start), max(1.0, frame.x(end) - frame.x(start))
            told = f"{name}: {_short(end - start)} {self.unit}"
            parts.append(
                f'<rect class="bar c{index % _COLOURS}" x="{x:.1f}" y="34" width="{width:.1f}" '
                f'height="26" rx="2"><title>{escape(told)}</title></rect>'
            )
            at = 20 + 175 * index
            parts.append(
                f'<rect class="dot c{index % _COLOURS}" x="{at}" y="10" width="10" height="10" '
                f'rx="2"/>{_text(at + 16, 19, told)}'
            )
        for mark in self.marks:
            x = frame.x(mark)
            parts.append(f'<line class="mark" x1="{x:.1f}" y1="64" x2="{x:.1f}" y2="76"/>')
        parts += [_text(frame.x(tick), 92, _short(tick), "middle") for tick in ticks]
        told = f"{self.unit} since it was sent; each mark is a part of the answer"
        parts.append(_text(20, 110, f"{told}. {self.note}" if self.note else told))
        return _svg(self.title, 118, parts)


Chart = Lines | Bars


class _Frame:
    """From values to places: axes from 0 to their last tick."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], left: int = _LEFT, right: int = _RIGHT
    ) -> None:
        self.xs, self.ys = xs, ys
        self._left, self._right = left, _WIDTH - right

    def x(self, value: float) -> float:
        return self._left + (self._right - self._left) * value / self.xs[-1]

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / self.ys[-1]

    def axes(self, x_title: str, y_title: str) -> str:
        bottom = _HEIGHT - _BOTTOM
        parts = []
        for tick in self.ys:
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{self._left}" y1="{y:.1f}" x2="{self._right}" '
                f'y2="{y:.1f}"/>{_text(self._left - 8, y + 4, _short(tick), "end")}'
            )
        parts += [_text(self.x(x), bottom + 18, _short(x), "middle") for x in self.xs]
        middle = (self._left + self._right) / 2
        parts.append(_text(middle, bottom + 36, x_title, "middle"))
        parts.append(_text(self._left - 8, _TOP - 16, y_title, "end"))
        return "".join(parts)


def _ticks(most: float) -> tuple[float, ...]:
    """0 and four to eight round steps that reach `most`."""
    if not most > 0 or not math.isfinite(most):
        most = 1.0
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    return tuple(step * i for i in range(math.ceil(most / step - 1e-9) + 1))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(x: float, y: float, words: Any, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(words))}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, {chr(34): "&quot;"})}">{"".join(parts)}</svg>'
    )
