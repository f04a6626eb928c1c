"""A stretch: steps of one roster that only decode, in which nothing has to be decided.

Each of its requests gets one token a step, none reaches its length, and nobody who waits could be
admitted. So neither planner nor scheduler looks at them one by one: what a step sampled is kept as
it came, and a request catches up when somebody reads it, at the latest when a block of it is full.
Behind a step whose weights went through every cache, each object looked at comes from memory.

A request in a stretch is as though the steps planned and not committed did not exist; close()
leaves each where it would stand had there been no stretch.
"""

from __future__ import annotations

from collections.abc import Sequence

from .answers import Growth
from .plan import Roster, StepOutcome
from .request import PENDING

__all__ = ["Stretch"]


class Stretch:
    """Its step n computes position starts[i] + n of the roster's request i.

    `planned` and `committed`: how many steps. Before step `end` no request reaches its length.
    `read`: the places of those whose every token is read as it comes; each with what makes its text
    of a token, where a token tells no more than that. `growing`: those, with their ids,
    whose reader wants nothing but that text and the token: see grow().
    """

    __slots__ = (
        "_block_size",
        "_caught_up",
        "_tokens",
        "_turns",
        "_untold",
        "committed",
        "end",
        "growing",
        "planned",
        "read",
        "roster",
        "starts",
        "stop_ids",
    )

    def __init__(self, roster: Roster, block_size: int) -> None:
        """Of a roster whose requests all decode. A plan in flight, if there is one, is of it too,
        and becomes the stretch's first step."""
        requests = roster.requests
        self.roster = roster
        self.starts = [request.num_computed for request in requests]
        self.planned = requests[0].in_flight
        self.committed = 0
        self.end = min([r.max_length - r.num_computed for r in requests]) - 2
        self.read = [
            (place, request.text.push if request.tells_text and request.text is not None else None)
            for place, request in enumerate(requests)
            if not (request.unread or request.tells_growth)
        ]
        self.growing = [
            (place, request.request_id, request.text.push)
            for place, request in enumerate(requests)
            if request.tells_growth and request.text is not None
        ]
        self._untold: list[tuple[int, None]] = []
        self.stop_ids = frozenset[int]().union(*{request.stop_ids for request in requests})
        if self.planned:
            for request in requests:
                request.unplan(self.planned)
        self._block_size = block_size
        self._turns: list[list[int]] = [[] for _ in range(block_size)]
        for place, start in enumerate(self.starts):
            self._turns[-start % block_size].append(place)
        self._caught_up = [0] * len(requests)  # steps that each request knows of
        # What step n sampled, at n % block_size. That of the step before the first:
        self._tokens: list[Sequence[int]] = [()] * block_size
        self._tokens[-1] = [request.token_ids[-1] for request in requests]

    def next_tokens(self) -> Sequence[int]:
        """What the next step computes: what the last one sampled, if that is known."""
        if self.planned > self.committed:
            return [PENDING] * len(self.starts)
        return self._tokens[(self.planned - 1) % self._block_size]

    def turn(self, step: int) -> list[int]:
        """The places of those for whom the step begins a block."""
        return self._turns[step % self._block_size]

    def is_plain(self, outcome: StepOutcome) -> bool:
        """Whether a step brought each request a token that is no end by itself."""
        token_ids = outcome.token_ids
        return not outcome.errors and min(token_ids) >= 0 and self.stop_ids.isdisjoint(token_ids)

    def grow(self, token_ids: Sequence[int]) -> list[Growth]:
        """What a step, not yet taken, tells of requests that are read by growths; they need not
        catch up for it."""
        growths = []
        for place, request_id, push in self.growing:
            token = token_ids[place]
            try:
                growths.append(Growth(request_id, (token,), push(token)))
            except Exception:  # who makes its text again will meet it again
                self._untold.append((place, None))
        return growths

    def untold(self) -> list[tuple[int, None]]:
        """Those of whom grow() could not tell, as `read` has them."""
        places, self._untold = self._untold, []
        return places

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Commit a step. Returns the places of those whose block it filled; they have caught up."""
        self._tokens[self.committed % self._block_size] = token_ids
        self.committed += 1
        full = self.turn(self.committed)
        for place in full:
            self.catch_up(place)
        return full

    def catch_up(self, place: int) -> None:
        """Bring a request to the last step committed."""
        since, size = self._caught_up[place], self._block_size
        if since < self.committed:
            tokens = self._tokens
            new = [tokens[step % size][place] for step in range(since, self.committed)]
            self.roster.requests[place].advance(new)
            self._caught_up[place] = self.committed

    def close(self) -> None:
        """Bring all requests to where they stand, plans in flight included."""
        for place, request in enumerate(self.roster.requests):
            self.catch_up(place)
            for _ in range(self.planned - self.committed):
                request.plan_token()
