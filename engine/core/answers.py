"""What a request is answered with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from .cost import Cost


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw-logit logprob (natural log) of one token, its rank (1 = most likely), and the top k."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI interface."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token from the raw logits; rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request: prompt_tokens counts cached_tokens too."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. queued_s (which counts time preempted) + prefill_s + decode_s = total_s."""

    queued_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    time_to_first_token_s: float | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample's output so far. logprobs: per output token, token id -> Logprob. complete:
    whether the text is whole in the form that was asked for (None: none was)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int
    error: str | None = None
    complete: bool | None = None


class Growth(NamedTuple):
    """What a request gained since its latest RequestOutput or Growth, and nothing else."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str

    def then(self, later: Growth) -> Growth:
        """Both in one."""
        return Growth(self.request_id, self.token_ids + later.token_ids, self.text + later.text)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request's answer so far, whole each time; deltas[i] is what outputs[i].text gained.

    prompt_logprobs: per prompt token, None for the first. cost: of all samples, so far; None where
    no engine of ours computed it. embedding: of a request that asked for one, once finished; of
    unit length.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    usage: Usage
    timings: Timings
    deltas: tuple[str, ...]
    cost: Cost | None = None
    embedding: tuple[float, ...] | None = None
