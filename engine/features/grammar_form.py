"""GrammarForm: one output on its way through a grammar, and the reserve that lets it end in time.

The reserve is an ending: tokens that lead from here to a whole output. While as many tokens are
left as it has, and some more, any token that the grammar allows may be sampled. When they become
few, a token is taken only where an ending still fits behind it (`settle`), and where an ending is
all that fits, the mask holds no more than the tokens that begin one. So an output that begins with
its reserve ends whole, wherever max_tokens cuts it. All of it depends on the tokens so far alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..core.form import Form
from .endings import Effort, allowed_ids, find_ending
from .grammar import Compiled, Grammars

# Tokens left beyond the reserve from which on every token is settled: what one token may open (an
# object with all its required properties) has to fit in it.
MARGIN: Final = 256
# Before, the reserve is measured anew when it may have grown into the margin, were each token to
# add so many.
_GROWTH: Final = 8
_EFFORT: Final = 1000  # looks at the grammar for one token, some 5 ms at most
_MAX_BEGINNINGS: Final = 16  # tokens of a mask that are tried where an ending is all that fits
_RETRY: Final = 16  # tokens until the next search where one found nothing


class GrammarForm(Form):
    """One sample's. Not thread-safe, and never asked by two threads at once."""

    masks = True

    def __init__(
        self,
        grammars: Grammars,
        compiled: Compiled,
        *,
        max_tokens: int,
        num_mask_words: int,
        ignore_eos: bool,
    ) -> None:
        """`max_tokens` of the output at most; masks have `num_mask_words` words of 32 tokens.

        With `ignore_eos` an end-of-text token is allowed only where no other token is.
        """
        vocabulary = grammars.vocabulary
        self.complete: bool | None = compiled.ending == ()
        self.cut = False
        self.error: str | None = None
        self._vocabulary = vocabulary
        self._words = compiled.words
        self._stands = compiled.stands
        self._matcher = compiled.matcher.deep_copy()
        self._byte_matcher = compiled.byte_matcher
        self._behind: list[int] = []  # tokens that the byte matcher has not been given
        self._num_words = num_mask_words
        self._ignore_eos = ignore_eos
        self._left = max_tokens
        self._ending = compiled.ending
        self._look_at = max_tokens  # the tokens left at which the reserve is looked at
        self._settled: dict[int, tuple[int, ...]] = {}  # of the next token: the ending behind it

    @property
    def near(self) -> bool:  # type: ignore[override]
        """See Form: while the reserve is known and is not all that fits."""
        return self._ending is not None and self._left > len(self._ending)

    def mask(self) -> np.ndarray:
        """The tokens that may come next: u32 [num_mask_words], a bit each, bit 0 first.

        All zero where the grammar gave up; `error` says why.
        """
        self._look()
        words = np.zeros(self._num_words, dtype=np.uint32)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")
        if self._matcher.is_error():
            self._fail()
            return words
        words[: len(found)] = found[: self._num_words]
        if self._stands:  # llguidance lets tokens without bytes through beside those asked for
            asked = self._stands.keys() | self._vocabulary.eos_token_ids
            for token in self._vocabulary.apart:
                if token not in asked:
                    words[token >> 5] &= ~np.uint32(1 << (token & 31))
        if self._ignore_eos:
            self._drop_ends(words)
        if self._ending is not None and 0 < self._left <= len(self._ending):
            self._keep_endings(words, self._ending)
        return words

    def settle(self, token_id: int) -> bool:
        """Whether an ending fits behind this token, which the mask allows."""
        ending = self._ending
        if ending is None or token_id in self._vocabulary.eos_token_ids:
            return True
        left = self._left - 1
        behind = self._behind_token(token_id, ending, left, Effort(_EFFORT))
        if behind is None:
            self.cut = True
            return False
        self._settled = {token_id: behind}
        return True

    def instead(self) -> int:
        """The ending's next token, which is taken where none that was sampled can be settled."""
        assert self._ending
        self._settled = {self._ending[0]: self._ending[1:]}
        return self._ending[0]

    def take(self, token_id: int) -> bool:
        """See Form.take()."""
        if self.error is not None:
            return False
        if token_id in self._vocabulary.eos_token_ids:
            return True
        if not self._matcher.consume_token(token_id):
            self._fail()
            return False
        self._left -= 1
        self._behind.append(token_id)
        self.complete = self._matcher.is_accepting()
        if self._ending is not None:
            self._ending = self._settled.get(token_id)
        self._settled = {}
        return bool(self._matcher.is_stopped())

    # ------------------------------------------------------------------------------- the reserve

    def _look(self) -> None:
        """Measure the reserve where it is time to."""
        if self._left > self._look_at:
            self._ending = None
            return
        if self._ending is None:
            self._ending = self._search((), self._left, Effort(_EFFORT))
        if self._ending is None:
            self._look_at = self._left - _RETRY
            return
        spare = self._left - len(self._ending) - MARGIN
        self._look_at = self._left
        if spare > 0:
            self._look_at = self._left - max(1, spare // (_GROWTH + 1))
            self._ending = None  # nothing needs settling before

    def _keep_endings(self, words: np.ndarray, ending: tuple[int, ...]) -> None:
        """Leave in a mask the tokens that begin an ending of the tokens that are left."""
        allowed = allowed_ids(words.tobytes())
        self.cut = self.cut or len(allowed) > 1
        words[:] = 0
        effort = Effort(_EFFORT)
        self._settled = {ending[0]: ending[1:]}
        for token in allowed if len(allowed) <= _MAX_BEGINNINGS else ():
            behind = self._behind_token(token, ending, self._left - 1, effort)
            if behind is not None and token not in self._vocabulary.eos_token_ids:
                self._settled[token] = behind
        for token in self._settled:
            _set_bit(words, token)

    def _behind_token(
        self, token_id: int, ending: tuple[int, ...], left: int, effort: Effort
    ) -> tuple[int, ...] | None:
        """An ending of at most `left` tokens behind one that is allowed: the rest of the known
        one, or the same again, or a new one."""
        if ending[:1] == (token_id,):
            return ending[1:]
        end = min(self._vocabulary.eos_token_ids)
        if len(ending) <= left:
            wanted = [token_id, *ending, end]
            if self._matcher.validate_tokens(wanted) == len(wanted):
                return ending
        text, taken = self._bytes_of(ending), self._bytes_of((token_id,))
        if text.startswith(taken):  # the same text in other tokens
            rest = self._words.spell(text[len(taken) :])
            if rest is not None and len(rest) <= left:
                return rest
        return self._search((token_id,), left, effort)

    def _search(
        self, token_ids: tuple[int, ...], left: int, effort: Effort
    ) -> tuple[int, ...] | None:
        """An ending of at most `left` tokens behind these, from here."""
        if self._behind:
            new = self._bytes_of(self._behind)
            self._behind = []
            self._byte_matcher = self._byte_matcher.deep_copy()
            if not self._byte_matcher.consume_tokens(list(new)):
                return None
        matcher = self._byte_matcher
        if token_ids:
            matcher = matcher.deep_copy()
            if not matcher.consume_tokens(list(self._bytes_of(token_ids))):
                return None
        found = find_ending(matcher, self._words, effort, 16 * (left + 1), enough=left // 2)
        return found if found is not None and len(found) <= left else None

    def _bytes_of(self, token_ids: Sequence[int]) -> bytes:
        """As the byte matcher takes them."""
        texts, stands = self._vocabulary.texts, self._stands
        return b"".join([stands.get(t) or texts[t] for t in token_ids])

    def _drop_ends(self, words: np.ndarray) -> None:
        ends = [t for t in self._vocabulary.eos_token_ids if int(words[t >> 5]) >> (t & 31) & 1]
        if not ends:
            return
        rest = words.copy()
        for token in ends:
            rest[token >> 5] &= ~np.uint32(1 << (token & 31))
        if rest.any():
            words[:] = rest

    def _fail(self) -> None:
        self.error = f"the grammar cannot go on: {self._matcher.get_error()}"[:500]


def _set_bit(words: np.ndarray, token_id: int) -> None:
    words[token_id >> 5] |= np.uint32(1 << (token_id & 31))


__all__ = ["MARGIN", "GrammarForm"]
