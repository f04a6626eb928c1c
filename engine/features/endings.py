"""Endings: the shortest way from where an output stands to where its grammar is satisfied.

The search walks a grammar byte by byte, since a grammar has far fewer bytes to choose from than a
model has tokens; `Words` then spells the bytes found in as few tokens as there can be. First it
goes straight ahead, closing what is open; then it tries the other ways at each fork of the path
found, and keeps what is shorter. Forks that do not depend on each other (values of properties,
alternatives of an enum) so get their shortest form each. The work is counted, not timed: the same
grammar and output have the same ending everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np

END: Final = 256  # the byte grammar's end-of-text token
# No UTF-8 text has these bytes: each stands for a special token that a grammar asks for.
TOKENS: Final = range(0xF8, 0x100)
_FORCED: Final = re.compile(rb"\xff\[(\d+)\]")  # a token among forced bytes, as llguidance has it
_MANY = 24  # ways at one place: more of them are text
_REFINED = 3  # forks behind another way that are looked at before it is judged
_ALIKE = (64, 32, 16, 8, 4, 2, 0)  # bytes before forks that may be the same, the most first
_MAX_WORD = 48  # bytes
_KEPT = 1024  # spelled texts, and masks of bytes
_SPACES = frozenset(b" \t\n\r")
# What ends soonest first. Only between JSON's values may a newline stand: elsewhere it is text.
_BETWEEN = b'}],"0123456789ntf:'
_WITHIN = b'"a0'


class Words:
    """A model's tokens by their bytes, special ones left out."""

    def __init__(self, words: Mapping[bytes, int]) -> None:
        self._ids = {word: i for word, i in words.items() if 0 < len(word) <= _MAX_WORD}
        found: dict[bytes, set[int]] = {}
        for word in self._ids:
            found.setdefault(word[:2], set()).add(len(word))
        # By the first two bytes: the lengths of such words, the longest first.
        self._lengths = {key: tuple(sorted(lens, reverse=True)) for key, lens in found.items()}
        # Outputs of a form end in much the same way, whatever they hold.
        self._known = lru_cache(maxsize=_KEPT)(self._spell)

    def beside(self, more: Mapping[bytes, int]) -> Words:
        """These, and more."""
        return Words({**self._ids, **more}) if more else self

    def spell(self, text: bytes) -> tuple[int, ...] | None:
        """The fewest tokens whose bytes are `text`; None where a byte is in no token."""
        return self._known(text)

    def _spell(self, text: bytes) -> tuple[int, ...] | None:
        ids, lengths, size = self._ids, self._lengths, len(text)
        fewest: list[tuple[int, int]] = [(0, 0)] * (size + 1)  # (tokens to the end, length)
        for start in range(size - 1, -1, -1):
            best = (size + 1, 0)
            for length in (*lengths.get(text[start : start + 2], ()), 1):
                if start + length > size:
                    continue
                rest = fewest[start + length][0] + 1
                if rest < best[0] and text[start : start + length] in ids:
                    best = (rest, length)
            fewest[start] = best
        found, at = [], 0
        while at < len(text):
            length = fewest[at][1]
            if not length:
                return None
            found.append(ids[text[at : at + length]])
            at += length
        return tuple(found)


@dataclass
class Effort:
    """What a search may still spend, in looks at the grammar."""

    left: int


@dataclass(frozen=True)
class _Path:
    text: bytes
    forks: tuple[tuple[int, bytes], ...]  # where, and the ways there
    tokens: tuple[int, ...] | None  # None: it leads nowhere

    @property
    def cost(self) -> tuple[int, int]:
        return (1 << 30, 0) if self.tokens is None else (len(self.tokens), len(self.text))

    @cached_property
    def _taken(self) -> dict[tuple[bytes, bytes], bytes]:
        """By the ways of a fork, and bytes before it: the one taken."""
        return {
            (ways, self.text[max(0, at - size) : at]): self.text[at : at + 1]
            for size in _ALIKE
            for at, ways in (self.forks if self.tokens is not None else ())
        }

    def way(self, before: bytes, ways: bytes) -> bytes:
        """The one of these ways that it takes where it stands before the same ones, behind bytes
        that end most like `before`; the first where it never does."""
        for size in _ALIKE:
            found = self._taken.get((ways, before[max(0, len(before) - size) :]))
            if found is not None:
                return found
        return ways[:1]


_NOTHING = _Path(b"", (), None)


