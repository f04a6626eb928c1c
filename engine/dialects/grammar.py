"""A Lark grammar (llguidance's dialect) of answers whose tool calls obey their tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

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
    rules = []
    for number, (name, schema) in enumerate(tools.items()):
        styled = json.dumps({**(schema or {"type": "object"}), "x-guidance": _STYLE})
        begin, end = writer.text(f"{before}{name}{middle}"), writer.text(after)
        rules.append(f"call_{number}: {begin} %json {styled} {end}")
    call = " | ".join(f"call_{number}" for number in range(len(rules)))
    repeat = f"({writer.text(format.between)} call)*" if parallel else ""
    opening, closing = map(writer.text, format.around)
    calls = f"calls: {opening} call {repeat} {closing}"
    if required:
        start = f"start: {thoughts} calls"
    else:
        first = format.around[0] or before
        start = f"start: {thoughts} (TEXT | TEXT calls)"
        writer.rules.append(f"TEXT: {writer.text_without(first)}")
    return "\n".join([start, *writer.rules, calls, f"call: {call}", *rules, ""])


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

    def text_without(self, first: str) -> str:
        """A terminal for texts that have no marker of a call."""
        if any(first.startswith(m) for m in self._special):
            return "/(.|\\n)*/"
        marker = _escaped(first.split("\n")[0])
        return f"/(.|\\n)*/ & ~/(.|\\n)*{marker}(.|\\n)*/"


def _escaped(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


__all__ = ["call_grammar"]
