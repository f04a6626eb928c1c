"""The thoughts of an answer, apart from the answer: `<think>` and its like."""

from __future__ import annotations

from dataclasses import dataclass

from . import harmony
from .parts import SPACE, Parser, Reasoning, Steps, Text, held_back


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers around a model's thoughts.

    `messages`: the whole answer is messages with headers, thoughts being one kind (harmony.py).
    `key`: under which a template looks for the thoughts of an earlier message without content.
    `after`: what stands between thoughts and the rest.
    """

    name: str
    begin: str
    end: str
    messages: bool = False
    key: str = "reasoning_content"
    after: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be special tokens, and is needed to read an answer."""
        return harmony.MARKERS if self.messages else (self.begin, self.end)

    def is_of(self, template: str) -> bool:
        """Whether a chat template is of this format: its markers are there."""
        return self.begin in template or (self.end in template and not self.messages)

    def parser(self, *, inside: bool) -> ThoughtsParser:
        """`inside`: the prompt has opened thoughts."""
        if self.messages:
            return harmony.HarmonyParser(inside=inside)
        return ReasoningParser(self, inside=inside)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside thoughts: its template wrote the opening marker itself."""
        _, found, after = prompt.rpartition(self.begin)
        return bool(found) and not after.strip()


REASONING_FORMATS = {
    f.name: f
    for f in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
        ReasoningFormat(
            "harmony",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            messages=True,
            key="thinking",
            after="<|start|>assistant",
        ),
        ReasoningFormat("command", "<|START_THINKING|>", "<|END_THINKING|>"),
    )
}


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The format whose markers a chat template has; None where it has none."""
    for found in reversed(REASONING_FORMATS.values()):
        if found.is_of(template):
            return found
    return None


class ReasoningParser(Parser):
    """Thoughts at the beginning of a text are Reasoning, all that follows them is Text.

    `inside`: the prompt has opened them already. White space around thoughts belongs to neither.
    """

    def __init__(self, format: ReasoningFormat, *, inside: bool) -> None:
        self._format = format
        self._inside = inside
        self.closed = False  # the end of the thoughts was read
        self.found = inside
        super().__init__()

    def _run(self) -> Steps[None]:
        if not self._inside:
            yield from self._skip_space()
            self._inside = self.found = bool((yield from self._expect(self._format.begin)))
            if self._inside:
                self._read()
            else:
                self._at = 0
        if self._inside:
            yield from self._thoughts()
            yield from self._skip_space()
            self._read()
        while True:
            if self._text:
                self._at = len(self._text)
                self._parts.append(Text(self._read()))
            if not (yield from self._more()):
                return

    def _thoughts(self) -> Steps[None]:
        end = self._format.end
        yield from self._skip_space()
        self._read()
        while True:
            found = self._text.find(end)
            if found >= 0:
                self._say(self._text[:found].rstrip(SPACE))
                self._at = found + len(end)
                self._read()
                self.closed = True
                return
            # White space before the marker is not said, so it waits with what may be the marker.
            keep = held_back(self._text, (end,))
            said = self._text[: len(self._text) - keep].rstrip(SPACE)
            self._at = len(said)
            self._say(self._read())
            if not (yield from self._more()):
                self._at = len(self._text)
                self._say(self._read())
                return

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text))


ThoughtsParser = ReasoningParser | harmony.HarmonyParser

__all__ = [
    "REASONING_FORMATS",
    "ReasoningFormat",
    "ReasoningParser",
    "ThoughtsParser",
    "reasoning_format_of",
]