@dataclass(frozen=True)
class _Search:
    matcher: Any
    words: Words
    effort: Effort
    limit: int  # bytes of a path
    enough: int  # tokens

    def improved(self, path: _Path) -> _Path:
        """The path with other ways at its forks, as long as that makes it cheaper: once from the
        first fork on (twice where it leads nowhere), then from the last one back, looking further
        at each."""
        for refined in (False, True):
            at = 0
            while at < len(path.forks) and not self._done(path):
                path = self._best_at(path, at, refined=refined)
                at += 1
            if path.tokens is not None:
                break
        better = path.tokens is not None
        while better:
            before = path
            for at in range(len(path.forks) - 1, -1, -1):
                if self._done(path):
                    return path
                path = self._best_at(path, at, refined=True)
            better = path.cost < before.cost
        return path

    def _done(self, path: _Path) -> bool:
        return self.effort.left <= 0 or path.cost[0] <= self.enough

    def _best_at(self, path: _Path, at: int, *, refined: bool) -> _Path:
        """The cheapest of the ways at one fork, each straight ahead; `refined`, with the best ways
        at the next forks behind it."""
        where, ways = path.forks[at]
        best = path
        for way in ways:
            if self.effort.left <= 0:
                break
            if path.text[where : where + 1] == bytes([way]):
                continue
            start = _Path(path.text[:where] + bytes([way]), path.forks[: at + 1], None)
            other = self.ahead(start, like=best)
            if refined:
                for behind in range(at + 1, at + 1 + _REFINED):
                    if behind < len(other.forks):
                        other = self._best_at(other, behind, refined=False)
            if other.cost < best.cost:
                best = other
        return best

    def ahead(self, start: _Path, like: _Path = _NOTHING) -> _Path:
        """From the end of `start`, taking at each fork the way that `like` takes where it stands
        before the same one, else the first."""
        matcher = self.matcher.deep_copy()
        text, forks = bytearray(start.text), list(start.forks)

        def path(tokens: tuple[int, ...] | None) -> _Path:
            return _Path(bytes(text), tuple(forks), tokens)

        if not matcher.consume_tokens(list(text)):
            return path(None)
        while not matcher.is_accepting():
            if len(text) >= self.limit or self.effort.left <= 0:
                return path(None)
            self.effort.left -= 1
            step = _FORCED.sub(_stand, matcher.compute_ff_bytes())
            if not step:
                ways = _ways(matcher.compute_bitmask())
                step = ways
                if len(ways) > 1:
                    forks.append((len(text), ways))
                    step = like.way(bytes(text), ways)
            if not step or not matcher.consume_tokens(list(step)):
                return path(None)
            text += step
        return path(self.words.spell(bytes(text)))


def find_ending(
    matcher: Any, words: Words, effort: Effort, max_bytes: int, *, enough: int = 0
) -> tuple[int, ...] | None:
    """Tokens that lead the byte grammar `matcher` from its state to a satisfied one, few of them;
    `enough` or fewer are not bettered.

    None where the effort did not suffice or no ending has at most `max_bytes`.
    """
    for limit in [limit for limit in (128, 1024) if limit < max_bytes] + [max_bytes]:
        search = _Search(matcher, words, effort, limit, enough)
        path = search.ahead(_NOTHING)
        if path.tokens is None and limit < max_bytes:  # half for this length, the rest for others
            search = _Search(matcher, words, Effort(effort.left // 2), limit, enough)
            effort.left -= search.effort.left
        path = search.improved(path)
        if path.tokens is not None:
            return path.tokens
    return None


def _stand(forced: re.Match[bytes]) -> bytes:
    return bytes([int(forced[1])])


@lru_cache(maxsize=_KEPT)
def _ways(mask: bytes) -> bytes:
    """The bytes of a mask to try, the most promising first; white space between JSON's values, and
    where there is much else, only if there is nothing else."""
    found = [b for b in allowed_ids(mask) if b < END]
    order = _BETWEEN if 10 in found else _WITHIN
    solid = [b for b in found if b not in _SPACES]
    spaces = [b for b in found if b in _SPACES and order is _WITHIN and len(solid) <= _MANY]
    tokens = [b for b in found if b in TOKENS]
    if len(solid) > _MANY:
        if tokens:
            return bytes(tokens)  # text, which such a token ends
        if order is _WITHIN and order[0] in solid:
            return order[:1]  # text that may end
        solid = list({_kind(b): b for b in reversed(solid)}.values())[::-1]
    first = [b for b in order if b in solid]
    return bytes(first + [b for b in solid if b not in first] + spaces) or bytes(found[:1])


def _kind(byte: int) -> int:
    """In text letters of a case stand for each other, and so do digits, and bytes beyond ASCII."""
    if byte >= 128:
        return 128
    char = chr(byte)
    return (
        ord("a" if char.islower() else "A" if char.isupper() else "0") if char.isalnum() else byte
    )


def allowed_ids(mask: bytes) -> list[int]:
    """The ids whose bits are set in a mask of llguidance's."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    ids: list[int] = np.flatnonzero(bits).tolist()
    return ids


__all__ = ["END", "TOKENS", "Effort", "Words", "allowed_ids", "find_ending"]
