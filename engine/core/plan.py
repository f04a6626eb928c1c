"""A step, planned and answered: what the scheduler asks of the hands, and what they return.

Frozen and complete at construction; plain ints and floats, so that the brain needs no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .request import Request

SAMPLE = -1  # a logit row's target: sample a token there
PENDING = -1  # a token id still being computed by the step in flight


class ScheduledRequest(NamedTuple):
    """One request's share of a step: tokens [start, start + len(token_ids)) of its sequence.

    `block_ids` covers every position below start + len(token_ids); it is the request's own table,
    not a copy, and may grow while the plan is in flight: entries never change, later ones are
    not this step's. `logit_offsets` are indices into token_ids whose logits are wanted,
    ascending; `targets` says for each what to do there: SAMPLE, or the id of the prompt token
    that follows, whose logprob is wanted.
    """

    request: Request
    start: int
    token_ids: Sequence[int]
    block_ids: Sequence[int]
    logit_offsets: Sequence[int]
    targets: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def samples(self) -> bool:
        """True where this step brings the request a new token."""
        return bool(self.targets) and self.targets[-1] == SAMPLE

    @property
    def decodes(self) -> bool:
        """True where all that is computed is the last token generated."""
        request, start, tokens, _, _, targets = self
        return (
            start >= request.num_prompt_tokens
            and len(tokens) == 1
            and bool(targets)
            and targets[-1] == SAMPLE
        )

    @property
    def log_entry(self) -> tuple[str, int, int, str]:
        """Its part of StepRecord.requests; one object for every decoding step of a request."""
        request = self.request
        if self.decodes:
            return request.decode_entry
        return (*request.key, len(self.token_ids), "prefill")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `requests` in packed order; `preempted` lost their blocks for it."""

    step_id: int
    requests: tuple[ScheduledRequest, ...]
    preempted: tuple[Request, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([len(s.token_ids) for s in self.requests])

    @property
    def num_logit_rows(self) -> int:
        return sum([len(s.targets) for s in self.requests])


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw-logit logprob (natural log) of one token, its rank (1 = most likely), and the top k."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class RowResult(NamedTuple):
    """What one logit row gave: the sampled (or target) token, and logprobs where asked."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The answer to a StepPlan: for each of its requests, one RowResult per logit row.

    `errors` ends single requests without harming the step: index into plan.requests -> message
    (a logits processor that raised, for example).
    """

    rows: tuple[tuple[RowResult, ...], ...]
    errors: dict[int, str] | None = None
