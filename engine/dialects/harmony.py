"""Harmony, gpt-oss's form of an answer: messages of channels, each with a header of its own.

`<|channel|>analysis<|message|>…<|end|>` is thought, `final` and `commentary` are for the user, and
a message whose header has `to=functions.NAME` calls a tool with its JSON; the next message begins
with `<|start|>assistant`. Source: OpenAI's harmony response format and gpt-oss's chat template.
"""

from __future__ import annotations

import re

from .parts import SPACE, Parser, Part, Reasoning, Steps, Text, held_back

MARKERS = (
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|start|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
CALL = "<|channel|>commentary to=functions."  # and a tool's name: how a call is passed on
HEAD = re.compile(r"\s*(?P<name>[\w.:/-]{1,128})\s*(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>\s*")

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_TOOL = re.compile(r"\bto=functions\.([\w.:/-]{1,128})")
_BEGINS = ("<|channel|>", "<|start|>", "<|constrain|>", "<|message|>", "to=")  # of a header
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")  # of a message
_MAX_HEADER = 512  # characters; what is longer is no header


class HarmonyParser(Parser):
    """Thoughts are Reasoning; what the user is to see is Text, and so are calls, which a CallParser
    reads of it: CALL, the name, `<|constrain|>json<|message|>`, the arguments, `<|call|>`.

    `inside`: the prompt has opened a message of thoughts. Text without a header is for the user. A
    message is set off from an earlier one of its kind by an empty line.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self.closed = False  # the end of a message of thoughts was read
        self.found = inside
        self._said: set[type[Part]] = set()
        self._opens = False  # what is said next is a message's beginning
        super().__init__()

    def _run(self) -> Steps[None]:
        if self._inside:
            yield from self._message("analysis", "")
        while (yield from self._peek()):
            yield from self._skip_space()
            self._read()
            header = yield from self._header()
            channel, tool = _CHANNEL.search(header), _TOOL.search(header)
            yield from self._message(channel[1] if channel else "", tool[1] if tool else "")

    def _header(self) -> Steps[str]:
        """Read a message's header; "" where there is none. One that the text's end cut is read."""
        if not (yield from self._expect(*_BEGINS)):
            return ""
        while True:
            end = self._text.find("<|message|>")
            if 0 <= end <= _MAX_HEADER:
                self._at = end + len("<|message|>")
                return self._read()
            if len(self._text) > _MAX_HEADER + len("<|message|>"):
                self._at = _MAX_HEADER
                self._say(Text, self._read())
                return ""
            if not (yield from self._more()):
                self._at = len(self._text) if self._text.startswith("<|") else 0
                return self._read()

    def _message(self, channel: str, tool: str) -> Steps[None]:
        """Pass on a message whose header was read, and read what ends it."""
        thinks = channel == "analysis" and not tool
        self.found |= thinks
        if tool:
            self._parts.append(Text(f"{CALL}{tool} <|constrain|>json<|message|>"))
        yield from self._skip_space()
        self._read()
        self._opens = not tool
        while True:
            at = min((i for end in _ENDS if (i := self._text.find(end)) >= 0), default=-1)
            # White space before an end is not said, so it waits with what may be the end.
            whole = self._text[: at if at >= 0 else len(self._text) - held_back(self._text, _ENDS)]
            said = whole.rstrip(SPACE)
            self._at = at if at >= 0 else len(said)
            self._read()
            self._say(Reasoning if thinks else Text, said)
            if at >= 0:
                break
            if not (yield from self._more()):
                self._at = len(self._text)
                self._say(Reasoning if thinks else Text, self._read().rstrip(SPACE))
                return
        if not self._text.startswith(("<|start|>", "<|channel|>")):  # else the end is missing
            yield from self._expect(*_ENDS)
            self._read()
        self.closed |= thinks
        if tool:
            self._parts.append(Text("<|call|>"))

    def _say(self, kind: type[Text] | type[Reasoning], text: str) -> None:
        if text:
            gap = "\n\n" if self._opens and kind in self._said else ""
            self._parts.append(kind(gap + text))
            if self._opens:
                self._said.add(kind)
            self._opens = False


__all__ = ["CALL", "HEAD", "MARKERS", "HarmonyParser"]
