"""TextStream against the naive truth: decode everything, find the first complete stop string."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine.core.detokenize import TextStream, TokenPieces
from tests.core.fakes import first_stop
from tests.counts import count


def stream(pieces, **options):
    """Feed pieces of bytes as tokens 0, 1, ...; returns (deltas, tail, stream)."""
    text = TextStream(pieces.__getitem__, **options)
    deltas = [text.push(i) for i in range(len(pieces))]
    return deltas, text.finish(), text


def cut(data, places):
    """Bytes cut into pieces at these places."""
    edges = [0, *sorted({p % (len(data) + 1) for p in places}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def test_a_character_is_never_split():
    deltas, tail, _ = stream([b"\xf0", b"\x9f", b"\x99", b"\x82", b"!"])
    assert deltas == ["", "", "", "🙂", "!"] and tail == ""


def test_a_cut_character_is_flushed_as_one_replacement():
    deltas, tail, text = stream([b"a", b"\xf0\x9f"])
    assert deltas == ["a", ""] and tail == "\ufffd" and text.text == "a\ufffd"


def test_bytes_that_are_no_text_do_not_stall():
    assert stream([b"\xff", b"\xc3", b"a"])[0] == ["\ufffd", "", "\ufffda"]


def test_exactly_the_longest_start_of_a_stop_is_held_back():
    deltas, tail, text = stream([b"ab", b"ab", b"x"], stop=("abac",))
    assert deltas == ["", "ab", "abx"] and tail == "" and text.matched is None
    assert stream([b"xaba"], stop=("abac",))[0] == ["x"]


def test_held_text_comes_out_at_the_end():
    deltas, tail, text = stream([b"hello wor"], stop=("world",))
    assert deltas == ["hello "] and tail == "wor" and text.text == "hello wor"


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one STOP")])
def test_the_text_is_cut_at_the_stop(include, expected):
    deltas, tail, text = stream([b"one ST", b"OP two"], stop=("STOP",), include_stop=include)
    assert "".join(deltas) == text.text == expected and tail == "" and text.matched == "STOP"
    assert text.push(0) == "" and text.finish() == ""


def test_first_complete_wins_then_the_longest():
    assert stream([b"abcd"], stop=("abcd", "bc"))[2].matched == "bc"
    assert stream([b"abc"], stop=("bc", "abc"))[2].matched == "abc"
    assert stream([b"abc"], stop=("abc", "bc"))[2].matched == "abc"


def test_special_tokens_are_left_out():
    deltas, _, _ = stream([b"a", b"<eos>", b"b"], skip_ids=frozenset({1}))
    assert deltas == ["a", "", "b"]
    assert stream([b"\xc3", b"<x>", b"\xa9"], skip_ids=frozenset({1}))[2].text == "é"


def test_one_leading_space_is_stripped():
    assert stream([b"", b"  a", b" b"], strip_leading_space=True)[2].text == " a b"
    assert stream([b"a b"], strip_leading_space=True)[2].text == "a b"


def test_min_tokens_hide_their_text_from_stops():
    deltas, _, text = stream([b"stop", b"stop"], stop=("stop",), min_tokens=1)
    assert deltas == ["stop", ""] and text.matched == "stop"
    assert stream([b"st", b"op"], stop=("stop",), min_tokens=1)[2].matched is None


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        TextStream(bytes, stop=("",))


def test_a_long_repetitive_stop_is_linear():
    """64 stops of 256 equal characters: a quadratic matcher would take minutes."""
    stops = tuple("a" * 255 + chr(ord("b") + i) for i in range(20))
    _, tail, text = stream([b"a"] * 3000, stop=stops)
    assert len(text.text) == 3000 and len(tail) == 255


letters = st.sampled_from(["a", "b", "é", "🙂", " "])
words = st.text(letters, min_size=1, max_size=4)
noise = st.lists(
    st.sampled_from(
        [b"a", b"b", b"a", b"b", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b" ", b"\xff"]
    ),
    max_size=25,
).map(b"".join)


@settings(max_examples=count(reduced=400, full=5000), deadline=None)
@given(
    data=st.text(letters, max_size=25).map(str.encode) | noise,
    places=st.lists(st.integers(0, 1000), max_size=20),
    stops=st.lists(words | st.just("\ufffd"), max_size=4).map(tuple),
    include=st.booleans(),
    strip=st.booleans(),
)
def test_equals_the_naive_truth_however_it_is_cut(data, places, stops, include, strip):
    pieces = cut(data, places)
    deltas, tail, text = stream(pieces, stop=stops, include_stop=include, strip_leading_space=strip)
    at_once = TextStream(
        pieces.__getitem__, stop=stops, include_stop=include, strip_leading_space=strip
    )
    middle = len(pieces) // 2
    halves = [at_once.extend(range(middle)), at_once.extend(range(middle, len(pieces)))]
    assert halves == ["".join(deltas[:middle]), "".join(deltas[middle:])]
    assert (at_once.finish(), at_once.text, at_once.matched) == (tail, text.text, text.matched)
    whole = data.decode("utf-8", "replace")
    if strip:
        whole = whole.removeprefix(" ")
    found = first_stop(whole, stops)
    if found is None:
        assert text.matched is None
        expected = whole
    else:
        end, text_of_stop = found
        assert text.matched == text_of_stop
        expected = whole[: end if include else end - len(text_of_stop)]
    assert "".join(deltas) + tail == text.text == expected


@settings(max_examples=count(reduced=200, full=2000), deadline=None)
@given(
    text=st.text(letters, max_size=20),
    stops=st.lists(words, min_size=1, max_size=3).map(tuple),
)
def test_holds_back_nothing_that_no_stop_can_need(text, stops):
    """After each character: held = the longest end of the text that begins some stop string."""
    pieces = [c.encode() for c in text]
    out = TextStream(pieces.__getitem__, stop=stops)
    for i in range(len(pieces)):
        out.push(i)
        if out.matched is not None:
            return
        seen = text[: i + 1]
        held = max(
            n for s in stops for n in range(len(s)) if seen.endswith(s[:n]) and n <= len(seen)
        )
        assert out.text == seen[: len(seen) - held]


def test_pieces_are_kept_to_a_bound():
    asked = []

    def token_bytes(token: int) -> bytes:
        asked.append(token)
        return b"%d" % token

    pieces = TokenPieces(token_bytes, 50_000)
    for token in range(20_000):
        assert pieces[token] == b"%d" % token
    assert len(pieces) <= 4096
    assert pieces[19_999] == b"19999" and len(asked) == 20_000  # the latest are known
