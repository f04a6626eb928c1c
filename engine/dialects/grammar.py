"""A Lark grammar (llguidance's dialect) of answers whose tool calls obey their tools' schemas."""

from __future__ import annotations

import json
import re

from .formats import ToolFormat, Tools
from .reasoning import ReasoningFormat

# JSON as models write it in calls; white space without end would be one more way to go astray.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(
    tools: Tools,
    format: ToolFormat,
    *,
    required: bool,
    parallel: bool,
    content: str | None = None,
    reasoning: ReasoningFormat | None = None,
    inside: bool = False,
) -> str:
    """Text of the grammar. `format` has a shape. Markers are text: no token of it is special.

    required: the answer is calls; else it is text, which calls may follow, or with `content`, a
    JSON schema, either such JSON or calls (of a format with a marker). reasoning: thoughts may come
    first; inside: the prompt has opened them.
    """
    before, middle, after = format.shape or ("", "", "")
    opening, closing = format.around
    first, rules = opening + before, _thoughts(reasoning, inside)
    start = "thoughts" if reasoning is not None else ""
    for number, (name, schema) in enumerate(tools.items()):
        styled = json.dumps({**(schema or {"type": "object"}), "x-guidance": _STYLE})
        rules.append(f"body_{number}: {_quoted(name + middle)} %json {styled} {_quoted(after)}")
    rules.append("body: " + " | ".join(f"body_{number}" for number in range(len(tools))))
    more = f"({_quoted(format.between + before)} body)*" if parallel else ""
    rest = f"body {more} {_quoted(closing)}"
    if required:
        start += f" {_quoted(first)} {rest}"
    elif content is not None:
        start += f" (content | {_quoted(first)} {rest})"
        rules.append(f"content: %json {content}")
    elif format.marker:
        start += f" (TEXT | lead {_quoted(first.removeprefix(format.marker))} {rest})"
        marker = _escaped(format.marker)
        rules.append(f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{marker}(.|\\n)*/")
        rules.append(f"lead[lazy]: /(.|\\n)*{marker}/")
    else:  # a call is a whole text
        start += f" (TEXT | {_quoted(first)} {rest})"
        rules.append(f"TEXT: /(.|\\n)*/ & ~/{_escaped(first)}(.|\\n)*/")
    return "\n".join([f"start: {start}", *rules, ""])


def _thoughts(format: ReasoningFormat | None, inside: bool) -> list[str]:
    if format is None:
        return []
    said = "said" if inside else f"({_quoted(format.begin)} said)?"
    return [
        f"thoughts: {said} BLANK",
        f"said[lazy]: /(.|\\n)*{_escaped(format.end)}/",
        "BLANK: /[ \\n]{0,4}/",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    """As a regular expression: no more is escaped, for \\< means a word's beginning to Rust's."""
    return re.sub(r"([\[\]\\^$.|?*+(){}/])", r"\\\1", text)


__all__ = ["call_grammar"]
