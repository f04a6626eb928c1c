"""Outputs in a form: what may come, when it ends, and that it ends whole in any budget."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="llguidance is not installed")
pytest.importorskip("jsonschema_rs", reason="jsonschema-rs is not installed")

import jsonschema_rs

from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.structured import StructuredOutput
from engineroom.engine.features.endings import Effort, Words, find_ending
from engineroom.engine.features.grammar import Grammars
from tests.counts import count
from tests.load.vocabularies import MODELS, VOCABULARIES, tokenizer_of

from .forms import SmallTokens, as_output, make_form, play, schema, text_of


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(SmallTokens())


def validate(wanted: dict[str, Any], text: str) -> None:
    """A number beyond a float's range is a JSON number all the same."""
    value = json.loads(text, parse_float=lambda t: 0.5, parse_int=lambda t: int(t[:15]))
    jsonschema_rs.validator_for(wanted).validate(value)


def noise(seed: int, size: int, liked: str = "") -> object:
    """Logits at random; `liked` bytes are likelier, so that outputs go on and on."""

    def logits(position: int) -> np.ndarray:
        row = np.random.default_rng((seed, position)).standard_normal(size)
        for byte in liked.encode():
            row[byte] += 3.0
        return row

    return logits


@pytest.mark.parametrize("seed", range(count(reduced=18, full=400)))
def test_every_output_of_a_schema_is_valid_in_any_budget(grammars: Grammars, seed: int) -> None:
    rng = random.Random(seed)
    wanted = schema(rng)
    output = as_output(wanted)
    shortest = len(grammars.compile(output).ending or ())
    liked = rng.choice(["", 'abc" {[,', "[{,", '0123456789"'])
    for budget in {shortest, shortest + 1, shortest + rng.randint(2, 12), rng.randint(40, 300)}:
        if budget < shortest:
            continue
        form = make_form(grammars, output, budget)
        ids = play(form, budget, noise(seed, grammars.vocabulary.size, liked))
        text = text_of(SmallTokens(), ids)
        assert form.complete and len(ids) <= budget, text
        validate(wanted, text)


@pytest.mark.parametrize("seed", range(count(reduced=8, full=100)))
def test_a_schema_that_holds_itself_ends_in_any_budget(grammars: Grammars, seed: int) -> None:
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            "right": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["name", "left", "right"],
        "additionalProperties": False,
    }
    wanted = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    output = as_output(wanted)
    shortest = len(grammars.compile(output).ending or ())
    budget = shortest + random.Random(seed).randint(0, 200)
    form = make_form(grammars, output, budget)
    ids = play(form, budget, noise(seed, grammars.vocabulary.size, "{"))
    validate(wanted, text_of(SmallTokens(), ids))


@pytest.mark.parametrize("budget", range(1, 12))
@pytest.mark.parametrize("seed", range(2))
def test_a_choice_is_one_of_them_in_any_budget(grammars: Grammars, seed: int, budget: int) -> None:
    choice = ("yes", "no", "yesterday", 'a "quoted" one\n', "é")
    form = make_form(grammars, StructuredOutput(choice=choice), budget)
    if budget < 2:
        assert len(grammars.compile(StructuredOutput(choice=choice)).ending or ()) == 2
        return
    ids = play(form, budget, noise(seed, grammars.vocabulary.size))
    assert text_of(SmallTokens(), ids) in choice and form.complete


@pytest.mark.parametrize("seed", range(10))
def test_a_regex_that_is_cut_ends_or_says_that_it_did_not(grammars: Grammars, seed: int) -> None:
    pattern = r"[a-f]{3,40}(-[0-9]{2}){1,3};"
    budget = random.Random(seed).randint(7, 60)
    form = make_form(grammars, StructuredOutput(regex=pattern), budget)
    ids = play(form, budget, noise(seed, grammars.vocabulary.size, "abc"))
    assert form.complete == bool(re.fullmatch(pattern, text_of(SmallTokens(), ids)))
    assert form.complete


def test_what_no_ending_was_found_for_says_that_it_is_not_complete(grammars: Grammars) -> None:
    # The way out is one letter of many, at a distance that the search does not go.
    pattern = "([a-y]{60}){1,400}z{700}"
    output = StructuredOutput(regex=pattern)
    form = make_form(grammars, output, 90)
    ids = play(form, 90, noise(1, grammars.vocabulary.size))
    assert len(ids) == 90 and form.complete is False


