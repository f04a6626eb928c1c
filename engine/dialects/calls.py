"""Tool calls in a growing text, one parser per shape that families of models write them in.

All of them: text outside of calls is Text, less the white space around calls; a call begins where
its name and the beginning of its arguments are well-formed, and what is not is given back as Text,
markers and all. From there its arguments are passed on as the model writes them.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from .parts import SPACE, CallArguments, CallBegin, Parser, Steps, Text, held_back

_WORD = re.compile(r"[\w.:/-]{1,128}")
_BARE = frozenset(" \t\r\n,:+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class JsonScan:
    """Finds the end of a JSON object or array in text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False
        self.closed = False
        self.broken = False  # met what no JSON has outside of strings

    def feed(self, text: str) -> int:
        """How many characters of the text belong to the value."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return index + 1
            elif char not in _BARE:
                self.broken = True
                return index
        return len(text)


class CallParser(Parser):
    """Text, and calls that begin with one of `begins`; `drops` are markers around several calls."""

    def __init__(self, begins: Sequence[str], drops: Sequence[str] = ()) -> None:
        self._begins = tuple(begins)
        self._drops = tuple(drops)
        self._gap = ""  # white space, said when text follows it
        self._after_call = False
        super().__init__()

    def _run(self) -> Steps[None]:
        yield from self._start()
        while marker := (yield from self._pass_text()):
            if marker in self._drops:
                self._read()
                self._gap, self._after_call = "", True
            elif not (yield from self._call(marker)):
                self._at = len(marker)
                self._say(self._read())
        if not self._after_call and self._gap:
            self._parts.append(Text(self._gap))

    def _start(self) -> Steps[None]:
        """What may only stand at the beginning of the text."""
        yield from ()

    @abstractmethod
    def _call(self, marker: str) -> Steps[bool]:
        """Read a call whose marker was read. False: it is none, and no part was made of it."""

    def _pass_text(self) -> Steps[str]:
        """Say text up to a marker, and read that; "" at the end."""
        markers = self._begins + self._drops
        while True:
            found = [(i, m) for m in markers if (i := self._text.find(m)) >= 0]
            if found:
                at, marker = min(found)
                self._at = at
                self._say(self._read())
                self._at = len(marker)
                return marker
            keep = held_back(self._text, markers)
            if self._ended and keep == len(self._text) and self._after_call:
                self._text = ""  # the end cut the marker of one more call, or around them all
            self._at = len(self._text) - (0 if self._ended else keep)
            self._say(self._read())
            if not (yield from self._more()) and not self._text:
                return ""

    def _say(self, text: str) -> None:
        text = self._gap + text
        said = text.rstrip(SPACE)
        self._gap = text[len(said) :]
        if said:
            self._parts.append(Text(said))
            self._after_call = False

    # ---------------------------------------------------------------------------------- a call

    def _begin(self, name: str) -> None:
        self._gap, self._after_call = "", True
        self._parts.append(CallBegin(name))

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(CallArguments(text))

    def _word(self) -> Steps[str]:
        start = self._at
        while (yield from self._peek()) and _WORD.fullmatch(self._text[start : self._at + 1]):
            self._at += 1
        return self._text[start : self._at]

    def _arguments(self) -> Steps[bool]:
        """Pass on a JSON object from the cursor. False where it broke; its end is no break."""
        self._read()
        scan = JsonScan()
        while True:
            self._at = scan.feed(self._text)
            self._argue(self._read())
            if scan.closed or scan.broken or not (yield from self._more()):
                return not scan.broken

    def _value(self, depth: int = 0) -> Steps[bool]:
        """Read one JSON object or array, or what closes it. False where it is none or is cut."""
        scan = JsonScan(depth)
        while True:
            self._at += scan.feed(self._text[self._at :])
            if scan.closed or scan.broken or not (yield from self._more()):
                return scan.closed

    def _ending(self, *choices: str) -> Steps[str]:
        """As _expect(); of a marker that the text's end cut the beginning is read too."""
        got = yield from self._expect(*choices)
        rest = self._text[self._at :]
        if not got and rest and self._ended and any(c.startswith(rest) for c in choices):
            self._at = len(self._text)
        return got

    def _closing(self, end: str, sound: bool) -> Steps[None]:
        """Read what follows the arguments: broken ones go on to the end marker as they are."""
        if not sound and end:
            yield from self._find(end, *self._begins)
            self._argue(self._read().rstrip(SPACE))
        yield from self._skip_space()
        if end:
            yield from self._ending(end)
        self._read()


