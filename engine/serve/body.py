"""A request's body as JSON of one kind, bounded."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from .errors import ApiError
from .settings import ServeConfig

_Body = TypeVar("_Body")


async def read(request: Request, kind: type[_Body], settings: ServeConfig) -> _Body:
    """The body as a `kind`. Errors: ApiError, msgspec.ValidationError."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(
            "unsupported_media_type",
            f"the body's content type is {media[:100]!r}; send application/json",
        )
    limit = settings.max_body_bytes
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ApiError("body_too_large", f"the body exceeds {limit} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
        try:
            return msgspec.convert(_whole(msgspec.json.decode(body)), type=kind)
        except (msgspec.ValidationError, RecursionError):
            raise error from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ApiError("invalid_json", f"the body is no JSON: {error}") from None


def _whole(value: Any) -> Any:
    """The value with floats without a fraction as integers: 1.0 is one by JSON Schema."""
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


__all__ = ["read"]