def test_an_end_is_allowed_exactly_where_the_grammar_accepts(grammars: Grammars) -> None:
    form = make_form(grammars, StructuredOutput(regex="ab*c?"), 1000)
    ends = grammars.vocabulary.eos_token_ids

    def allowed() -> set[int]:
        bits = np.unpackbits(form.mask().view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    assert allowed() & ends == set() and not form.complete
    assert not form.take(ord("a"))
    assert allowed() >= ends and form.complete and ord("b") in allowed()
    assert not form.take(ord("b"))
    assert form.take(ord("c")) and form.complete  # nothing may follow


def test_ignoring_ends_goes_on_as_long_as_the_grammar_lets_it(grammars: Grammars) -> None:
    form = make_form(grammars, StructuredOutput(regex="a{1,9}"), 50, ignore_eos=True)
    likes_the_end = np.arange(grammars.vocabulary.size, dtype=np.float32)
    assert play(form, 50, lambda position: likes_the_end.copy()) == [ord("a")] * 9
    form = make_form(grammars, StructuredOutput(regex="a{1,9}"), 50)
    assert play(form, 50, lambda position: likes_the_end.copy()) == [ord("a")]


def test_special_tokens_and_ids_without_bytes_are_never_allowed(grammars: Grammars) -> None:
    form = make_form(grammars, StructuredOutput(regex="(?s:.*)"), 1000)
    bits = np.unpackbits(form.mask().view(np.uint8), bitorder="little")
    tokens = SmallTokens()
    assert bits[: len(bits)].sum() > 100
    assert not bits[tokens.vocab_size :].any()
    for token in range(tokens.vocab_size):
        if token not in tokens.eos_token_ids and (
            token in tokens.special_ids or not tokens.texts[token]
        ):
            assert not bits[token]


@pytest.mark.parametrize("name", (*VOCABULARIES, *MODELS))
def test_every_tokenizer_spells_what_its_grammar_takes(name: str) -> None:
    """An output as the tokenizer itself would write it passes, token by token, in its own bytes."""
    tokenizer = tokenizer_of(name)
    if not tokenizer.eos_token_ids:
        pytest.skip("no end-of-text token")
    made = Grammars(tokenizer)
    text = '{"name": "Zoë 漢字 😀 \\n", "list": [1, -2.5e3, true, null], "": {}}'
    form = make_form(made, StructuredOutput(json_object=True), 500)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    if tokenizer.token_bytes(ids[0]).startswith(b" "):  # the space that decoding takes away
        rest = tokenizer.token_bytes(ids[0])[1:]
        first = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == rest]
        ids[0:1] = first[-1:] if rest else []
    for place, token in enumerate(ids):
        mask = form.mask()
        assert mask[token >> 5] >> (token & 31) & 1, (place, tokenizer.token_bytes(token))
        for special in tokenizer.special_ids - tokenizer.eos_token_ids:
            assert not mask[special >> 5] >> (special & 31) & 1
        over = form.take(token)
    assert over and form.complete
    spelled = made.vocabulary.words.spell(text.encode())
    assert spelled is not None and b"".join(map(tokenizer.token_bytes, spelled)) == text.encode()
    assert len(spelled) <= len(ids) + 1
    assert not set(spelled) & tokenizer.special_ids


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (StructuredOutput(json_schema='{"type": "objct"}'), "Invalid type: objct"),
        (StructuredOutput(json_schema='{"not": {"type": "string"}}'), 'keys: ["not"]'),
        (StructuredOutput(json_schema='{"$ref": "#/nope"}'), "'/nope' does not exist"),
        (StructuredOutput(json_schema='{"$ref": "http://x/y"}'), "does not fetch"),
        (StructuredOutput(json_schema='{"type": "integer", "minimum": 5, "maximum": 3}'), "(5)"),
        (StructuredOutput(json_schema='{"type": "string", "minLength": 90000}'), "16384 bytes"),
        (StructuredOutput(regex="[a-z]+@("), "unclosed group"),
        (StructuredOutput(regex="(?=a)b"), "look"),
        (StructuredOutput(grammar="start: x\nx: y"), 'unknown name: "y"'),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_place(
    grammars: Grammars, output: StructuredOutput, words: str
) -> None:
    for _ in range(2):  # a refusal is remembered too
        with pytest.raises(ParameterError) as caught:
            grammars.compile(output)
        assert caught.value.field == "structured"
        assert words in str(caught.value) and output.kind in str(caught.value)


def test_a_grammar_is_compiled_once(grammars: Grammars) -> None:
    output = StructuredOutput(regex="once[0-9]")
    assert not grammars.is_kept(output)
    first = grammars.compile(output)
    assert grammars.is_kept(output) and grammars.compile(output) is first


@pytest.mark.parametrize("seed", range(count(reduced=15, full=600)))
def test_the_shortest_output_is_the_shortest(grammars: Grammars, seed: int) -> None:
    """Against every output of a small schema, spelled in the fewest tokens."""
    rng = random.Random(seed)
    values = [["no", "never ever", 12345], [True, False], ["ab", "abcabc"], [None, 10000]]
    chosen = rng.sample(values, rng.randint(1, 4))
    wanted = {
        "type": "object",
        "properties": {f"k{i}": {"enum": v} for i, v in enumerate(chosen)},
        "required": [f"k{i}" for i in range(len(chosen)) if rng.random() < 0.7],
        "additionalProperties": False,
    }
    words = grammars.vocabulary.words
    lengths = []
    for places in np.ndindex(*[len(v) + 1 for v in chosen]):
        value = {
            f"k{i}": v[p] for i, (p, v) in enumerate(zip(places, chosen, strict=True)) if p < len(v)
        }
        if set(wanted["required"]) <= set(value):
            text = json.dumps(value, separators=(",", ":"))
            lengths.append(len(words.spell(text.encode()) or ()))
    assert len(grammars.compile(as_output(wanted)).ending or ()) == min(lengths)