class JsonCalls(CallParser):
    """`{"name": …, "arguments": {…}}`, or a list of them, between two markers.

    `end` may be "" where nothing ends a call but its own brace. `bare`: names of tools whose calls
    may also be a whole text without a marker, several of them apart by ";" (Llama 3).
    """

    def __init__(
        self,
        begins: Sequence[str],
        end: str = "",
        *,
        bare: Collection[str] = (),
        drops: Sequence[str] = (),
    ) -> None:
        self._end = end
        self._bare = frozenset(bare)
        super().__init__(begins, drops)

    def _start(self) -> Steps[None]:
        if not self._bare:
            return
        yield from self._skip_space()
        if (yield from self._peek()) != "{" or not (yield from self._one("", self._bare)):
            self._at = 0
            return
        while (yield from self._another(";")):
            pass

    def _call(self, marker: str) -> Steps[bool]:
        yield from self._skip_space()
        if (yield from self._expect("[")):
            return (yield from self._list())
        if not (yield from self._one(self._end)):
            return False
        while not self._end and (yield from self._another(";")):
            pass
        return True

    def _list(self) -> Steps[bool]:
        if not (yield from self._one("")):
            return False
        while (yield from self._another(",")):
            pass
        yield from self._skip_space()
        yield from self._expect("]")
        yield from self._closing(self._end, True)
        return True

    def _another(self, separator: str) -> Steps[bool]:
        """One more call behind a separator; where there is none the text goes on as text."""
        yield from self._skip_space()
        if (yield from self._expect(separator)):
            yield from self._skip_space()
            if (yield from self._peek()) == "{" and (yield from self._one("")):
                return True
        self._at = 0
        return False

    def _one(self, end: str, names: Collection[str] = ()) -> Steps[bool]:
        start = self._at
        name = yield from self._header()
        if name and names and name not in names:
            return False
        if not name or (yield from self._peek()) != "{":
            self._at = start
            return (yield from self._whole(end, names))
        self._begin(name)
        sound = yield from self._arguments()
        if sound:
            yield from self._value(depth=1)  # an id, and the brace of the call itself
        yield from self._closing(end, sound)
        return True

    def _header(self) -> Steps[str]:
        """`{"name": "…", "arguments":`; "" where anything else stands."""
        name = ""
        steps = ('"name"', '"tool_name"'), (":",), ('"',), (), ('"',), (",",)
        yield from self._skip_space()
        if not (yield from self._expect("{")):
            return ""
        yield from self._skip_id()
        for step in (*steps, ('"arguments"', '"parameters"'), (":",)):
            if not step:
                name = yield from self._word()
                continue
            if step != ('"',) or not name:
                yield from self._skip_space()
            if not (yield from self._expect(*step)):
                return ""
        yield from self._skip_space()
        return name

    def _skip_id(self) -> Steps[None]:
        """`"tool_call_id": "…",`, which Cohere's models put first."""
        start = self._at
        for step in ('"tool_call_id"', ":", '"', "", '"', ","):
            if step:
                yield from self._skip_space()
                found = yield from self._expect(step)
            else:
                found = yield from self._word()
            if not found:
                self._at = start
                return

    def _whole(self, end: str, names: Collection[str]) -> Steps[bool]:
        """A call in any other order, or with arguments as a string: read when it is complete."""
        start = self._at
        if end:
            found = yield from self._find(end)
        else:
            found = ""
            yield from self._value()
        calls = _calls(self._text[start : self._at])
        if calls is None or (names and not all(name in names for name, _ in calls)):
            return False
        for name, arguments in calls:
            self._begin(name)
            self._argue(arguments)
        self._at += len(found)
        self._read()
        return True


def _calls(text: str) -> list[tuple[str, str]] | None:
    """Names and arguments of the calls in a JSON text; None where it has none, or others too."""
    try:
        value = json.loads(text)
        found = [_named(c) for c in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    return found or None


def _named(call: Any) -> tuple[str, str]:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name", call.get("tool_name")) if isinstance(call, dict) else None
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise ValueError
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict | None):
        raise ValueError
    return name, json.dumps(arguments or {}, ensure_ascii=False)


class NamedCalls(JsonCalls):
    """The name, something between, and a JSON object of arguments: DeepSeek, Kimi, newer Mistral.

    `head` matches all between the marker and the object's brace; its group `name` is the tool.
    `lists`: a `[` behind the marker begins a list as JsonCalls has it (older Mistral).
    """

    def __init__(
        self,
        begins: Sequence[str],
        head: re.Pattern[str],
        end: str = "",
        *,
        drops: Sequence[str] = (),
        fence: str = "",
        lists: bool = False,
    ) -> None:
        self._head = head
        self._fence = fence
        self._lists = lists
        super().__init__(begins, end, drops=drops)

    def _call(self, marker: str) -> Steps[bool]:
        start = self._at
        yield from self._skip_space()
        if self._lists and (yield from self._expect("[")):
            return (yield from self._list())
        stop = yield from self._find("{", *self._begins)
        match = self._head.fullmatch(self._text[start : self._at])
        if stop != "{" or match is None:
            return False
        self._begin(match["name"])
        sound = yield from self._arguments()
        if self._fence:
            yield from self._skip_space()
            yield from self._ending(self._fence)
        yield from self._closing(self._end, sound)
        return True


__all__ = ["CallParser", "JsonCalls", "JsonScan", "NamedCalls"]
