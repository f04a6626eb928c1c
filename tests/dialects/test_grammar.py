"""Grammars of tool calls, asked of llguidance: what obeys the schemas passes, all else not."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom.engine.dialects.formats import TOOL_FORMATS, ToolFormat
from engineroom.engine.dialects.grammar import call_grammar
from engineroom.engine.dialects.reasoning import REASONING_FORMATS

llguidance = pytest.importorskip("llguidance", reason="the llguidance package is not installed")
DEFS = {"$defs": {"day": {"enum": ["mon", "tue"]}}}
TOOLS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "day": {"$ref": "#/$defs/day"}},
        "required": ["city"],
        "additionalProperties": False,
        **DEFS,
    },
    "time": None,
}
GOOD: tuple[str, dict[str, Any]] = ("weather", {"city": "Rome", "day": "mon"})
BAD: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"city": "x", "day": "sun"}),
    ("weather", {}),
    ("weather", {"city": 5}),  # where parameters are written as they are, a text like any other
]
WRITTEN = list(TOOL_FORMATS.values())
THINK = REASONING_FORMATS["think"]


def accepts(grammar: str, text: str, special: tuple[str, int] = ("", 0)) -> bool:
    """Whether the text is one whole output, in which a marker is one token."""
    tokenizer = llguidance.LLTokenizer("byte")
    refused = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
    assert not refused, refused
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    before, marker, after = text.partition(special[0]) if special[0] else (text, "", "")
    ids = tokenizer.tokenize_str(before) + [special[1]] * bool(marker)
    ids += tokenizer.tokenize_str(after)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
def test_required_calls(format: ToolFormat) -> None:
    grammar = call_grammar(TOOLS, format, required=True, parallel=True)
    assert accepts(grammar, format.write([GOOD]))
    assert accepts(grammar, format.write([GOOD, ("time", {"a": [1, {"b": 2}]})]))
    texts_as_they_are = format.fields is not None and not format.fields.quoted
    for bad in (*BAD[: 2 if texts_as_they_are else 3], ("other", {})):
        assert not accepts(grammar, format.write([bad]))
    assert not accepts(grammar, "Hello")
    single = call_grammar(TOOLS, format, required=True, parallel=False)
    assert accepts(single, format.write([GOOD])) and not accepts(single, format.write([GOOD, GOOD]))


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
def test_text_or_strict_calls(format: ToolFormat) -> None:
    grammar = call_grammar(TOOLS, format, required=False, parallel=True)
    assert accepts(grammar, "Hello <there>\n[x]")
    assert accepts(grammar, format.write([GOOD]))
    assert not accepts(grammar, format.write([BAD[0]]))
    if format.name != "llama3":  # there a call is the whole text
        assert accepts(grammar, "Let me see.\n" + format.write([GOOD]))


@pytest.mark.parametrize("format", [f for f in WRITTEN if f.marker], ids=lambda f: f.name)
def test_calls_or_an_answer_of_a_schema(format: ToolFormat) -> None:
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    grammar = call_grammar(
        TOOLS, format, required=False, content=schema, parallel=True, reasoning=THINK
    )
    for text in ('{"n": 5}', '<think>a</think>{"n": 5}', format.write([GOOD])):
        assert accepts(grammar, text)
    for text in ("Hello", '{"n": "x"}', format.write([BAD[0]])):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
def test_thoughts_before_a_call(format: ToolFormat) -> None:
    call = format.write([GOOD])
    grammar = call_grammar(TOOLS, format, required=True, parallel=True, reasoning=THINK)
    for text in (f"<think>\na < b\n</think>\n\n{call}", call):
        assert accepts(grammar, text)
    assert not accepts(grammar, "<think>a</think>\n\nHello")
    inside = call_grammar(TOOLS, format, required=True, parallel=True, reasoning=THINK, inside=True)
    assert accepts(inside, f"Hm.\n</think>\n\n{call}") and not accepts(inside, call)


@pytest.mark.parametrize("format", [f for f in WRITTEN if f.marker], ids=lambda f: f.name)
def test_a_marker_that_is_one_token(format: ToolFormat) -> None:
    special = (format.marker, 256)
    single = {"special": {format.marker: 256}, "parallel": False}
    required = call_grammar(TOOLS, format, required=True, **single)  # type: ignore[arg-type]
    call = format.write([GOOD])
    assert accepts(required, call, special) and not accepts(required, call)
    strict = call_grammar(TOOLS, format, required=False, **single)  # type: ignore[arg-type]
    for text in ("Hello <there>", call, f"Let me see.\n{call}"):
        assert accepts(strict, text, special)
    assert not accepts(strict, format.write([BAD[0]]), special)


def test_thoughts_that_end_with_one_token() -> None:
    format, special = TOOL_FORMATS["hermes"], ("</think>", 256)
    grammar = call_grammar(
        TOOLS, format, required=True, parallel=True, reasoning=THINK, special=dict([special])
    )
    text = f"<think>Hm</think>{format.write([GOOD])}"
    assert accepts(grammar, text, special) and not accepts(grammar, text)


WIDE = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 3},
        "kind": {"type": "string", "enum": ["x y", "z"]},
        "code": {"type": "string", "pattern": "^[a-c]/[0-9]+$", "maxLength": 6},
        "on": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "string"}, "maxItems": 1},
    },
    "required": ["kind"],
    "additionalProperties": False,
}
FIELDS = [f for f in WRITTEN if f.fields is not None]


@pytest.mark.parametrize("format", FIELDS, ids=lambda f: f.name)
def test_parameters_written_one_behind_the_other(format: ToolFormat) -> None:
    grammar = call_grammar({"f": WIDE}, format, required=True, parallel=True)
    whole = {"a": 3, "kind": "x y", "code": "b/12", "on": True, "list": ["é"]}
    for good in (whole, {"kind": "z"}, {"kind": "z", "on": False}, {"a": 7, "kind": "z"}):
        assert accepts(grammar, format.write([("f", good)]))
    bad: list[dict[str, Any]] = [
        {},
        {"a": 3},
        {"a": 2, "kind": "z"},
        {"kind": "y"},
        {"kind": "z", "code": "d/1"},
        {"kind": "z", "code": "a/12345"},
        {"kind": "z", "on": 1},
        {"kind": "z", "list": ["a", "b"]},
        {"kind": "z", "more": 1},
        {"on": True, "kind": "z"},  # not in the schema's order
    ]
    for arguments in bad:
        assert not accepts(grammar, format.write([("f", arguments)])), arguments


@pytest.mark.parametrize("format", FIELDS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"anyOf": [{"type": "object"}]}, "anyOf"),
        ({"type": "string"}, "type 'string'"),
        ({"properties": {"a<b>\n": {}}}, "cannot name f's parameter"),
        ({"properties": {}, "required": ["x"]}, "f requires x"),
    ],
)
def test_parameters_that_no_such_call_can_be_held_to(
    format: ToolFormat, schema: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        call_grammar({"f": schema}, format, required=True, parallel=True)
