"""Calls whose arguments are no JSON object: one parameter is written behind the other."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calls import CallParser
from .parts import Steps, held_back


@dataclass(frozen=True)
class Fields:
    """How one parameter is written: `key`, its name, `value`, its value, `pad`, `end`, `tail`.

    `between`: two of them. `stops`: what a text cannot hold besides `end`. quoted: values are
    Python's literals; else a text stands as it is and all other values as JSON.
    """

    key: str
    value: str
    pad: str = ""
    end: str = ""
    tail: str = ""
    between: str = ""
    stops: tuple[str, ...] = ()
    quoted: bool = False

    def write(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as a model would write them."""
        after = self.pad + self.end + self.tail
        return self.between.join(
            f"{self.key}{name}{self.value}{self._written(value)}{after}"
            for name, value in arguments.items()
        )

    def _written(self, value: Any) -> str:
        if isinstance(value, str) and not self.quoted:
            return value
        named = self.quoted and (value is None or isinstance(value, bool))
        return repr(value) if named else json.dumps(value, ensure_ascii=False)


class FieldCalls(CallParser):
    """Arguments given on a parameter at a time, each when it is complete."""

    def __init__(self, begins: tuple[str, ...], tools: Mapping[str, Any]) -> None:
        self._tools = tools
        self._separator = ""
        super().__init__(begins)

    def _open(self, name: str) -> None:
        self._begin(name)
        self._argue("{")
        self._separator = ""
        self._read()

    def _give(self, key: str, value: Any) -> None:
        self._argue(f"{self._separator}{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
        self._separator = ", "

    def _schema(self, name: str, key: str) -> Any:
        tool = self._tools.get(name) or {}
        properties = tool.get("properties")
        return resolved(properties.get(key), tool) if isinstance(properties, dict) else None


class XmlCalls(FieldCalls):
    """`<function=NAME><parameter=KEY>VALUE</parameter>…</function>`: Qwen3-Coder and its like.

    Values are text; `tools`, name -> JSON schema of its parameters, says which are something else.
    """

    _function = "<function="
    _parameter = "<parameter="
    _close = "</function>"

    def __init__(self, wrapper: tuple[str, str], tools: Mapping[str, Any]) -> None:
        self._wrapper = wrapper
        super().__init__(tuple(dict.fromkeys((wrapper[0], self._function))), tools)

    def _call(self, marker: str) -> Steps[bool]:
        name = yield from self._head(marker)
        if not name:
            return False
        self._open(name)
        while True:
            yield from self._skip_space()
            got = yield from self._ending(self._parameter, self._close)
            if got != self._parameter:
                break
            self._read()
            key = yield from self._key()
            text = yield from self._text_value()
            self._give(key, typed(text, self._schema(name, key)))
        if got == self._close or (yield from self._peek()):  # else it was cut, and shows it
            self._argue("}")
        yield from self._closing("" if self._close == self._wrapper[1] else self._wrapper[1], True)
        return True

    def _head(self, marker: str) -> Steps[str]:
        """A call's name; "" where the marker begins none."""
        if marker == self._wrapper[0]:
            yield from self._skip_space()
            if not (yield from self._expect(self._function)):
                return ""
        name = yield from self._word()
        return name if (yield from self._expect(">")) else ""

    def _key(self) -> Steps[str]:
        yield from self._find(">")
        key = self._read()
        yield from self._expect(">")
        self._read()
        return key

    def _text_value(self) -> Steps[str]:
        text = yield from self._until("</parameter>")
        return text.removeprefix("\n").removesuffix("\n")

    def _until(self, end: str) -> Steps[str]:
        """The text before a value's end, which is read too, or before what else ends it."""
        ends = (end, self._parameter, self._close)
        found = yield from self._find(*ends)
        text = self._read()
        if found == end:
            yield from self._expect(end)
        return text if found else text[: len(text) - held_back(text, ends)]


class ArgCalls(XmlCalls):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>`: GLM."""

    _function = "<tool_call>"
    _parameter = "<arg_key>"
    _close = "</tool_call>"

    def _head(self, marker: str) -> Steps[str]:
        yield from self._skip_space()
        name = yield from self._word()
        yield from self._skip_space()
        start = self._at
        follows = yield from self._expect(self._parameter, self._close)
        self._at = start
        return name if follows else ""

    def _key(self) -> Steps[str]:
        yield from self._find("</arg_key>")
        key = self._read()
        yield from self._expect("</arg_key>")
        yield from self._skip_space()
        yield from self._expect("<arg_value>")
        self._read()
        return key

    def _text_value(self) -> Steps[str]:
        return (yield from self._until("</arg_value>"))


class PythonCalls(FieldCalls):
    """`[NAME(KEY=LITERAL, …), …]` between two markers, literals Python's or JSON's: LFM2."""

    def __init__(self, wrapper: tuple[str, str], tools: Mapping[str, Any]) -> None:
        self._end = wrapper[1]
        super().__init__(wrapper[:1], tools)

    def _call(self, marker: str) -> Steps[bool]:
        yield from self._skip_space()
        if not (yield from self._expect("[")) or not (yield from self._opened()):
            return False
        sound = yield from self._parameters()
        while sound and (yield from self._another()):
            sound = yield from self._parameters()
        if sound:
            yield from self._skip_space()
            yield from self._expect("]")
        yield from self._closing(self._end, sound)
        return True

    def _opened(self) -> Steps[bool]:
        name = yield from self._word()
        if not name or not (yield from self._expect("(")):
            return False
        self._open(name)
        return True

    def _another(self) -> Steps[bool]:
        yield from self._skip_space()
        if not (yield from self._expect(",")):
            return False
        yield from self._skip_space()
        return (yield from self._opened())

    def _parameters(self) -> Steps[bool]:
        """Pass on what stands between a call's brackets. False where it broke; its end is no
        break."""
        while True:
            yield from self._skip_space()
            if (yield from self._expect(")")):
                self._argue("}")
                return True
            self._read()
            key = yield from self._word()
            yield from self._skip_space()
            if not key or not (yield from self._expect("=")):
                return not (yield from self._peek())
            text = yield from self._literal()
            if not (yield from self._peek()):
                return True
            self._read()
            self._give(key, literal(text))
            yield from self._skip_space()
            yield from self._expect(",")

    def _literal(self) -> Steps[str]:
        """Read a value, up to the comma or bracket behind it."""
        start, depth, quote = self._at, 0, ""
        while char := (yield from self._peek()):
            if quote:
                if char == "\\":
                    self._at += 1
                    if not (yield from self._peek()):
                        break
                elif char == quote:
                    quote = ""
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
            elif char in ")]},":
                if not depth:
                    break
                depth -= char != ","
            self._at += 1
        return self._text[start : self._at].strip()


def literal(text: str) -> Any:
    """The value of a literal of JSON's or Python's that JSON can say; the text where it is none."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value
    return text


def typed(text: str, schema: Any) -> Any:
    """A parameter's text as what its schema wants; the text itself where it is no such value."""
    kinds = kinds_of(schema)
    if "string" in kinds or (kinds == [None] and not isinstance(schema, dict)):
        return text
    try:
        return json.loads(text.lower() if kinds == ["boolean"] else text)
    except (ValueError, RecursionError):
        return text


def kinds_of(schema: Any) -> list[Any]:
    """The types that a schema names; [None] where it names none."""
    if not isinstance(schema, dict):
        return [None]
    choices = [schema["const"]] if "const" in schema else schema.get("enum") or [None]
    texts = "string" if all(isinstance(c, str) for c in choices) else None
    kind = schema.get("type", texts)
    return kind if isinstance(kind, list) else [kind]


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema, or what a reference of its into `root` points to, where that is all it has."""
    match schema:
        case {"$ref": str(reference)} if reference.startswith("#/"):
            found: Any = root
            for name in reference[2:].split("/"):
                found = found.get(name) if isinstance(found, dict) else None
            return schema if found is None else found
    return schema


__all__ = [
    "ArgCalls",
    "Fields",
    "PythonCalls",
    "XmlCalls",
    "kinds_of",
    "literal",
    "resolved",
    "typed",
]
