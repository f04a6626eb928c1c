"""Token ids to text, one at a time: never half a character, never part of a stop string."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from functools import lru_cache

__all__ = ["TextStream", "TokenPieces"]


_KEPT = 4096  # pieces: most of any text


class TokenPieces(dict[int, bytes]):
    """Token id -> the bytes it adds to a text, asked of a tokenizer once each while few are known.

    A model's head may have more rows than its tokenizer has tokens (padding): they spell nothing.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], vocab_size: int) -> None:
        super().__init__()
        self._token_bytes = token_bytes
        self._vocab_size = vocab_size

    def __missing__(self, token_id: int) -> bytes:
        if len(self) >= _KEPT:  # drawn text goes on meeting new tokens for days
            self.clear()
        piece = self[token_id] = self._token_bytes(token_id) if token_id < self._vocab_size else b""
        return piece


class TextStream:
    """The growing text of one sequence, and the stop string that ends it.

    The text is the UTF-8 decoding (errors="replace") of the tokens' bytes, `skip_ids` left out,
    less one leading space where `strip_leading_space`. The first stop string to be complete in
    it, reading character by character, ends it (of several complete at once, the longest), and
    the text is cut before it, or after it with `include_stop`. Text of the first `min_tokens`
    tokens is no part of a match. So the result does not depend on how text falls into tokens,
    and what push() returned is never taken back: it holds back exactly the longest end of the
    text that could still become a stop string, and the bytes of an unfinished character.
    """

    __slots__ = (
        "_bytes",
        "_depths",
        "_failures",
        "_first",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_num_pushed",
        "_skip_ids",
        "_stop",
        "_strip",
        "_token_bytes",
        "matched",
        "text",
    )

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_ids: frozenset[int] = frozenset(),
        strip_leading_space: bool = False,
        min_tokens: int = 0,
    ) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        self._token_bytes = token_bytes
        self._include_stop = include_stop
        self._skip_ids = skip_ids
        self._strip = strip_leading_space
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self._bytes = b""  # of an unfinished character
        # One Knuth-Morris-Pratt automaton per stop string: _depths[i] characters of stop i are
        # matched by the end of the text, so the held-back text is as long as the deepest.
        self._stop = tuple(stop)
        self._failures = tuple(_failure_table(s) for s in self._stop)
        self._first = frozenset(s[0] for s in self._stop)
        self._depths = [0] * len(self._stop)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text
        self.text = ""  # everything returned so far

    def push(self, token_id: int) -> str:
        """Add one token. Returns the text that it makes certain; "" once a stop string matched.

        Errors: whatever token_bytes raises.
        """
        if self.matched is not None:
            return ""
        self._num_pushed += 1
        if token_id in self._skip_ids:
            return ""
        data = self._bytes + self._token_bytes(token_id)
        new, used = utf_8_decode(data, "replace", False)
        self._bytes = data[used:]
        if self._stop or self._strip:
            new = self._certain(new)
        self.text += new
        return new

    def extend(self, token_ids: Sequence[int]) -> str:
        """Add several tokens: what push() would return of each, in one."""
        if self._stop:
            return "".join(map(self.push, token_ids))
        self._num_pushed += len(token_ids)
        shown = [token for token in token_ids if token not in self._skip_ids]
        data = self._bytes + b"".join(map(self._token_bytes, shown))
        new, used = utf_8_decode(data, "replace", False)
        self._bytes = data[used:]
        new = self._certain(new)
        self.text += new
        return new

    def finish(self) -> str:
        """No token follows: returns what was held back, an unfinished character as U+FFFD."""
        if self.matched is not None:
            return ""
        cut, _ = utf_8_decode(self._bytes, "replace", True)
        rest = self._certain(cut) + self._held
        self._bytes, self._held = b"", ""
        self.text += rest
        return rest

    def _certain(self, new: str) -> str:
        """What of the held and this new text no later token can make part of a stop string."""
        if self._strip and new:
            self._strip = False
            new = new.removeprefix(" ")
        if new and self._stop and self._num_pushed > self._min_tokens:
            return self._past_stops(new)
        return new

    def _past_stops(self, new: str) -> str:
        """The part of held + new text that is certain; sets `matched` at the first full match."""
        if not self._held and self._first.isdisjoint(new):
            return new
        pending = self._held + new
        for end, char in enumerate(new, start=len(self._held) + 1):
            length = self._advance(char)
            if length:
                self.matched = pending[end - length : end]
                self._held = ""
                return pending[: end if self._include_stop else end - length]
        keep = len(pending) - max(self._depths)
        self._held = pending[keep:]
        return pending[:keep]

    def _advance(self, char: str) -> int:
        """One character through every automaton: the length of the longest match it completes."""
        longest = 0
        depths = self._depths
        for i, stop in enumerate(self._stop):
            depth = depths[i]
            if depth == 0:
                if stop[0] != char:
                    continue
                depth = 1
            else:
                failure = self._failures[i]
                while depth and stop[depth] != char:
                    depth = failure[depth - 1]
                if stop[depth] == char:
                    depth += 1
            if depth == len(stop):
                longest = max(longest, depth)
                depth = self._failures[i][depth - 1]
            depths[i] = depth
        return longest


@lru_cache(maxsize=1024)
def _failure_table(stop: str) -> tuple[int, ...]:
    """[i] = length of the longest proper prefix of stop[:i + 1] that is also its suffix."""
    table = [0] * len(stop)
    depth = 0
    for i in range(1, len(stop)):
        while depth and stop[i] != stop[depth]:
            depth = table[depth - 1]
        if stop[i] == stop[depth]:
            depth += 1
        table[i] = depth
    return tuple(table)
