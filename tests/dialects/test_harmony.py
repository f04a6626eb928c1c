"""gpt-oss's messages: thoughts, text and calls, whatever pieces they come in."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine.core.structured import StructuredOutput
from engineroom.engine.dialects.answer import Answer, AnswerParser, read_answer
from engineroom.engine.dialects.formats import TOOL_FORMATS, tool_format_of
from engineroom.engine.dialects.grammar import call_grammar
from engineroom.engine.dialects.harmony import MARKERS
from engineroom.engine.dialects.reasoning import REASONING_FORMATS, reasoning_format_of
from engineroom.engine.features.grammar import Grammars
from tests.counts import count
from tests.features.forms import SmallTokens, make_form, play, text_of

HARMONY = REASONING_FORMATS["harmony"]
THOUGHT = "<|channel|>analysis<|message|>The sea?\n<|end|>"
NEXT = "<|start|>assistant"
ARGUMENTS = '{"city": "Paris", "note": "a <b> {c}"}'


def parser(*, tools: bool = True, inside: bool = False) -> AnswerParser:
    calls = TOOL_FORMATS["harmony"].parser({"weather": {}}) if tools else None
    return AnswerParser(HARMONY.parser(inside=inside), calls)


def in_pieces(pieces: list[str], **options: bool) -> Answer:
    made, answer = parser(**options), Answer()
    for piece in pieces:
        answer.add(made.feed(piece))
    return answer.add(made.finish())


def read(text: str, **options: bool) -> Answer:
    """Whole and letter by letter, which must be the same."""
    whole = read_answer(parser(**options), text)
    assert in_pieces(list(text), **options) == whole
    return whole


def called(answer: Answer) -> list[tuple[str, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in answer.calls or []]


def test_thoughts_and_what_the_user_sees() -> None:
    for end in ("", "<|return|>", "<|end|>"):
        answer = read(f"{THOUGHT}{NEXT}<|channel|>final<|message|>It is blue.{end}")
        assert (answer.reasoning, answer.text, answer.calls) == ("The sea?", "It is blue.", None)
    assert read("<|channel|>final<|message|>Blue.") == Answer("Blue.")
    assert read("Go on.<|end|>", inside=True) == Answer("", "Go on.")
    assert read("No header.") == Answer("No header.")


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.weather<|message|>",
        "<|channel|>commentary to=functions.weather json<|message|>",
        " to=functions.weather<|channel|>commentary json<|message|>",
        "<|channel|>analysis to=functions.weather <|constrain|>json<|message|>",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", ""])
def test_a_call_in_every_way_that_models_write_it(header: str, end: str) -> None:
    for before in ("", THOUGHT + NEXT):
        answer = read(f"{before}{header}{ARGUMENTS}{end}")
        assert called(answer) == [("weather", json.loads(ARGUMENTS))]
        assert answer.text == "" and answer.reasoning == ("The sea?" if before else "")


def test_a_preamble_and_two_calls() -> None:
    one = f"{NEXT}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{{}}"
    text = f"{THOUGHT}{NEXT}<|channel|>commentary<|message|>I will look.<|end|>{one}<|call|>"
    answer = read(f"{text}{THOUGHT}{one}<|call|>")
    assert answer.text == "I will look." and answer.reasoning == "The sea?\n\nThe sea?"
    assert called(answer) == [("weather", {}), ("weather", {})]


def test_broken_arguments_end_where_their_message_does() -> None:
    call = "<|channel|>commentary to=functions.weather<|message|>"
    answer = read(f'{call}{{"a": @@<|call|>{NEXT}<|channel|>final<|message|>Done.')
    assert answer.calls is not None and answer.calls[0].arguments == '{"a": @@'
    assert answer.text == "Done."


def test_messages_for_the_user_are_set_off() -> None:
    text = "<|channel|>commentary<|message|>First.<|end|>"
    assert read(f"{text}{NEXT}<|channel|>final<|message|>Then.").text == "First.\n\nThen."


def test_what_is_cut_or_without_an_end_leaks_no_header() -> None:
    whole = f"{THOUGHT}{NEXT}<|channel|>final<|message|>Blue."
    for size in range(len(whole)):
        answer = read(whole[:size])
        assert "<|channel|>" not in answer.text + answer.reasoning
        assert "message|>" not in answer.text + answer.reasoning
    # The end of the thoughts is missing.
    answer = read("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Blue.")
    assert (answer.reasoning, answer.text) == ("Hm.", "Blue.")


def test_a_header_without_an_end_becomes_text() -> None:
    endless = "<|channel|>" + "x" * 2000
    assert read(endless).text == endless
    assert read("to=you, with love").text == "to=you, with love"


def test_calls_are_text_where_no_tool_is_offered() -> None:
    text = f"<|channel|>commentary to=functions.weather<|message|>{ARGUMENTS}<|call|>"
    assert ARGUMENTS in read(text, tools=False).text


WORDS = ["analysis", "final", "commentary", " to=functions.weather", "json", '{"a": 1}', "{", " "]
PIECES = st.lists(st.sampled_from([*MARKERS, *WORDS, "é\n", "assistant", "<|", "to="]), max_size=16)


@given(pieces=PIECES, inside=st.booleans(), data=st.data())
@settings(max_examples=count(reduced=60, full=3000), deadline=None)
def test_any_pieces_give_the_same(pieces: list[str], inside: bool, data: Any) -> None:
    text = "".join(pieces)
    whole = in_pieces([text], inside=inside)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    cut = [text[a:b] for a, b in pairwise(cuts)]
    assert in_pieces(cut, inside=inside) == whole == in_pieces(list(text), inside=inside)


class HarmonyTokens(SmallTokens):
    """Markers are special tokens, as gpt-oss's are, of which two end an output."""

    def __init__(self) -> None:
        super().__init__()
        self.markers = {m: len(self.texts) + i for i, m in enumerate(MARKERS)}
        self.texts += [m.encode() for m in MARKERS]
        self.eos_token_ids = frozenset(self.markers[m] for m in ("<|call|>", "<|return|>"))
        self.special_ids = self.special_ids | set(self.markers.values())
        self.vocab_size = len(self.texts)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
