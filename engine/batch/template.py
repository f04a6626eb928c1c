"""Prompts made of columns: "Summarise: {text}", filled with one row of a CSV or Parquet file."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.sampling_params import SamplingParams
from .errors import NOT_READ, BatchError, LineError
from .requests import CHAT, COMPLETIONS, BatchRequest, check_id

TABLES = ("csv", "parquet")  # formats whose rows have columns


class Template:
    """Text with names of columns in braces; {{ and }} are braces themselves.

    A name is a column and nothing else: no attribute, index, conversion or format is looked up.
    Errors: BatchError.
    """

    def __init__(self, option: str, text: str) -> None:
        """option: what the text was given as, for messages."""
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                if name == "":
                    raise ValueError("{} names no column")
                if spec or conversion:
                    raise ValueError(f"{{{name}...}} has a format or a conversion")
                self._parts.append((literal, name))
        except ValueError as error:
            raise BatchError(
                NOT_READ,
                f"{option}={text!r}: {error}. Write {{column}}, and {{{{ or }}}} for a brace",
            ) from None
        self.columns = tuple(dict.fromkeys(n for _, n in self._parts if n is not None))

    def fill(self, row: Mapping[str, str]) -> str:
        return "".join(literal + (row[n] if n is not None else "") for literal, n in self._parts)


@dataclass(frozen=True)
class Prompting:
    """How a line of text or a row of a table becomes a request; nothing of it for JSON lines.

    chat: the prompt is a user's message and goes through the chat template, after the system's.
    """

    prompt_template: str | None = None
    system_template: str | None = None
    id_column: str | None = None
    chat: bool = False

    def as_plain(self) -> dict[str, str | bool]:
        """What was asked for, for the manifest."""
        return {name: value for name, value in vars(self).items() if value}


PLAIN = Prompting()


class Prompts:
    """Makes the requests of a format that is not JSON lines.

    Errors: BatchError where the options do not go with the format.
    """

    def __init__(self, format: str, options: Prompting, params: SamplingParams) -> None:
        self._options = options
        self._params = params
        self._prompt = self._system = None
        if options.prompt_template is not None:
            self._prompt = Template("prompt_template", options.prompt_template)
        if options.system_template is not None:
            self._system = Template("system_template", options.system_template)
        _check(format, options)
        templates = [t for t in (self._prompt, self._system) if t is not None]
        names = [name for t in templates for name in t.columns]
        self.columns = tuple(dict.fromkeys([*names, *filter(None, [options.id_column])]))

    def request(self, row: bytes | Mapping[str, str], custom_id: str) -> BatchRequest:
        """custom_id: of a row that has none of its own. Errors: LineError."""
        if isinstance(row, bytes):
            return self._make(custom_id, _decoded(row.rstrip(b"\r\n"), custom_id), None)
        if self._options.id_column is not None:
            custom_id = check_id(row[self._options.id_column])
        prompt = "" if self._prompt is None else self._prompt.fill(row)
        system = None if self._system is None else self._system.fill(row)
        return self._make(custom_id, prompt, system)

    def _make(self, custom_id: str, prompt: str, system: str | None) -> BatchRequest:
        if not self._options.chat:
            return BatchRequest(custom_id, COMPLETIONS, self._params, prompt)
        said = [{"role": "user", "content": prompt}]
        if system is not None:
            said.insert(0, {"role": "system", "content": system})
        return BatchRequest(custom_id, CHAT, self._params, messages=tuple(said))


def _check(format: str, options: Prompting) -> None:
    given = options.as_plain()
    if format == "jsonl" and given:
        raise BatchError(
            NOT_READ, f"{', '.join(given)} and JSON lines: a line of them is a whole request"
        )
    if format == "text" and given.keys() - {"chat"}:
        raise BatchError(
            NOT_READ,
            f"{', '.join(given)} and format=text: plain lines have no columns; only chat goes "
            "with them",
        )
    if format in TABLES and options.prompt_template is None:
        raise BatchError(
            NOT_READ,
            f'format={format} needs a prompt template over its columns, such as "Summarise: '
            '{text}" (--prompt-template)',
        )
    if options.system_template is not None and not options.chat:
        raise BatchError(NOT_READ, "a system template is a message of a chat: it needs --chat")


def _decoded(line: bytes, custom_id: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"the line is not UTF-8: {error}", custom_id=custom_id) from None


__all__ = ["PLAIN", "TABLES", "Prompting", "Prompts", "Template"]
