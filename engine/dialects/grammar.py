"""A Lark grammar (llguidance's dialect) of answers whose tool calls obey their tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

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
    reasoning: ReasoningFormat | None = None,
    inside: bool = False,
    special: Mapping[str, int] | None = None,
) -> str:
    """Text of the grammar. `format` has a shape.

    required: the answer is calls; else it is text, which calls may follow. reasoning: thoughts may
    come first; inside: the prompt has opened them. special: markers that are special tokens -> id.
    """
    writer = _Writer(dict(special or {}))
    thoughts = writer.thoughts(reasoning, inside) if reasoning is not None else ""
    before, middle, after = format.shape or ("", "", "")
    opening, closing = format.around
    rules = []
    for number, (name, schema) in enumerate(tools.items()):
        styled = json.dumps({**(schema or {"type": "object"}), "x-guidance": _STYLE})
        rules.append(
            f"body_{number}: {writer.text(name + middle)} %json {styled} {writer.text(after)}"
        )
    body = " | ".join(f"body_{number}" for number in range(len(rules)))
    more = f"({writer.text(format.between + before)} body)*" if parallel else ""
    rest = f"body {more} {writer.text(closing)}"
    first = opening + before
    if required:
        start = f"{thoughts} {writer.text(first)} {rest}"
    else:
        start = f"{thoughts} (TEXT | {writer.text_up_to(first, format.markers)} {rest})"
    return "\n".join([f"start: {start}", *writer.rules, f"body: {body}", *rules, ""])


class _Writer:
    """Texts as the grammar spells them: special tokens by id, the rest quoted."""

    def __init__(self, special: dict[str, int]) -> None:
        self._special = special
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        if not text:
            return ""
        pattern = "|".join(re.escape(m) for m in sorted(self._special, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text) if pattern else [text]
        return " ".join(
            f"<[{self._special[p]}]>" if p in self._special else json.dumps(p, ensure_ascii=False)
            for p in pieces
            if p
        )

    def thoughts(self, format: ReasoningFormat, inside: bool) -> str:
        if format.end in self._special:  # a special token is no text, so text ends before it
            self.rules.append(f"thoughts: /(.|\\n)*/ {self.text(format.end)}")
        else:
            self.rules.append(f"thoughts[lazy]: /(.|\\n)*{_escaped(format.end)}/")
        self.rules.append("BLANK: /[ \\n]{0,4}/")
        whole = "thoughts" if inside else f"({self.text(format.begin)} thoughts)?"
        return f"{whole} BLANK"

    def text_up_to(self, first: str, markers: Sequence[str]) -> str:
        """Any text, and `first` behind it; defines TEXT, which has no marker of a call."""
        marker = next((m for m in markers if first.startswith(m)), None)
        if marker in self._special:  # which no regular expression matches
            self.rules.append("TEXT: /(.|\\n)*/")
            return f"TEXT {self.text(first)}"
        if marker is None:  # only a whole text is a call
            self.rules.append(f"TEXT: /(.|\\n)*/ & ~/{_escaped(first)}(.|\\n)*/")
            return self.text(first)
        self.rules.append(f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{_escaped(marker)}(.|\\n)*/")
        self.rules.append(f"lead[lazy]: /(.|\\n)*{_escaped(marker)}/")
        return f"lead {self.text(first.removeprefix(marker))}"


def _escaped(text: str) -> str:
    """As a regular expression: no more is escaped, for \\< means a word's beginning to Rust's."""
    return re.sub(r"([\[\]\\^$.|?*+(){}/])", r"\\\1", text)


__all__ = ["call_grammar"]
