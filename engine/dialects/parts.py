"""What an answer's text is made of, and the base of the parsers that find it while it grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Text:
    """Content for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A tool call; every CallArguments up to the next CallBegin belongs to it."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the call's arguments: together JSON, unless the model slipped or was cut."""

    text: str


Part = Text | Reasoning | CallBegin | CallArguments
_T = TypeVar("_T")
Steps = Generator[None, None, _T]  # suspended while it needs text that has not come
SPACE = " \t\r\n"


class Parser(ABC):
    """Finds parts in a text that comes in pieces. What it returned is never taken back.

    How the text falls into pieces changes how texts and arguments fall into parts and nothing
    else. It is written as one coroutine: `_text[_at:]` is unread, `_text[:_at]` may be given back.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._parts: list[Part] = []
        self._steps = self._run()
        next(self._steps, None)

    def feed(self, text: str) -> list[Part]:
        """The parts that this piece of text makes certain."""
        self._text += text
        next(self._steps, None)
        return self._taken()

    def finish(self) -> list[Part]:
        """The rest: no text follows."""
        self._ended = True
        next(self._steps, None)
        return self._taken()

    @abstractmethod
    def _run(self) -> Steps[None]:
        """Read to the end of the text."""

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # ------------------------------------------------------------------- reading, for subclasses

    def _more(self) -> Steps[bool]:
        """Wait for text; False at its end."""
        if self._ended:
            return False
        size = len(self._text)
        while len(self._text) == size and not self._ended:
            yield
        return len(self._text) > size

    def _peek(self) -> Steps[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text):
            if not (yield from self._more()):
                return ""
        return self._text[self._at]

    def _skip_space(self) -> Steps[None]:
        while (char := (yield from self._peek())) and char in SPACE:
            self._at += 1

    def _expect(self, *choices: str) -> Steps[str]:
        """Read the first of `choices` that comes next, the longest first; "" where none does."""
        ranked = sorted(choices, key=len, reverse=True)
        while True:
            rest = self._text[self._at :]
            open_ = [c for c in ranked if c.startswith(rest)] if not self._ended else []
            for choice in ranked:
                if rest.startswith(choice):
                    if any(len(c) > len(choice) for c in open_):
                        break  # a longer one may still come
                    self._at += len(choice)
                    return choice
            if not open_:
                return ""
            yield from self._more()

    def _find(self, *markers: str) -> Steps[str]:
        """Read up to the first of `markers` and leave it unread; "" at the end of the text."""
        longest = max(map(len, markers))
        while True:
            found = [(i, m) for m in markers if (i := self._text.find(m, self._at)) >= 0]
            if found:
                self._at, marker = min(found)
                return marker
            if self._ended:
                self._at = len(self._text)
                return ""
            self._at = max(self._at, len(self._text) - longest + 1)
            yield from self._more()

    def _read(self) -> str:
        """Take what lies before the cursor; it can be given back no more."""
        taken, self._text, self._at = self._text[: self._at], self._text[self._at :], 0
        return taken


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many of the last characters could be the beginning of a marker."""
    longest = max(map(len, markers), default=1)
    for size in range(min(longest - 1, len(text)), 0, -1):
        end = text[-size:]
        if any(m.startswith(end) for m in markers):
            return size
    return 0


__all__ = [
    "SPACE",
    "CallArguments",
    "CallBegin",
    "Parser",
    "Part",
    "Reasoning",
    "Steps",
    "Text",
    "held_back",
]
