"""Tool calls in growing text: any pieces give the same; what is written is read; no leaks."""

from __future__ import annotations

import json
import re
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
WRITTEN = [f for f in TOOL_FORMATS.values() if f.fields is None]  # arguments as JSON
FIELDS = [f for f in TOOL_FORMATS.values() if f.fields is not None]
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
CASES = count(reduced=25, full=300)


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


TYPED = st.lists(
    st.one_of(
        st.tuples(
            st.just("weather"),
            st.fixed_dictionaries(
                {}, optional={"city": st.text("aé \\'\"{,)]>", max_size=8), "days": st.integers()}
            ),
        ),
        st.tuples(
            st.just("get_time-2"), st.fixed_dictionaries({}, optional={"flag": st.booleans()})
        ),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("format", FIELDS, ids=lambda f: f.name)
@given(calls=TYPED, text=st.sampled_from(["", "Let me see.", "a { b", "x\n\ny"]))
@settings(max_examples=CASES, deadline=None)
def test_parameters_that_a_model_writes_are_read(format: ToolFormat, calls: Any, text: str) -> None:
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
                "city=",
                "weather(",
                "<arg_key>city</arg_key>",
                "<arg_value>",
                "</arg_value>",
                "')",
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
GLM = f"{OPEN}weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
LFM = "<|tool_call_start|>[{}]<|tool_call_end|>"
COMMAND = "<|START_ACTION|>[\n    {}\n]<|END_ACTION|>"
COHERE = '{"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Paris"}}'
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
    ("glm45", GLM + CLOSE, "", [WEATHER]),
    ("glm45", f"Hi {OPEN}weather\n{CLOSE}\n", "Hi", [("weather", {})]),
    ("glm47", GLM.replace("\n", "") + CLOSE + GLM + CLOSE, "", [WEATHER, WEATHER]),
    (
        "glm47",
        f"{OPEN}weather<arg_key>days</arg_key><arg_value>3</arg_value>{CLOSE}",
        "",
        [("weather", {"days": 3})],
    ),
    ("lfm2", LFM.format("weather(city='Paris')"), "", [WEATHER]),
    ("lfm2", LFM.format('weather(city="Paris"), weather( city = "Paris" )'), "", [WEATHER] * 2),
    (
        "lfm2",
        LFM.format("get_time-2(flag=True)") + "Done.",
        "Done.",
        [("get_time-2", {"flag": True})],
    ),
    (
        "lfm2",
        LFM.format("weather(a={'x': [1, None]}, b=[true, null], c=-1.5, d='it\\'s, )')"),
        "",
        [("weather", {"a": {"x": [1, None]}, "b": [True, None], "c": -1.5, "d": "it's, )"})],
    ),
    ("lfm2", LFM.format("weather()"), "", [("weather", {})]),
    ("command", COMMAND.format(COHERE), "", [WEATHER]),
    ("command", COMMAND.format(f"{COHERE},\n    {COHERE}"), "", [WEATHER] * 2),
    ("command", COMMAND.format(COHERE.replace('"tool_call_id": "0", ', "")), "", [WEATHER]),
    ("command", "<|START_RESPONSE|>Hi<|END_RESPONSE|>", "Hi", []),
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
        ("glm45", "<tool_call>\nnot a call\n</tool_call>"),
        ("lfm2", "<|tool_call_start|>weather()<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[]<|tool_call_end|>"),
        ("command", '<|START_ACTION|>[{"name": 1}]<|END_ACTION|>'),
    ],
)
def test_what_is_no_call_is_given_back_as_it_was(name: str, text: str) -> None:
    answer = read(name, text)
    assert answer.text == text and not answer.calls


@pytest.mark.parametrize("format", TOOL_FORMATS.values(), ids=lambda f: f.name)
def test_a_call_that_is_cut_leaks_no_marker(format: ToolFormat) -> None:
    text = format.write([WEATHER])
    started = text.index("Paris")
    for end in range(started, len(text)):
        answer = read(format.name, text[:end])
        (call,) = answer.calls or []
        assert answer.text == "" and call.name == "weather"
        if format.fields is None:
            assert '{"city": "Paris"}'.startswith(call.arguments)
        else:  # a cut text may be shown; nothing behind it
            assert re.fullmatch(r'\{("city": "P?a?r?i?s?"\}?)?', call.arguments)


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {"city": Paris™}}\n</tool_call>!',
            '{"city": Paris™}}',
        ),
        ("lfm2", LFM.format("weather('Paris')") + "!", "{'Paris')]"),
    ],
)
def test_arguments_that_break_are_passed_on_without_the_marker(
    name: str, text: str, arguments: str
) -> None:
    answer = read(name, text)
    (call,) = answer.calls or []
    assert (call.arguments, answer.text) == (arguments, "!")


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
