"""One answer read while it grows: its thoughts, its text, its tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from .calls import CallParser
from .parts import CallArguments, CallBegin, Part, Reasoning, Text
from .reasoning import ThoughtsParser


class AnswerParser:
    """Thoughts first, where there is a parser for them; then text and calls, where there is one.

    `max_calls`: calls beyond them are left out, as where a caller wants no parallel ones.
    """

    def __init__(
        self,
        reasoning: ThoughtsParser | None,
        calls: CallParser | None,
        *,
        max_calls: int | None = None,
    ) -> None:
        self.reasoning = reasoning
        self._calls = calls
        self._max_calls = max_calls
        self.num_calls = 0

    def feed(self, text: str) -> list[Part]:
        """The parts that this piece of text makes certain."""
        if not text:
            return []
        return self._within(
            self._inner(self.reasoning.feed(text) if self.reasoning else [Text(text)])
        )

    def finish(self) -> list[Part]:
        """The rest: no text follows."""
        parts = self._inner(self.reasoning.finish() if self.reasoning else [])
        return self._within(parts + (self._calls.finish() if self._calls else []))

    def _inner(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += self._calls.feed(part.text) if isinstance(part, Text) else [part]
        return found

    def _within(self, parts: list[Part]) -> list[Part]:
        kept = []
        for part in parts:
            self.num_calls += isinstance(part, CallBegin)
            over = self._max_calls is not None and self.num_calls > self._max_calls
            if not over or isinstance(part, Text):
                kept.append(part)
        return kept


@dataclass
class Call:
    """One whole tool call."""

    name: str
    arguments: str = ""


@dataclass
class Answer:
    """All of an answer's parts together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] | None = None

    def add(self, parts: list[Part]) -> Answer:
        """This answer with more parts of it."""
        for part in parts:
            match part:
                case Text(text=text):
                    self.text += text
                case Reasoning(text=text):
                    self.reasoning += text
                case CallBegin(name=name):
                    self.calls = [*(self.calls or []), Call(name)]
                case CallArguments(text=text):
                    assert self.calls is not None  # a call has begun
                    self.calls[-1].arguments += text
        return self


def read_answer(parser: AnswerParser, text: str) -> Answer:
    """A whole answer at once."""
    return Answer().add(parser.feed(text)).add(parser.finish())


__all__ = ["Answer", "AnswerParser", "Call", "read_answer"]
