"""A model that is none: tokens by a pure function, a KV cache of token ids, the naive truth."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from engineroom.engine.core.answers import FinishReason, TokenLogprob
from engineroom.engine.core.plan import SAMPLE, ScheduledRequest, StepOutcome, StepPlan
from engineroom.engine.core.request import PENDING, Request
from engineroom.engine.core.sampling_params import SamplingParams

EOS = 0
# Pieces that split characters (é is 2 bytes, 🙂 is 4), repeat, and overlap the stop strings.
PIECES = (
    b"", b"a", b"b", b"ab", b"ba", b" ", b"\xc3", b"\xa9", b"\xc3\xa9", b"\xf0\x9f", b"\x99\x82",
    b"aab", b"\n", b"x", b"xy", b"yx", b"\xff",
)  # fmt: skip
VOCAB = len(PIECES)
STOPS = ("ab", "aab", "xyx", "é", "b é", "\n\n", "ba b", "🙂", "yxa")
BANNED_EVERYTHING = -1


def token_bytes(token: int) -> bytes:
    return PIECES[token]


def mix(*numbers: int) -> int:
    """A fixed hash: the same on every machine and in every run."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state


@dataclass(frozen=True)
class Script:
    """What a sequence's model says: depends on prompt, seed and sample alone."""

    base: int
    dead_end: int | None = None  # from this output index on, no token is allowed

    @classmethod
    def of(cls, prompt: tuple[int, ...], seed: int, sample: int, dead_end: int | None) -> Script:
        return cls(mix(seed, sample, *prompt), dead_end)

    def token(self, index: int) -> int:
        if self.dead_end is not None and index >= self.dead_end:
            return BANNED_EVERYTHING
        return mix(self.base, index) % VOCAB


def score(position: int, token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(position) - token / 64, 1 + token)


@dataclass(frozen=True)
class Truth:
    """A request's whole answer."""

    tokens: tuple[int, ...]
    text: str
    reason: FinishReason
    stop: str | int | None


def truth(script: Script, params: SamplingParams, max_tokens: int, eos: frozenset[int]) -> Truth:
    """The answer, naively: everything decoded anew after each token, stop strings by find()."""
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
    tokens: list[int] = []
    shown: list[int] = []
    while len(tokens) < max_tokens:
        token = script.token(len(tokens))
        if token == BANNED_EVERYTHING:
            return Truth(tuple(tokens), _decode(shown), FinishReason.ERROR, None)
        tokens.append(token)
        stopped = token in stop_ids and len(tokens) >= params.min_tokens
        if not stopped or params.include_stop_str_in_output:
            shown.append(token)
        last = stopped or len(tokens) == max_tokens
        safe = len(_decode(shown[: params.min_tokens], final=False))
        found = first_stop(_decode(shown, final=last), params.stop, safe)
        if found is not None and len(shown) > params.min_tokens:
            end, stop_string = found
            cut = end if params.include_stop_str_in_output else end - len(stop_string)
            return Truth(
                tuple(tokens), _decode(shown, final=last)[:cut], FinishReason.STOP, stop_string
            )
        if stopped:
            stop = None if token in eos and not params.ignore_eos else token
            return Truth(tuple(tokens), _decode(shown), FinishReason.STOP, stop)
    return Truth(tuple(tokens), _decode(shown), FinishReason.LENGTH, None)


def first_stop(text: str, stops: tuple[str, ...], start: int = 0) -> tuple[int, str] | None:
    """(end, stop string) of the first to be complete, of several at once the longest."""
    found = [
        (place + len(stop), -len(stop), stop)
        for stop in stops
        if (place := text.find(stop, start)) >= 0
    ]
    return (min(found)[0], min(found)[2]) if found else None


def _decode(tokens: list[int], *, final: bool = True) -> str:
    data = b"".join(PIECES[t] for t in tokens)
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data, final)


class FakeDevice:
    """Executes plans in order on a KV cache that holds token ids, and refuses any inconsistency.

    Before a request's new tokens are written, its table must spell its own earlier tokens: a
    block handed to two, reused too early or hit wrongly cannot pass.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._size = block_size
        self._cache = [[PENDING] * block_size for _ in range(num_blocks)]
        self._sampled: dict[Request, list[int]] = {}  # as the device knows them
        self.scripts: dict[Request, Script] = {}
        self.num_tokens = 0

    def execute(self, plan: StepPlan) -> StepOutcome:
        rows = [row for s in plan.requests for row in self._run(s)]
        logprobs = {row: entry for row, (_, entry) in enumerate(rows) if entry is not None}
        return StepOutcome([token for token, _ in rows], logprobs)

    def _run(self, s: ScheduledRequest) -> list[tuple[int, TokenLogprob | None]]:
        request, size, cache = s.request, self._size, self._cache
        output = self._sampled.setdefault(request, [])
        prompt = request.token_ids[: request.num_prompt_tokens]
        end = s.start + len(s.token_ids)
        sequence = prompt + output
        tokens = sequence[s.start : end]
        self.num_tokens += len(tokens)
        assert len(tokens) == len(s.token_ids), "computes tokens that do not exist"
        assert all(p in (t, PENDING) for p, t in zip(s.token_ids, tokens, strict=True)), (
            "computes other tokens than the request's"
        )
        table = s.block_ids
        kept = [t for block in table[: -(-s.start // size)] for t in cache[block]][: s.start]
        assert kept == sequence[: s.start], f"{request}: its cache holds another's tokens"
        for position, token in enumerate(tokens, start=s.start):
            cache[table[position // size]][position % size] = token
        rows: list[tuple[int, TokenLogprob | None]] = []
        for offset, target in zip(s.logit_offsets, s.targets, strict=True):
            position = s.start + offset + 1
            if target == SAMPLE:
                assert position == len(sequence), "samples where a token is known"
                token = self.scripts[request].token(position - len(prompt))
                output.append(token)
                wants = request.params.logprobs is not None
                rows.append((token, score(position, token) if wants else None))
            else:
                assert target == sequence[position], "scores another token than the prompt's"
                rows.append((target, score(position, target)))
        return rows
