"""What every benchmark reports: rows under columns, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Chart

SCHEMA = "engineroom.bench/1"  # of the JSON; the number changes when a field changes its meaning


@dataclass(frozen=True)
class Column:
    """`key` in a row, JSON and CSV; `title`, with its unit, in a table; digits after the point."""

    key: str
    title: str
    digits: int = 0

    def show(self, value: Any) -> str:
        """A cell's text: nothing for None, numbers with thousands apart."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float):
            return f"{value:,.{self.digits}f}"
        return str(value)


@dataclass(frozen=True)
class Table:
    """Rows as plain values by column key; a key that a row lacks is an empty cell."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]] = ()
    note: str = ""

    def markdown(self) -> str:
        """The table alone, its columns aligned, so that it reads in a terminal too."""
        cells = [[c.title for c in self.columns]]
        cells += [
            [c.show(row.get(c.key)).replace("|", "/") for c in self.columns] for row in self.rows
        ]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        right = [self.numbers(c.key) for c in self.columns]

        def line(parts: Sequence[str]) -> str:
            padded = [
                part.rjust(width) if to_right else part.ljust(width)
                for part, width, to_right in zip(parts, widths, right, strict=True)
            ]
            return "| " + " | ".join(padded) + " |"

        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])

    def csv(self) -> str:
        """Keys, then rows; numbers in full."""
        out = io.StringIO()
        keys = [c.key for c in self.columns]
        writer = csv.DictWriter(out, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "columns": {c.key: c.title for c in self.columns},
            "note": self.note,
            "rows": [dict(row) for row in self.rows],
        }

    def numbers(self, key: str) -> bool:
        """True where every value of a column is a number: it stands to the right."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return bool(values) and all(isinstance(v, int | float) for v in values)


@dataclass(frozen=True)
class Report:
    """A benchmark's tables with where and when they were measured."""

    bench: str
    facts: Mapping[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()  # in a page alone

    def plain(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "tables": [table.plain() for table in self.tables],
        }

    def json(self) -> str:
        return json.dumps(self.plain(), indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        parts = [f"# engineroom bench {self.bench}"]
        parts += ["\n".join(f"* {name}: {fact(value)}" for name, value in self.facts.items())]
        parts += list(self.notes)
        for table in self.tables:
            parts += [f"## {table.title}", table.markdown()]
            parts += [table.note] if table.note else []
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """The tables one after the other, an empty line between."""
        return "\n".join(table.csv() for table in self.tables)


def fact(value: Any) -> str:
    """A fact as words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
