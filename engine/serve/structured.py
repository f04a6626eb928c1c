"""What a request says of its output's form, in OpenAI's, vLLM's and Anthropic's words.

Sources: the OpenAI API reference (`response_format`), vLLM's `structured_outputs`, the Anthropic
API reference (`output_config.format`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import UNSET, UnsetType, field

from ..core.parameter import ParameterError
from ..core.structured import StructuredOutput
from .bounds import NEVER, form, says
from .errors import ApiError
from .strict import Name, Strict

Schema = dict[str, Any]


class TextFormat(Strict, kw_only=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Strict, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(Strict, kw_only=True):
    """`strict` is read and not needed: a schema is always held to."""

    name: Name
    schema_: Schema | bool | None = field(name="schema", default=None)
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that the schema describes."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Strict, kw_only=True):
    """engineroom's own, and vLLM's: exactly one of them. `json` is a schema, or its text."""

    json: Schema | bool | Annotated[str, form("json_schema", 2)] | None = None
    json_object: bool | None = None
    regex: Annotated[str, form("regex")] | None = None
    choice: (
        Annotated[
            list[Annotated[str, form("choice")]],
            says(
                "Together no longer than one may be.",
                minItems=1,
                maxItems=StructuredOutput.MAX_CHOICES,
            ),
        ]
        | None
    ) = None
    grammar: Annotated[str, form("grammar")] | None = None


class OutputFormat(Strict, kw_only=True, tag_field="type", tag="json_schema"):
    """Anthropic's."""

    schema_: Schema = field(name="schema")


class OutputConfig(Strict, kw_only=True):
    """Anthropic's `output_config`."""

    format: OutputFormat | None = None
    effort: Annotated[str | None, NEVER] = None


def structured(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    """The form asked for; None for any text. Errors: ApiError naming the field."""
    asked = None if isinstance(response_format, TextFormat) else response_format
    with naming(asked_in(outputs)):
        if outputs is None:
            return _of_format(asked)
        if asked is None:
            return _of_outputs(outputs)
    raise ApiError(
        "invalid_value",
        "structured_outputs and response_format both give the output a form; send one",
        param="structured_outputs",
    )


def asked_in(outputs: StructuredOutputs | None) -> str:
    """The field of OpenAI's interface that gives the output its form."""
    return "response_format" if outputs is None else "structured_outputs"


@contextmanager
def naming(param: str) -> Iterator[None]:
    """What is wrong with a form is an ApiError naming the request's own field for it."""
    try:
        yield
    except ParameterError as error:
        if error.field != "structured":
            raise
        text = str(error).removeprefix("structured: ")
        raise ApiError("invalid_value", f"{param}: {text}", param=param) from None


def of_config(config: OutputConfig | None) -> StructuredOutput | None:
    """Anthropic's. Errors: ApiError naming the field."""
    if config is None:
        return None
    if config.effort is not None:
        raise ApiError(
            "unsupported",
            "output_config.effort: models served here have no such control",
            param="output_config.effort",
        )
    if config.format is None:
        return None
    with naming("output_config"):
        return StructuredOutput(json_schema=_text(config.format.schema_))


def _of_format(asked: JsonObjectFormat | JsonSchemaFormat | None) -> StructuredOutput | None:
    if isinstance(asked, JsonSchemaFormat):
        schema = asked.json_schema.schema_
        return StructuredOutput(json_schema=_text({} if schema is None else schema))
    return None if asked is None else StructuredOutput(json_object=True)


def complete(value: bool | None) -> bool | UnsetType:
    """CompletionOutput.complete as an answer shows it: left out where no form was asked for."""
    return UNSET if value is None else value


def _of_outputs(outputs: StructuredOutputs) -> StructuredOutput:
    schema = outputs.json
    return StructuredOutput(
        json_schema=schema if isinstance(schema, str) or schema is None else _text(schema),
        json_object=bool(outputs.json_object),
        regex=outputs.regex,
        choice=None if outputs.choice is None else tuple(outputs.choice),
        grammar=outputs.grammar,
    )


def _text(schema: Schema | bool) -> str:
    return json.dumps(schema, ensure_ascii=False)


__all__ = [
    "OutputConfig",
    "ResponseFormat",
    "StructuredOutputs",
    "asked_in",
    "complete",
    "naming",
    "of_config",
    "structured",
]