def test_the_shortest_text_may_have_a_space_where_another_has_a_letter(grammars: Grammars) -> None:
    ending = grammars.compile(as_output({"enum": ["abcabc", "a b"]})).ending
    assert text_of(SmallTokens(), ending or ()) == '"a b"'


@pytest.mark.parametrize(
    ("output", "least"),
    [
        (StructuredOutput(regex=r"[a-z]+@[a-z]+\.(com|org)"), 7),
        (StructuredOutput(json_schema='{"type": "string", "pattern": "^[^@]+@[^@]+$"}'), 5),
        (StructuredOutput(json_schema='{"type": "string", "minLength": 30}'), 17),
        (StructuredOutput(grammar='start: "a" start | "b"'), 1),
        (StructuredOutput(regex="x*"), 0),
    ],
)
def test_an_ending_is_found_behind_text_of_any_length(
    grammars: Grammars, output: StructuredOutput, least: int
) -> None:
    ending = grammars.compile(output).ending
    assert ending is not None and least <= len(ending) <= least + 15


@pytest.mark.parametrize("optional", [False, True])
def test_a_special_token_that_a_grammar_asks_for(grammars: Grammars, optional: bool) -> None:
    tool = max(SmallTokens().special_ids)  # <|tool|>
    call = f"<[{tool}]> %json {json.dumps({'type': 'object', 'required': ['a']})}"
    start = f"TEXT ({call})?" if optional else f"TEXT {call}"
    output = StructuredOutput(grammar=f"start: {start}\nTEXT: /(.|\\n)*/\n")
    compiled = grammars.compile(output)
    assert compiled.ending == (() if optional else (tool, *compiled.ending[1:]))  # type: ignore[index]
    called = 0
    for seed in range(count(reduced=6, full=40)):
        for most in (20, 40):
            form = make_form(grammars, output, most)
            size = grammars.vocabulary.size
            rng = np.random.default_rng(seed)
            rows = rng.normal(size=(most, size)).astype(np.float32)
            rows[:, tool] += 3 * (seed % 2)
            ids = play(form, most, rows.__getitem__)
            assert form.complete
            assert ids.count(tool) <= 1
            if tool in ids:
                called += 1
                assert "a" in json.loads(text_of(SmallTokens(), ids[ids.index(tool) + 1 :]))
    assert called if optional else called == 2 * count(reduced=6, full=40)


def test_a_special_token_amid_text_that_must_come(grammars: Grammars) -> None:
    tool = max(SmallTokens().special_ids)
    form = StructuredOutput(grammar=f'start: "x" <[{tool}]> "y" <[{tool}]> "z"\n')
    ending = grammars.compile(form).ending
    assert ending == (ord("x"), tool, ord("y"), tool, ord("z"))


@pytest.mark.parametrize("token", [5, 100_000])
def test_an_id_that_is_no_special_token_is_refused(grammars: Grammars, token: int) -> None:
    with pytest.raises(ParameterError, match=rf"<\[{token}\]> is not the id of a special token"):
        grammars.compile(StructuredOutput(grammar=f'start: "a" <[{token}]>\n'))


def test_an_id_in_a_text_is_text(grammars: Grammars) -> None:
    output = StructuredOutput(grammar='start: "<[5]>" /<\\[6\\]>/ // <[7]>\n')
    ending = grammars.compile(output).ending
    assert ending is not None and text_of(SmallTokens(), ending) == "<[5]><[6]>"


def test_words_are_spelled_in_the_fewest_tokens() -> None:
    words = Words({b"a": 0, b"ab": 1, b"abc": 2, b"cd": 3, b"d": 4, b"b": 5})
    assert words.spell(b"abcd") == (2, 4)
    assert words.spell(b"ab") == (1,)
    assert words.spell(b"") == ()
    assert words.spell(b"abx") is None


@given(
    words=st.sets(st.text("abc", min_size=1, max_size=5).map(str.encode), max_size=12),
    text=st.text("abc", max_size=14).map(str.encode),
)
@settings(max_examples=count(reduced=50, full=2000), deadline=None)
def test_no_spelling_has_fewer_tokens(words: set[bytes], text: bytes) -> None:
    found = Words({word: i for i, word in enumerate(sorted(words))}).spell(text)
    fewest = [0] + [len(text) + 1] * len(text)  # tokens of each beginning
    for end in range(1, len(text) + 1):
        for word in words:
            if text[:end].endswith(word):
                fewest[end] = min(fewest[end], fewest[end - len(word)] + 1)
    assert (None if found is None else len(found)) == (
        None if fewest[-1] > len(text) else fewest[-1]
    )
    if found is not None:
        assert b"".join(sorted(words)[i] for i in found) == text


def test_a_search_stops_when_its_effort_is_spent(grammars: Grammars) -> None:
    compiled = grammars.compile(as_output({"type": "array", "items": {}, "minItems": 30}))
    effort = Effort(5)
    words = grammars.vocabulary.words
    assert find_ending(compiled.byte_matcher, words, effort, 4096) is None and effort.left == 0
