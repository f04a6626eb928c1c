"""The sampler's inputs from history, against their definitions written out."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine.core.history import (
    MAX_DRY_PENALTY,
    bad_word_bans,
    banned_ngram_tokens,
    dry_penalties,
    token_counts,
)
from engineroom.engine.core.sampling_params import SamplingParams
from tests.counts import count

tokens = st.lists(st.integers(0, 3), max_size=24)
many = settings(max_examples=count(reduced=200, full=3000), deadline=None)


def test_counts():
    assert token_counts([5, 1, 5], [2, 2, 1]) == {1: 1, 2: 2, 5: 0}
    assert list(token_counts([9, 3], [7])) == [3, 7, 9]


def test_ngrams():
    assert banned_ngram_tokens([1, 2, 3, 1, 2], 3) == {3}
    assert banned_ngram_tokens([1, 2, 3, 1, 2], 1) == {1, 2, 3}
    assert banned_ngram_tokens([1, 2], 3) == banned_ngram_tokens([1, 1], 0) == set()


@many
@given(tokens, st.integers(1, 5))
def test_ngrams_by_definition(seq, n):
    grams = {tuple(seq[i : i + n]) for i in range(len(seq) - n + 1)}
    banned = {t for t in range(4) if tuple([*seq, t][-n:]) in grams and len(seq) >= n - 1}
    assert banned_ngram_tokens(seq, n) == banned


def test_bad_words():
    assert bad_word_bans([1, 2], [(3,), (2, 4), (1, 2, 5), (9, 2, 6), (0, 1, 2, 7), ()]) == {
        3,
        4,
        5,
    }
    assert bad_word_bans([], [(3,), (2, 4)]) == {3}


def params(**options):
    return SamplingParams(**{"dry_multiplier": 0.5, "dry_base": 2.0, **options})


def test_dry():
    seq = [1, 2, 3, 9, 1, 2, 3]
    assert dry_penalties(seq, params()) == {9: 0.5 * 2.0 ** (3 - 2)}
    assert dry_penalties(seq, params(dry_allowed_length=4)) == {}
    assert dry_penalties(seq, params(dry_range=4)) == {}
    assert dry_penalties(seq, params(), frozenset({2})) == {}
    assert dry_penalties(seq, params(), frozenset({1})) == {9: 0.5}
    assert dry_penalties(seq, params(), frozenset({9})) == {}
    assert dry_penalties(seq, SamplingParams()) == {}
    assert dry_penalties([], params()) == dry_penalties([1], params()) == {}


def naive_dry(seq, p, breakers):
    recent = seq[-p.dry_range :] if p.dry_range else seq
    best = {}
    for end in range(len(recent) - 1):  # an earlier occurrence ends here, its follower is next
        length = 0
        while (
            end - length >= 0
            and recent[end - length] == recent[-1 - length]
            and recent[end - length] not in breakers
        ):
            length += 1
        follower = recent[end + 1]
        if length >= p.dry_allowed_length and follower not in breakers:
            best[follower] = max(best.get(follower, 0), length)
    return {t: p.dry_multiplier * p.dry_base ** (n - p.dry_allowed_length) for t, n in best.items()}


@many
@given(
    tokens,
    st.integers(1, 4),
    st.sampled_from([0, 1, 3, 10]),
    st.frozensets(st.integers(0, 3), max_size=2),
)
def test_dry_by_definition(seq, allowed, window, breakers):
    p = params(dry_allowed_length=allowed, dry_range=window)
    assert dry_penalties(seq, p, breakers) == naive_dry(seq, p, breakers)


def test_dry_stays_finite_and_linear():
    found = dry_penalties([1] * 50_000, params(dry_base=100.0))
    assert found == {1: MAX_DRY_PENALTY} and math.isfinite(MAX_DRY_PENALTY)
