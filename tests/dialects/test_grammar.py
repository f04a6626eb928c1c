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


def accepts(grammar: str, text: str) -> bool:
    """Whether the text is one whole output."""
    tokenizer = llguidance.LLTokenizer("byte")
    refused = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
    assert not refused, refused
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    ids = tokenizer.tokenize_str(text)
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
