"""Writes the generated parts of docs/: `python -m tests.house.generate_docs` (`make docs`).

A page keeps its prose; between `<!-- generated: NAME -->` and `<!-- end -->` stands what the code
says. A test compares.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engineroom.engine import models
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.load.catalogue import CATALOGUE
from engineroom.engine.serve.errors import ERRORS as SERVER_ERRORS
from engineroom.engine.serve.settings import ServeConfig
from engineroom.engine.tools.errors import ERRORS, EXIT_STATUSES
from engineroom.engine.tools.options import ENGINE_HELP, SAMPLING_HELP, SERVE_HELP
from engineroom.kernels.weights import FORMATS

from .tree import ROOT

_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(_cell(c) for c in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def sampling() -> str:
    def row(field: dataclasses.Field[Any]) -> list[str]:
        bounds = SamplingParams.BOUNDS.get(field.name)
        limits = SamplingParams.LIMITS.get(field.name)
        allowed = f"{_number(bounds[0])} to {_number(bounds[1])}" if bounds else ""
        if limits:
            count, length = limits
            each = f" of at most {length} characters" if length else ""
            allowed = "; ".join(filter(None, [allowed, f"at most {count} entries{each}"]))
        return [
            f"`{field.name}`",
            f"`{field.type}`",
            f"`{field.default!r}`",
            allowed,
            SAMPLING_HELP[field.name],
        ]

    rows = map(row, dataclasses.fields(SamplingParams))
    return table(["field", "type", "default", "range", "what it does"], rows)


def _number(value: float) -> str:
    if value == 2**64 - 1:
        return "2^64 - 1"
    if value == 2**31 - 1:
        return "2^31 - 1"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def options() -> str:
    rows = (
        [
            f"`{f.name}`",
            f"`{f.default!r}`",
            " to ".join(map(str, EngineConfig.BOUNDS.get(f.name, ()))),
            ENGINE_HELP[f.name],
        ]
        for f in dataclasses.fields(EngineConfig)
        if f.name != "model"
    )
    return table(["option", "default", "range", "what it is"], rows)


def server_options() -> str:
    rows = (
        [
            f"`--{f.name.replace('_', '-')}`",
            f"`{f.default!r}`",
            " to ".join(f"{n:,}" for n in ServeConfig.BOUNDS.get(f.name, ())),
            SERVE_HELP[f.name],
        ]
        for f in dataclasses.fields(ServeConfig)
        if f.name in SERVE_HELP
    )
    return table(["flag", "default", "range", "what it is"], rows)


def server_errors() -> str:
    rows = (
        [f"{row.status}", f"`{row.code}`", f"`{row.type}`", row.meaning, row.mend]
        for row in sorted(SERVER_ERRORS, key=lambda row: row.status)
    )
    return table(["status", "code", "type", "meaning", "to mend it"], rows)


def errors() -> str:
    """One heading per code, so that a message can point at it."""
    out = []
    for row in ERRORS:
        name = row.raised.rpartition(".")[2]
        raised = f" Python: `{name}`." if name else ""
        out.append(
            f"### {row.code}\n\n{row.meaning[0].upper()}{row.meaning[1:]}. "
            f"To mend it: {row.mend}.{raised} Exit status {row.exit_status}.\n\n"
        )
    return "\n" + "".join(out)


def statuses() -> str:
    return table(["status", "meaning"], ([f"{n}", text] for n, text in EXIT_STATUSES.items()))


def architectures() -> str:
    def names(values: Iterable[str]) -> str:
        return ", ".join(f"`{v}`" for v in values) or "none"

    rows = (
        [f"`engine/models/{family}.py`", names(kinds["hf"]), names(kinds["gguf"])]
        for family, kinds in models.supported().items()
    )
    return table(["file", "`config.json` architectures", "GGUF architectures"], rows)


def formats() -> str:
    rows = (
        [
            f"`{f.name}`",
            f"{f.block_elements}",
            f"{f.block_bytes}",
            f"{f.header_bytes}",
            f"{f.bits_per_element:g}",
        ]
        for f in FORMATS.values()
    )
    header = ["format", "elements per block", "bytes per block", "bytes per row besides"]
    return table([*header, "bits per weight"], rows)


def catalogue() -> str:
    rows = (
        [
            f"`{entry.name}`",
            entry.title,
            f"{entry.num_bytes:,}",
            f"{entry.license} ({entry.terms_url})" if entry.terms_url else entry.license,
            ", ".join(f"`{p.package}=={p.version}`" for p in entry.parts),
        ]
        for entry in CATALOGUE.values()
    )
    return table(["name", "model", "bytes", "licence", "packages"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "sampling": sampling,
    "options": options,
    "errors": errors,
    "server_options": server_options,
    "server_errors": server_errors,
    "statuses": statuses,
    "architectures": architectures,
    "formats": formats,
    "catalogue": catalogue,
}


def generated(text: str) -> str:
    """`text` with its generated blocks written anew. Errors: KeyError for an unknown name."""
    return _BLOCK.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}{m[3]}", text)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


def main() -> int:
    for page in pages():
        text = page.read_text("utf-8")
        new = generated(text)
        if new != text:
            page.write_text(new, "utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
