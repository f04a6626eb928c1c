"""Strict: a part of a request whose unknown fields are errors."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Name = Annotated[str, Meta(min_length=1, max_length=256)]


class Strict(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a request: unknown fields are errors."""


__all__ = ["Name", "Strict"]
