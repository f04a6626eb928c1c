"""What the tokens so far forbid or penalise: pure functions, for the sampler's sparse inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence, Set

from .sampling_params import SamplingParams

__all__ = [
    "MAX_DRY_PENALTY",
    "bad_word_bans",
    "banned_ngram_tokens",
    "dry_penalties",
    "token_counts",
]

MAX_DRY_PENALTY = 1e6  # beyond any logit, and finite in fp32 however long a repetition grows


def token_counts(prompt: Iterable[int], output: Sequence[int]) -> dict[int, int]:
    """Every distinct token so far, ascending -> how often the OUTPUT has it (0: prompt only)."""
    counts = Counter(output)
    return {token: counts[token] for token in sorted(counts.keys() | set(prompt))}


def banned_ngram_tokens(tokens: Sequence[int], n: int) -> frozenset[int]:
    """Tokens that would repeat an n-gram of `tokens` (prompt and output). n = 0 bans nothing."""
    if n <= 0 or len(tokens) < n:
        return frozenset()
    if n == 1:
        return frozenset(tokens)
    tail = tuple(tokens[len(tokens) - n + 1 :])
    last, width = tail[-1], n - 1
    return frozenset(
        tokens[i + 1]
        for i in range(width - 1, len(tokens) - 1)
        if tokens[i] == last and tuple(tokens[i - width + 1 : i + 1]) == tail
    )


def bad_word_bans(tokens: Sequence[int], bad_word_ids: Iterable[Sequence[int]]) -> frozenset[int]:
    """The last token of every bad word whose earlier tokens end `tokens`."""
    banned = set()
    for word in bad_word_ids:
        if not word:
            continue
        start = len(tokens) - len(word) + 1
        if start >= 0 and tuple(tokens[start:]) == tuple(word[:-1]):
            banned.add(word[-1])
    return frozenset(banned)


def dry_penalties(
    tokens: Sequence[int], params: SamplingParams, breakers: Set[int] = frozenset()
) -> dict[int, float]:
    """DRY: token -> penalty > 0 to subtract from its logit, for tokens that extend a repetition.

    With L the length of the longest earlier occurrence of a suffix of `tokens` (no breaker in it)
    that was followed by token t: penalty(t) = dry_multiplier * dry_base ** (L -
    dry_allowed_length) where L >= dry_allowed_length, at most MAX_DRY_PENALTY. Looks at the last
    dry_range tokens (0 = all), in linear time. After p-e-w, text-generation-webui #5677.
    """
    if params.dry_multiplier == 0:
        return {}
    recent = tokens[-params.dry_range :] if params.dry_range > 0 else tokens
    backwards = list(reversed(recent))
    reach = next((i for i, t in enumerate(backwards) if t in breakers), len(backwards))
    if reach < params.dry_allowed_length:
        return {}
    longest: dict[int, int] = {}
    # An occurrence that ends `distance` tokens before the end shares common[distance] tokens.
    common = _common_prefixes(backwards)
    for distance in range(1, len(backwards)):
        length = min(common[distance], reach)
        follower = backwards[distance - 1]
        if length >= params.dry_allowed_length and follower not in breakers:
            longest[follower] = max(longest.get(follower, 0), length)
    return {
        token: _dry_penalty(
            length - params.dry_allowed_length, params.dry_multiplier, params.dry_base
        )
        for token, length in sorted(longest.items())
    }


def _dry_penalty(excess: int, multiplier: float, base: float) -> float:
    # In logarithms first: base ** excess overflows a float for long repetitions.
    if math.log(multiplier) + excess * math.log(base) >= math.log(MAX_DRY_PENALTY):
        return MAX_DRY_PENALTY
    return multiplier * base**excess


def _common_prefixes(items: Sequence[int]) -> list[int]:
    """The Z-array: [i] = length of the longest common prefix of items and items[i:]."""
    n = len(items)
    common = [0] * n
    left = right = 0  # items[left:right] is a known copy of items[:right - left]
    for i in range(1, n):
        length = min(right - i, common[i - left]) if i < right else 0
        while i + length < n and items[length] == items[i + length]:
            length += 1
        common[i] = length
        if i + length > right:
            left, right = i, i + length
    return common