def test_a_required_call_is_sampled_in_special_tokens(thinks: bool, parallel: bool) -> None:
    """Whole in any budget, by a model that ends wherever it may with the token behind a call."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    tokens = HarmonyTokens()
    city = {"city": {"type": "string", "maxLength": 4}}
    tools = {"weather": {"type": "object", "properties": city, "required": ["city"]}}
    grammar = call_grammar(
        tools, TOOL_FORMATS["harmony"], required=True, parallel=parallel,
        reasoning=HARMONY, special=tokens.markers,
    )  # fmt: skip
    grammars = Grammars(tokens)
    most = 200
    for seed in range(count(reduced=4, full=60)):
        form = make_form(grammars, StructuredOutput(grammar=grammar), most)
        rows = np.random.default_rng(seed).normal(size=(most, tokens.vocab_size))
        rows[:, tokens.markers["<|call|>"]] += 6
        rows[:, tokens.markers["<|end|>"]] += 3
        if thinks:
            rows[0, tokens.markers["<|channel|>"]] += 9
            rows[:6, ord("a")] += 9  # of "analysis"
        ids = play(form, most, rows.astype(np.float32).__getitem__)
        assert form.complete
        text = text_of(tokens, ids)
        spelled = [i for i in ids if i not in tokens.special_ids]
        assert not any(m in text_of(tokens, spelled) for m in MARKERS)
        thoughts, _, call = text.rpartition("<|channel|>commentary to=functions.weather ")
        assert call.startswith("<|constrain|>json<|message|>")
        assert "city" in json.loads(call.removeprefix("<|constrain|>json<|message|>"))
        if thinks:
            assert thoughts.strip().endswith("<|end|><|start|>assistant")


def test_a_template_of_this_format_is_known_and_of_another_is_not() -> None:
    template = (
        "{% if '<|channel|>analysis<|message|>' in message.content %}{% endif %}"
        "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    )
    found = tool_format_of(template)
    assert reasoning_format_of(template) is HARMONY
    assert found is not None and found.name == "harmony"
    phi = "<|user|>{{ content }}<|end|><|assistant|>"
    assert reasoning_format_of(phi) is None and tool_format_of(phi) is None
