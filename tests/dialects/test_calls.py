"""Tool calls in growing text: any pieces give the same; what is written is read; no leaks."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine.dialects.answer import Answer, AnswerParser, read_answer
from engineroom.engine.dialects.formats import TOOL_FORMATS, ToolFormat
from engineroom.engine.dialects.reasoning import REASONING_FORMATS, ReasoningParser
from tests.counts import count

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "get_time-2": {"type": "object", "properties": {"flag": {"type": "boolean"}}},
}
WRITTEN = [f for f in TOOL_FORMATS.values() if f.shape is not None]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(sorted(TOOLS)), st.dictionaries(st.text(max_size=6), JSON, max_size=3)
    ),
    min_size=1,
    max_size=3,
)
CASES = count(reduced=25, full=1000)


def parser(format: ToolFormat, *, inside: bool = False) -> AnswerParser:
    thoughts = ReasoningParser(REASONING_FORMATS["think"], inside=inside)
    return AnswerParser(thoughts, format.parser(TOOLS))


def in_pieces(format: ToolFormat, pieces: list[str], *, inside: bool = False) -> Answer:
    made, answer = parser(format, inside=inside), Answer()
    for piece in pieces:
        answer.add(made.feed(piece))
    return answer.add(made.finish())


def read(name: str, text: str) -> Answer:
    """Whole and letter by letter, which must be the same."""
    whole = read_answer(parser(TOOL_FORMATS[name]), text)
    assert in_pieces(TOOL_FORMATS[name], list(text)) == whole
    return whole


def calls_of(answer: Answer) -> list[tuple[str, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in answer.calls or []]


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
@given(calls=CALLS, text=st.sampled_from(["", "Let me see.", "a { b", "x\n\ny"]))
@settings(max_examples=CASES, deadline=None)
def test_what_a_model_writes_is_read(format: ToolFormat, calls: Any, text: str) -> None:
    if format.name == "llama3":
        text = ""  # there a call is the whole text
    answer = read_answer(parser(format), text + format.write(calls))
    assert calls_of(answer) == calls
    assert answer.text == text


PIECES = st.lists(
    st.sampled_from(
        [
            *sorted({m for f in TOOL_FORMATS.values() for m in f.markers}),
            *("<think>", "</think>", "<function=", "</function>", "<parameter=", "</parameter>"),
            *(
                '{"name": "weather", "arguments": ',
                '{"name": "weather", "parameters": {}}',
                '"name"',
            ),
            *(
                '{"city": "Paris"}',
                "weather",
                "{",
                "}",
                "[",
                "]",
                '"',
                ",",
                ";",
                "\n",
                " ",
                "```json",
            ),
            *(
                "```",
                "=city>",
                ">",
                "é",
                "\\",
                "<",
                "<tool",
                "function",
                "functions.weather:0",
                "x y",
            ),
        ]
    ),
    max_size=14,
)


@pytest.mark.parametrize("format", TOOL_FORMATS.values(), ids=lambda f: f.name)
@given(pieces=PIECES, inside=st.booleans(), data=st.data())
@settings(max_examples=CASES * 3, deadline=None)
def test_any_pieces_give_the_same_parts(
    format: ToolFormat, pieces: list[str], inside: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    whole = read_answer(parser(format, inside=inside), text)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    cut = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    assert in_pieces(format, cut, inside=inside) == whole
    assert in_pieces(format, list(text), inside=inside) == whole


WEATHER = ("weather", {"city": "Paris"})
J = '{"name": "weather", "arguments": {"city": "Paris"}}'
P = J.replace("arguments", "parameters")
A = '{"city": "Paris"}'
OPEN, CLOSE = "<tool_call>", "</tool_call>"
TURNED = '{"arguments": {"city": "Paris"}, "name": "weather"}'
QUOTED = '{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'
MARKER = ("weather", {"city": CLOSE})
DEEP = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{A}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CODER = (
    f"{OPEN}\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    f"<parameter=days>\n3\n</parameter>\n</function>\n{CLOSE}"
)
FLAG = "<function=get_time-2><parameter=flag>True</parameter></function>"
# format, text, content, calls
READ: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", OPEN + J + CLOSE, "", [WEATHER]),
    ("hermes", OPEN + TURNED + CLOSE, "", [WEATHER]),
    ("hermes", OPEN + QUOTED + CLOSE, "", [WEATHER]),
    ("hermes", OPEN + J.replace(A, "null") + CLOSE, "", [("weather", {})]),
    ("hermes", f"{OPEN}[{J}]{CLOSE}", "", [WEATHER]),
    ("hermes", f"Hi\n{OPEN}\n{J}\n{CLOSE}\nBye", "Hi\nBye", [WEATHER]),
    ("hermes", OPEN + J, "", [WEATHER]),
    ("hermes", f"{OPEN}{J}\n</tool_c", "", [WEATHER]),
    ("hermes", OPEN + J.replace("Paris", CLOSE) + CLOSE, "", [MARKER]),
    ("llama3", P, "", [WEATHER]),
    ("llama3", f' {{"type": "function", {P[1:]}', "", [WEATHER]),
    ("llama3", f"<|python_tag|>{P}; {P}", "", [WEATHER, WEATHER]),
    ("mistral_json", f'[TOOL_CALLS] [{J[:-1]}, "id": "123456789"}}]', "", [WEATHER]),
    (
        "mistral",
        f"[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{A}[TOOL_CALLS]weather{A}",
        "",
        [WEATHER] * 2,
    ),
    ("deepseek_v3", DEEP, "", [WEATHER]),
    ("qwen3_coder", CODER, "", [("weather", {"city": "Paris", "days": 3})]),
    ("qwen3_coder", FLAG, "", [("get_time-2", {"flag": True})]),
    ("qwen3_coder", f"{OPEN}\n<function=weather>\n</function>\n{CLOSE}", "", [("weather", {})]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), READ)
def test_forms_that_models_write(name: str, text: str, content: str, calls: Any) -> None:
    answer = read(name, text)
    assert calls_of(answer) == calls
    assert answer.text == content


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>\nnot JSON\n</tool_call> and more"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ("hermes", "a < b, <tool"),
        ("llama3", '{"name": "unknown", "parameters": {}}'),
        ("llama3", '{"city": "Paris"} is JSON'),
        ("llama3", 'Say {"name": "weather", "parameters": {}}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS]two words[ARGS]{}"),
        ("mistral_json", '[TOOL_CALLS] [{"nome": 1}]'),
        ("qwen3_coder", "<tool_call>\nweather"),
        ("kimi_k2", "<|tool_call_begin|>weather{}<|tool_call_end|>"),
    ],
)
def test_what_is_no_call_is_given_back_as_it_was(name: str, text: str) -> None:
    answer = read(name, text)
    assert answer.text == text and not answer.calls


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
def test_a_call_that_is_cut_leaks_no_marker(format: ToolFormat) -> None:
    text = format.write([WEATHER])
    started = text.index("Paris")
    for end in range(started, len(text)):
        answer = read(format.name, text[:end])
        (call,) = answer.calls or []
        assert answer.text == "" and call.name == "weather"
        assert '{"city": "Paris"}'.startswith(call.arguments)


def test_arguments_that_break_are_passed_on_without_the_marker() -> None:
    answer = read(
        "hermes", '<tool_call>{"name": "weather", "arguments": {"city": Paris™}}\n</tool_call>!'
    )
    (call,) = answer.calls or []
    assert (call.arguments, answer.text) == ('{"city": Paris™}}', "!")


@pytest.mark.parametrize("format", WRITTEN, ids=lambda f: f.name)
def test_arguments_come_as_they_are_written(format: ToolFormat) -> None:
    made = parser(format)
    text = format.write([("weather", {"city": "x" * 100})])
    middle = text.index("xxx") + 50
    answer = Answer().add(made.feed(text[:middle]))
    (call,) = answer.calls or []
    assert call.arguments == '{"city": "' + "x" * 50


def test_calls_beyond_the_wanted_are_left_out() -> None:
    format = TOOL_FORMATS["hermes"]
    made = AnswerParser(None, format.parser(TOOLS), max_calls=1)
    answer = read_answer(made, format.write([WEATHER, ("get_time-2", {})]))
    assert calls_of(answer) == [WEATHER] and answer.text == ""


@pytest.mark.parametrize(
    ("text", "inside", "thoughts", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes", False, "Hm.", "Yes"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("Hm.\n</think>\n\nYes", True, "Hm.", "Yes"),
        ("Hm. It was cut", True, "Hm. It was cut", ""),
        ("<think>Hm</thi", False, "Hm</thi", ""),
        ("  Yes <think>no</think>", False, "", "  Yes <think>no</think>"),
        ("<thin", False, "", "<thin"),
        ("<think></think>Yes", False, "", "Yes"),
    ],
)
def test_thoughts_are_apart(text: str, inside: bool, thoughts: str, content: str) -> None:
    def made() -> AnswerParser:
        return AnswerParser(ReasoningParser(REASONING_FORMATS["think"], inside=inside), None)

    whole = read_answer(made(), text)
    assert (whole.reasoning, whole.text) == (thoughts, content)
    one, answer = made(), Answer()
    for char in text:
        answer.add(one.feed(char))
    assert answer.add(one.finish()) == whole


def test_a_call_after_thoughts() -> None:
    text = f"<think>\n<tool_call> or not?\n</think>\n\n{OPEN}\n{J}\n{CLOSE}"
    answer = read("hermes", text)
    assert answer.reasoning == "<tool_call> or not?"
    assert calls_of(answer) == [WEATHER] and answer.text == ""
