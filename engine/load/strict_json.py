"""JSON from untrusted files: exactly one object, no repeated keys, no NaN."""

from __future__ import annotations

import json
import math
from typing import Any

from .mapped import CheckpointError, shown


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, UTF-8. `where` names its origin in messages and as `.field`.

    Errors: CheckpointError for anything that is not exactly one JSON object, a key that appears
    twice in an object (parsers disagree on which one counts), NaN and infinities.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_repeats,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise CheckpointError(where, f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise CheckpointError(where, f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(where, f"{where}: a JSON {type(value).__name__}, not an object")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)!r} appears twice")
            seen.add(key)
    return out


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is beyond a 64-bit float")
    return value
