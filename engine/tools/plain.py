"""Values as a program reads them: plain JSON, one document per command."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, TypeVar

from ..core.answers import RequestOutput

_Report = TypeVar("_Report")


def output_as_plain(output: RequestOutput, model: str) -> dict[str, Any]:
    """The output as plain JSON values: numbers that JSON cannot write (-inf) become null."""
    fields = {
        f.name: getattr(output, f.name) for f in dataclasses.fields(output) if f.name != "deltas"
    }
    return {"model": model, **{name: _plain(value) for name, value in fields.items()}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dump(value: Any, out: TextIO) -> None:
    """One JSON document and a newline."""
    json.dump(_plain(value), out, ensure_ascii=False, indent=2, allow_nan=False)
    out.write("\n")
    out.flush()


def tell(report: _Report, render: Callable[[_Report], str], *, as_json: bool) -> None:
    """A command's report on standard output, as JSON or as the text that `render` makes of it."""
    if as_json:
        dump(report, sys.stdout)
    else:
        print(render(report))


__all__ = ["dump", "output_as_plain", "tell"]
