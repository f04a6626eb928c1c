"""StructuredOutput: the form that a request's output must have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .parameter import ParameterError, show

__all__ = ["StructuredOutput"]

FIELD = "structured"  # of SamplingParams: what an error names
_NOT_A_SCHEMA = "a JSON schema is an object, or true for any JSON"


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """One form of output, exactly one of the fields.

    json_schema: the text of a JSON schema. json_object: any JSON object. regex: the whole output
    matches it (Rust's regex syntax, no look-around). grammar: a Lark grammar with the rule `start`,
    which may embed `%json {...}`. choice: one of these texts. What llguidance makes of them is
    found out when the request is admitted.
    Errors: ParameterError("structured") for none or several, or beyond the limits.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None

    # Longest texts in UTF-8 bytes; entries of `choice`; objects and lists of a schema in another.
    MAX_BYTES: ClassVar[dict[str, int]] = {
        "json_schema": 1 << 18,
        "regex": 1 << 14,
        "grammar": 1 << 18,
        "choice": 1 << 18,  # all of them together
    }
    MAX_CHOICES: ClassVar[int] = 4096
    MAX_DEPTH: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise _error(f"json_object={show(self.json_object)} must be True or False")
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        if len(self.to_dict()) != 1:
            names = [f.name for f in dataclasses.fields(self)]
            raise _error(
                f"{len(self.to_dict())} forms are given ({', '.join(self.to_dict()) or 'none'}); "
                f"give exactly one of {', '.join(names)}"
            )
        for name in ("json_schema", "regex", "grammar"):
            text = getattr(self, name)
            if text is not None:
                _check_text(name, text, self.MAX_BYTES[name])
        if self.json_schema is not None:
            _check_schema(self.json_schema)
        if self.choice is not None:
            self._check_choice(self.choice)

    def _check_choice(self, choice: object) -> None:
        if not isinstance(choice, tuple) or not choice:
            raise _error(f"choice={show(choice)} must be a list of at least one text")
        if len(choice) > self.MAX_CHOICES:
            raise _error(
                f"choice has {len(choice)} entries; at most {self.MAX_CHOICES} are allowed"
            )
        for text in choice:
            _check_text("choice", text, self.MAX_BYTES["choice"])
        size = sum(len(text.encode()) for text in choice)
        if size > self.MAX_BYTES["choice"]:
            raise _error(
                f"choice has {size} bytes of text; at most {self.MAX_BYTES['choice']} are allowed"
            )

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(iter(self.to_dict()))

    @classmethod
    def json(cls, schema: Mapping[str, Any] | str | Any) -> StructuredOutput:
        """Of a JSON schema: its text, a mapping, or a class with pydantic's `model_json_schema()`.

        Errors: ParameterError("structured") for anything else.
        """
        of_class = getattr(schema, "model_json_schema", None)
        value = of_class() if callable(of_class) else schema
        if isinstance(value, str):
            return cls(json_schema=value)
        if not isinstance(value, Mapping):
            raise _error(f"{_NOT_A_SCHEMA}, not {show(schema)}")
        try:
            return cls(json_schema=json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ParameterError):
                raise
            raise _error(f"the JSON schema cannot be written as JSON: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Build from names and values, as to_dict() gives them. Errors: ParameterError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise _error(f"unknown form {show(name)} (known: {', '.join(known)})")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The field that is set, as a plain value."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None and value is not False
        }


def _error(text: str) -> ParameterError:
    return ParameterError(FIELD, f"{FIELD}: {text}")


def _check_text(name: str, text: object, limit: int) -> None:
    if not isinstance(text, str) or not text:
        raise _error(f"{name}={show(text)} must be a text that is not empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _error(f"{name} has a lone surrogate and is no text") from None
    if size > limit:
        raise _error(f"{name} has {size} bytes; at most {limit} are allowed")
    if "\0" in text:
        raise _error(f"{name} has a NUL character, which no grammar may hold")


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        depth = StructuredOutput.MAX_DEPTH
        raise _error(f"json_schema nests deeper than {depth}, the most allowed") from None
    except ValueError as error:
        raise _error(f"json_schema is not JSON: {error}") from None
    if not isinstance(schema, dict) and schema is not True:
        raise _error(f"{_NOT_A_SCHEMA}, not {show(schema)}")
    depth, level = 0, [schema]
    while level:  # breadth first: a level of the tree a turn
        depth += 1
        if depth > StructuredOutput.MAX_DEPTH + 1:
            raise _error(
                f"json_schema nests deeper than {StructuredOutput.MAX_DEPTH}, the most allowed"
            )
        level = [child for value in level for child in _children(value)]


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
