"""What stands behind a path's ?, as a value of one kind: checked here, stated in /openapi.json."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from .errors import ApiError, invalid

_Query = TypeVar("_Query", bound=msgspec.Struct)


def stated(kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """The parameters of a kind by name, as JSON Schema."""
    (whole,) = msgspec.json.schema(kind)["$defs"].values()
    properties: dict[str, dict[str, Any]] = whole["properties"]
    return properties


def query(request: Request, kind: type[_Query]) -> _Query:
    """Errors: ApiError, which says what a parameter may be."""
    given = dict(request.query_params)
    known = stated(kind)
    for name in given:
        if name not in known:
            raise ApiError(
                "invalid_value",
                f"unknown parameter {name[:64]!r}; known are {', '.join(known)}",
                param=name[:64],
            )
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        name = invalid(error).param or ""
        form = known[name]
        allowed = (
            f"one of {', '.join(form['enum'])}"
            if "enum" in form
            else f"an integer in {form['minimum']}..{form['maximum']}"
        )
        raise ApiError(
            "invalid_value", f"{name}={given[name][:64]!r} is not {allowed}", param=name
        ) from None


__all__ = ["query", "stated"]
