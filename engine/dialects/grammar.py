"""A Lark grammar (llguidance's dialect) of answers whose tool calls obey their tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .formats import ToolFormat, Tools
from .parameters import Fields, kinds_of, resolved
from .reasoning import ReasoningFormat

# JSON as models write it in calls; white space without end would be one more way to go astray.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEFINITIONS = ("$defs", "definitions")
# What arguments that are no JSON object can be held to, and what says nothing of them.
_READ = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}
_SILENT = {"title", "description", "$schema", "$id", "$comment", "examples", "default"}
_ANY = "/(.|\\n)*/"


def call_grammar(
    tools: Tools,
    format: ToolFormat,
    *,
    required: bool,
    parallel: bool,
    content: str | None = None,
    reasoning: ReasoningFormat | None = None,
    inside: bool = False,
    special: Mapping[str, int] | None = None,
) -> str:
    """Text of the grammar.

    required: the answer is calls; else it is text, which calls may follow, or with `content`, a
    JSON schema, either such JSON or calls (of a format with a marker). reasoning: thoughts may come
    first; inside: the prompt has opened them. special: markers that are one special token of the
    model, and its id; all others are text. Errors: ValueError for a tool whose parameters cannot
    be written in the format.
    """
    before, middle, after = format.shape
    opening, closing = format.around
    first, text = opening + before, _Text(dict(special or {}))
    rules = _thoughts(reasoning, inside, text)
    start = "thoughts" if reasoning is not None else ""
    for number, (name, schema) in enumerate(tools.items()):
        if format.fields is None:
            arguments = _json(schema or {"type": "object"})
        else:
            fields = _FieldRules(format.fields, name, schema or {}, f"p{number}", text)
            arguments = fields.make()
            rules += fields.rules
        rules.append(f"body_{number}: {text.of(name + middle)} {arguments} {text.of(after)}")
    rules.append("body: " + " | ".join(f"body_{number}" for number in range(len(tools))))
    more = f"({text.of(format.between + before)} body)*" if parallel else ""
    rest = f"body {more} {text.of(closing)}"
    marker = format.marker
    if required:
        start += f" {text.of(first)} {rest}"
    elif content is not None:
        start += f" (content | {text.of(first)} {rest})"
        rules.append(f"content: %json {content}")
    elif marker in text.special:
        start += f" TEXT ({text.of(first)} {rest})?"
        rules.append(f"TEXT: {_ANY}")
    elif marker:
        start += f" (TEXT | lead {text.of(first.removeprefix(marker))} {rest})"
        rules.append(f"TEXT: {_ANY} & ~/(.|\\n)*{_escaped(marker)}(.|\\n)*/")
        rules.append(f"lead[lazy]: /(.|\\n)*{_escaped(marker)}/")
    else:  # a call is a whole text
        start += f" (TEXT | {text.of(first)} {rest})"
        rules.append(f"TEXT: {_ANY} & ~/{_escaped(first)}(.|\\n)*/")
    return "\n".join([f"start: {start}", *rules, ""])


@dataclass(frozen=True)
class _Text:
    """Literal text as terms of a grammar, in which some markers are tokens."""

    special: Mapping[str, int]

    def of(self, text: str) -> str:
        pattern = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if pattern else [text]
        terms = [
            f"<[{self.special[p]}]>" if p in self.special else json.dumps(p, ensure_ascii=False)
            for p in parts
            if p
        ]
        return " ".join(terms)

    def up_to(self, name: str, marker: str) -> list[str]:
        """The rule `name`: any text, and the marker that ends it."""
        if marker in self.special:
            return [f"{name}: ANY {self.of(marker)}", f"ANY: {_ANY}"]
        return [f"{name}[lazy]: /(.|\\n)*{_escaped(marker)}/"]


def _thoughts(format: ReasoningFormat | None, inside: bool, text: _Text) -> list[str]:
    if format is None:
        return []
    said = f"said {text.of(format.after)}".strip()
    said = said if inside else f"({text.of(format.begin)} {said})?"
    return [f"thoughts: {said} BLANK", *text.up_to("said", format.end), "BLANK: /[ \\n]{0,4}/"]


@dataclass
class _FieldRules:
    """The rules of one tool's arguments, a parameter behind the other in its schema's order."""

    fields: Fields
    tool: str
    schema: dict[str, Any]
    prefix: str
    text: _Text
    rules: list[str] = field(default_factory=list)

    def make(self) -> str:
        """The term that stands for them. Errors: ValueError."""
        properties, required = self._checked()
        if not properties and self.schema.get("additionalProperties") is not False:
            return self._free()
        parameters = []
        for number, (name, schema) in enumerate(properties.items()):
            key = self.text.of(self.fields.key + name + self.fields.value)
            value = self._value(schema, f"{self.prefix}_{number}")
            parameters.append((f"{key} {value}", name in required))
        # From the back: what may follow the first parameter that is there, and what may be first.
        following = heading = '""'
        between = self.text.of(self.fields.between)
        for number, (written, needed) in reversed(list(enumerate(parameters))):
            rest, head = f"{self.prefix}_rest_{number}", f"{self.prefix}_head_{number}"
            this = f"{between} {written} {following}"
            self.rules.append(f"{rest}: {this}" + ("" if needed else f" | {following}"))
            this = f"{written} {following}"
            self.rules.append(f"{head}: {this}" + ("" if needed else f" | {heading}"))
            following, heading = rest, head
        return heading

    def _checked(self) -> tuple[dict[str, Any], set[str]]:
        schema = self.schema
        unknown = set(schema) - _READ - _SILENT
        if unknown or schema.get("type", "object") != "object":
            what = ", ".join(sorted(unknown)) or f"type {schema.get('type')!r}"
            raise ValueError(
                f"the parameters of {self.tool} have {what}; calls of this format can only be held "
                "to an object's properties, required and additionalProperties"
            )
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        for name in properties:
            if not re.fullmatch(r"\w+" if self.fields.quoted else r"[^<>\n]+", name):
                raise ValueError(
                    f"calls of this format cannot name {self.tool}'s parameter {name!r}"
                )
        if not required <= set(properties):
            lacks = ", ".join(sorted(required - set(properties)))
            raise ValueError(f"{self.tool} requires {lacks}, which is not among its properties")
        return properties, required

    def _free(self) -> str:
        """Any parameters."""
        name, fields = f"{self.prefix}_any", self.fields
        value = self._value({} if fields.quoted else {"type": "string"}, name)
        self.rules += [
            f"{name}: {self.text.of(fields.key)} NAME {self.text.of(fields.value)} {value}",
            "NAME: /[a-zA-Z_][a-zA-Z0-9_]{0,63}/",
        ]
        return f"({name} ({self.text.of(fields.between)} {name})*)?"

    def _value(self, schema: Any, name: str) -> str:
        fields, of = self.fields, self.text.of
        after = of(fields.pad + fields.end + fields.tail)
        schema = resolved(schema, self.schema)
        wanted = schema if isinstance(schema, dict) else {}
        kinds = kinds_of(wanted)
        if fields.quoted and kinds == ["boolean"]:
            return f'("True" | "False") {after}'
        if fields.quoted or "string" not in kinds:
            shared = {k: self.schema[k] for k in _DEFINITIONS if k in self.schema}
            return f"{_json({**wanted, **shared})} {after}"
        choices = [wanted["const"]] if "const" in wanted else wanted.get("enum")
        if choices is not None:
            texts = [of(c) or '""' for c in choices if isinstance(c, str)]
            return f"({' | '.join(texts)}) {after}"
        if {"minLength", "maxLength", "pattern"} & set(wanted):
            self.rules.append(f"T_{name.upper()}: {_limited(wanted)}")
            return f"T_{name.upper()} {after}"
        stops = "|".join(map(_escaped, fields.stops))
        self.rules.append(
            f"t_{name}[lazy]: /(.|\\n)*{_escaped(fields.end)}/ & ~/(.|\\n)*({stops})(.|\\n)*/"
        )
        return f"t_{name} {of(fields.tail)}"


def _limited(schema: Mapping[str, Any]) -> str:
    """A text of one line without `<`, as long as the schema says and of its pattern."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    found = f"/[^<\\n]{{{least},{most}}}/"
    if "pattern" in schema:
        pattern = str(schema["pattern"])
        begin = "" if pattern.startswith("^") else r"[^<\n]*"
        end = "" if pattern.endswith("$") else r"[^<\n]*"
        inner = pattern.removeprefix("^").removesuffix("$")
        inner = re.sub(r"(\\.)|/", lambda m: m[1] or r"\/", inner, flags=re.DOTALL)
        found += f" & /{begin}({inner}){end}/"
    return found


def _json(schema: Any) -> str:
    styled = {**schema, "x-guidance": _STYLE} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(styled)}"


def _escaped(text: str) -> str:
    """As a regular expression: no more is escaped, for \\< means a word's beginning to Rust's."""
    return re.sub(r"([\[\]\\^$.|?*+(){}/])", r"\\\1", text)


__all__ = ["call_grammar"]
