"""A report as one self-contained HTML page: facts, figures, tables; it asks no other host."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .tables import Report, Table, fact

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --back: #fff;
  --panel: #f6f8fa; --c0: #c2410c; --c1: #1d4ed8; --c2: #0f766e; --c3: #7e22ce; --c4: #a16207;
  --c5: #be185d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --back: #0d1117; --panel: #161b22; --c0: #fb923c; --c1: #79a8ff; --c2: #2dd4bf; --c3: #c084fc;
  --c4: #facc15; --c5: #f472b6 } }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0;
  padding: 1rem; background: var(--panel); border-radius: 8px; font-size: .9rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; max-width: 56rem; height: auto; display: block }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.grid { stroke: var(--line) } .mark { stroke: var(--soft) }
.line { fill: none; stroke-width: 2 }
""" + "".join(
    f".line.c{i} {{ stroke: var(--c{i}) }} .dot.c{i}, .bar.c{i} {{ fill: var(--c{i}) }}\n"
    for i in range(6)
)


def html(report: Report) -> str:
    """The whole page."""
    title = f"engineroom bench {report.bench}"
    parts = [f"<h1>{escape(title)}</h1>", _facts(report.facts)]
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    parts += [f"<h2>{escape(chart.title)}</h2>{chart.svg()}" for chart in report.charts]
    parts += [_table(table) for table in report.tables]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(fact(v))}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(table: Table) -> str:
    numbers = [table.numbers(column.key) for column in table.columns]

    def cells(tag: str, texts: list[str]) -> str:
        marks = ((' class="n"' if number else "") for number in numbers)
        return "".join(
            f"<{tag}{mark}>{escape(text)}</{tag}>" for mark, text in zip(marks, texts, strict=True)
        )

    head = cells("th", [column.title for column in table.columns])
    rows = (
        f"<tr>{cells('td', [c.show(row.get(c.key)) for c in table.columns])}</tr>"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )
