"""A step, planned and answered: what the scheduler asks of the hands, and what they return.

Frozen and complete at construction; plain ints and floats, so that the brain needs no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from .answers import TokenLogprob
from .request import Request

SAMPLE = -1  # a logit row's target: sample a token there


class Share(NamedTuple):
    """What a step computes of one request: so many tokens, with these logits wanted.

    `logit_offsets` are indices into the tokens, ascending; `targets` says for each what to do
    there: SAMPLE, or the id of the prompt token that follows, whose logprob is wanted. `decodes`:
    all that is computed is the last token generated; every such share is DECODE itself.
    """

    num_tokens: int
    logit_offsets: Sequence[int]
    targets: Sequence[int]
    decodes: bool = False

    @property
    def samples(self) -> bool:
        """True where this step brings the request a new token."""
        return bool(self.targets) and self.targets[-1] == SAMPLE


DECODE = Share(1, (0,), (SAMPLE,), decodes=True)


class ScheduledRequest(NamedTuple):
    """One request's place in a plan: tokens [start, start + len(token_ids)) of its sequence.

    `block_ids` covers every position below start + len(token_ids); it is the request's own table,
    not a copy, and may grow while the plan is in flight: entries never change, later ones are
    not this step's.
    """

    request: Request
    share: Share
    start: int
    token_ids: Sequence[int]
    block_ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return self.share.num_tokens

    @property
    def logit_offsets(self) -> Sequence[int]:
        return self.share.logit_offsets

    @property
    def targets(self) -> Sequence[int]:
        return self.share.targets

    @property
    def samples(self) -> bool:
        return self.share.samples

    @property
    def decodes(self) -> bool:
        return self.share.decodes


@dataclass(frozen=True, eq=False)
class Roster:
    """Who runs in a step and which share each gets, in packed order.

    Consecutive plans have one and the same roster while nothing of it changes, and only then:
    each request then starts where the plan before ended it, in a table that has at most grown. So
    whatever depends on the roster alone is made once and kept for it by whoever needs it.
    """

    requests: tuple[Request, ...]
    shares: tuple[Share, ...]
    tables: tuple[Sequence[int], ...]  # block_ids of each

    @cached_property
    def num_tokens(self) -> int:
        return sum([share.num_tokens for share in self.shares])

    @cached_property
    def num_logit_rows(self) -> int:
        return sum([len(share.targets) for share in self.shares])

    @cached_property
    def only_decodes(self) -> bool:
        return all(share is DECODE for share in self.shares)

    @cached_property
    def log_entries(self) -> tuple[tuple[str, int, int, str], ...]:
        """StepRecord.requests of its steps."""
        return tuple(
            [
                (*request.key, share.num_tokens, "decode" if share.decodes else "prefill")
                for request, share in zip(self.requests, self.shares, strict=True)
            ]
        )

    @cached_property
    def sampling_rows(self) -> tuple[tuple[int, int], ...]:
        """Of each request that samples: its place in the roster, and the logit row that does."""
        ends = accumulate([len(share.targets) for share in self.shares])
        return tuple(
            [
                (place, end - 1)
                for place, (share, end) in enumerate(zip(self.shares, ends, strict=True))
                if share.samples
            ]
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: tokens [starts[i], starts[i] + share) of the roster's request i.

    `token_ids` are those of all its requests, one behind the other; `preempted` lost their blocks
    for it. `turned`: the places of those whose tokens begin a block, while all decode and no other
    table has grown since the plan before; None: not known.
    """

    step_id: int
    roster: Roster
    starts: Sequence[int]
    token_ids: Sequence[int]
    preempted: tuple[Request, ...] = ()
    turned: Sequence[int] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_logit_rows(self) -> int:
        return self.roster.num_logit_rows

    @property
    def requests(self) -> tuple[ScheduledRequest, ...]:
        """The plan request by request, made anew each time: not for every step."""
        roster, out, first = self.roster, [], 0
        for request, share, table, start in zip(
            roster.requests, roster.shares, roster.tables, self.starts, strict=True
        ):
            tokens = self.token_ids[first : first + share.num_tokens]
            first += share.num_tokens
            out.append(ScheduledRequest(request, share, start, tokens, table))
        return tuple(out)

    def part(self, places: Sequence[int]) -> StepPlan:
        """The plan of these requests alone, given by their places in the roster."""
        roster, every = self.roster, self.requests
        tokens = [token for place in places for token in every[place].token_ids]
        chosen = Roster(
            tuple([roster.requests[place] for place in places]),
            tuple([roster.shares[place] for place in places]),
            tuple([roster.tables[place] for place in places]),
        )
        return replace(
            self,
            roster=chosen,
            starts=[self.starts[place] for place in places],
            token_ids=tokens,
            turned=None,
        )


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The answer to a StepPlan: a token for each of its logit rows, the sampled or the target one
    (below 0: none could be sampled), and logprobs of the rows where they were asked for.

    `errors` ends single requests without harming the step: place in the roster -> message (a logits
    processor that raised, for example). What their rows hold is of no account.
    """

    token_ids: Sequence[int]
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
