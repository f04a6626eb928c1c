"""Request: one sequence's state machine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from .answers import FinishReason, Timings, TokenLogprob
from .blocks import KeyChain
from .checks import check_identity, check_weight
from .form import FREE, Form
from .parameter import ParameterError
from .sampling_params import SamplingParams
from .steplog import Timeline

if TYPE_CHECKING:
    from .detokenize import TextStream
    from .fairness import Account


PENDING = -1  # a token id still being computed by the step in flight


class RequestState(Enum):
    """WAITING -> RUNNING -> FINISHED; preemption leads from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class _EveryStep:
    """The fields of a Request that every step reads: side by side, so that they take two lines of a
    cache that the step's weights have emptied, and not seven."""

    __slots__ = (
        "block_ids",
        "decodes",
        "in_flight",
        "max_length",
        "num_computed",
        "num_pending",
        "num_prompt_tokens",
        "num_published",
        "num_scheduled",
        "quiet",
        "state",
        "stop_ids",
        "token_ids",
        "unread",
    )


class Request(_EveryStep):
    """One sequence on its way: prompt, output so far, and how much of it is computed.

    0 <= num_computed <= num_scheduled <= num_tokens, where num_scheduled - num_computed tokens
    are in flight, and block_ids covers every position below num_scheduled. A sequence whose
    next token is still being sampled holds PENDING in its place, counted by num_tokens.
    The scheduler owns every mutable field; others read.
    """

    __slots__ = (
        "_timings",
        "account",
        "adapter",
        "arrival",
        "bad_word_ids",
        "cache_salt",
        "dry_breaker_ids",
        "eos_token_ids",
        "error",
        "finish_reason",
        "first_token_ns",
        "form",
        "key",
        "keys",
        "leader",
        "logprobs",
        "max_prompt_rows",
        "max_tokens",
        "num_cached_tokens",
        "num_charged",
        "num_preemptions",
        "order",
        "params",
        "priority",
        "prompt_logprobs",
        "prompt_rows",
        "request_id",
        "reuses_prefix",
        "sample_index",
        "seed",
        "stop_reason",
        "tells_growth",
        "tells_text",
        "tenant",
        "text",
        "timeline",
        "weight",
    )

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        seed: int,
        sample_index: int = 0,
        priority: int = 0,
        arrival: float = 0.0,
        cache_salt: bytes = b"",
        adapter: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
        dry_breaker_ids: frozenset[int] = frozenset(),
        text: TextStream | None = None,
        leader: Request | None = None,
        form: Form = FREE,
        reuses_prefix: bool = True,
        tenant: str = "",
        weight: float = 1.0,
        final_only: bool = False,
        growths: bool = False,
    ) -> None:
        """`max_tokens` and `seed` are resolved (params may hold None); lower `priority` runs first.
        Without `reuses_prefix` every position is computed, and none taken from the prefix cache.
        `tenant` and its `weight` say whose tokens they are (see fairness.py). With `final_only`
        nobody reads it before its end; with `growths` its reader adds up text and tokens by itself.

        Errors: ParameterError for a bad id, priority, arrival, salt, or min_tokens > max_tokens.
        """
        check_identity(request_id, priority, cache_salt, arrival)
        check_weight(weight)
        if params.min_tokens > max_tokens:
            raise ParameterError(
                "min_tokens",
                f"min_tokens={params.min_tokens} exceeds the {max_tokens} tokens this request may "
                "generate",
            )
        self.request_id = request_id
        self.sample_index = sample_index
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.priority = priority
        self.arrival = arrival
        self.cache_salt = cache_salt
        self.adapter = adapter
        self.eos_token_ids = eos_token_ids
        self.bad_word_ids = bad_word_ids
        self.dry_breaker_ids = dry_breaker_ids
        self.text = text
        self.leader = leader
        self.form = form
        self.reuses_prefix = reuses_prefix
        self.tenant = tenant
        self.weight = weight
        self.account: Account  # the tenant's, once a scheduler has accepted it

        self.token_ids: list[int] = list(prompt_token_ids)  # prompt, output, then PENDING ones
        self.num_prompt_tokens = len(self.token_ids)
        self.num_pending = 0  # sampled in a step still in flight
        self.num_computed = 0  # their K and V are in the cache
        self.num_scheduled = 0  # computed, or being computed by a step in flight
        self.in_flight = 0  # uncommitted plans that name this request
        self.block_ids: list[int] = []  # replaced, never shrunk: a plan in flight may share it
        self.num_published = 0  # leading blocks of block_ids whose keys the cache knows
        self.decodes = False  # a token was sampled since it last started
        self.keys: KeyChain | None = None  # prefix keys of the full blocks, made on first use
        self.num_cached_tokens = 0  # prefix hit of the first admission
        self.num_charged = 0  # leading tokens that are on the account, or were found in the cache
        self.num_preemptions = 0
        self.prompt_rows = 0  # prompt positions whose logprob is emitted or in flight
        self.prompt_logprobs: list[TokenLogprob] = []  # [i] is of prompt position i + 1
        self.logprobs: list[TokenLogprob] = []  # one per output token, where asked for

        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the stop string or stop token id that ended it
        self.error: str | None = None
        self.timeline = Timeline(arrival)  # the scheduler restarts it when it accepts the request
        self.first_token_ns: int | None = None  # on the timeline's clock
        self._timings: Timings | None = None  # once asked for, until its next transition

        # Fixed for life and read every step, so worked out once.
        self.key = (request_id, sample_index)  # unique among the scheduler's live requests
        self.max_length = self.num_prompt_tokens + max_tokens  # tokens, at its longest
        stop_ids = frozenset(params.stop_token_ids)
        self.stop_ids = stop_ids if params.ignore_eos else stop_ids | eos_token_ids
        # A token of it changes nothing but its place, unless it ends it: its text is made then.
        self.quiet = (
            final_only
            and form is FREE
            and not params.stop
            and params.logprobs is None
            and params.prompt_logprobs is None
            and params.num_samples == params.n  # others are ranked by their logprobs
        )
        # Nobody asks for its tokens before its end, the sampling program's parameters included.
        self.unread = self.quiet and not params.reads_output
        # A token that is not its last tells no more than the text it adds.
        makes_text = text is not None and not self.quiet
        self.tells_text = makes_text and form is FREE and not params.stop
        # Nor does anybody look at its tokens so far while such a token is told.
        self.tells_growth = growths and self.tells_text and not params.reads_output
        # Prompt positions whose logprob is wanted; samples of one prompt leave them to the leader.
        wants_rows = params.prompt_logprobs is not None and leader is None
        self.max_prompt_rows = self.num_prompt_tokens - 1 if wants_rows else 0
        self.order = (priority, arrival, 0)  # the scheduler's total order; it sets the last part

    # The transitions. Only the scheduler calls them; it moves blocks and queues accordingly.

    def accept(self, sequence: int, now: float) -> None:
        """-> WAITING in a scheduler, `sequence` breaking ties of priority and arrival."""
        self.order = (self.priority, self.arrival, sequence)
        self.timeline = Timeline(now)
        self._timings = None

    def start(self, table: list[int], num_hits: int, num_computed: int, now: float) -> None:
        """WAITING -> RUNNING with this table, whose first num_hits blocks are a prefix hit."""
        self.state = RequestState.RUNNING
        self.block_ids = table
        self.num_published = num_hits
        self.num_computed = self.num_scheduled = num_computed
        self.num_charged = max(self.num_charged, num_computed)
        self.decodes = False
        self._mark("prefill", now)

    def fall_back(self, now: float) -> None:
        """RUNNING -> WAITING: preempted. Keeps its tokens, computes them anew."""
        self.state = RequestState.WAITING
        self.block_ids = []
        self.num_published = self.num_computed = self.num_scheduled = 0
        self.num_preemptions += 1
        self._mark("preempted", now)

    def finish(
        self,
        reason: FinishReason,
        now: float,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """-> FINISHED; tokens still being sampled are no part of the output."""
        self.state = RequestState.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.error = error
        if self.num_pending:
            del self.token_ids[-self.num_pending :]
            self.num_pending = 0
        self.timeline.close(now)
        self._timings = None

    def begin_decoding(self, now: float) -> None:
        """Its first token since it started was sampled."""
        self.decodes = True
        instant = self._mark("decode", now)
        if self.first_token_ns is None:
            self.first_token_ns = instant

    def _mark(self, state: str, now: float) -> int:
        self._timings = None
        return self.timeline.mark(state, now)

    def plan_token(self) -> None:
        """One step more, now planned, computes its last token and samples the one behind."""
        self.in_flight += 1
        self.num_scheduled += 1
        self.token_ids.append(PENDING)
        self.num_pending += 1

    def unplan(self, num_steps: int) -> None:
        """Those steps, its last ones in flight, have not been planned after all."""
        del self.token_ids[-num_steps:]
        self.num_pending -= num_steps
        self.num_scheduled -= num_steps
        self.in_flight -= num_steps

    def advance(self, token_ids: list[int]) -> None:
        """So many steps, not planned for it one by one, each computed a token and sampled one."""
        self.token_ids += token_ids
        self.num_computed += len(token_ids)
        self.num_scheduled = self.num_computed

    def place(self, token_id: int) -> None:
        """The oldest of the tokens still being sampled is known now."""
        self.token_ids[-self.num_pending] = token_id
        self.num_pending -= 1

    def settle_account(self) -> None:
        """Put what it was served since the last time on its tenant's account: tokens computed or in
        flight, but for those found in the cache or computed anew after a preemption."""
        served = self.num_scheduled - self.num_charged
        if served > 0:
            self.account.charge(served)
            self.num_charged = self.num_scheduled

    def prefix_keys(self, block_size: int, num_blocks: int) -> list[bytes]:
        """The keys of its leading full blocks, grown to at least `num_blocks`."""
        if self.keys is None:
            self.keys = KeyChain(block_size, adapter=self.adapter, salt=self.cache_salt)
        return self.keys.extend(self.token_ids, num_blocks)

    @property
    def num_tokens(self) -> int:
        """Prompt, output, and tokens still being sampled."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled and known."""
        return len(self.token_ids) - self.num_prompt_tokens - self.num_pending

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """A copy of the prompt."""
        return tuple(self.token_ids[: self.num_prompt_tokens])

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """A copy of the known output; tokens still being sampled are not in it."""
        return tuple(
            self.token_ids[self.num_prompt_tokens : len(self.token_ids) - self.num_pending]
        )

    @property
    def known_token_ids(self) -> list[int]:
        """A copy of prompt and known output, in order."""
        return self.token_ids[: len(self.token_ids) - self.num_pending]

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def wants_prompt_rows(self) -> bool:
        """True while some prompt position's logprob is neither emitted nor in flight."""
        return self.prompt_rows < self.max_prompt_rows

    def timings(self) -> Timings:
        """Where the time went up to its latest transition, in seconds on the scheduler's clock."""
        if self._timings is None:
            line = self.timeline
            spent, first = line.spent(), self.first_token_ns
            self._timings = Timings(
                (spent.get("queued", 0) + spent.get("preempted", 0)) / 1e9,
                spent.get("prefill", 0) / 1e9,
                spent.get("decode", 0) / 1e9,
                line.total_ns / 1e9,
                None if first is None else (first - line.start_ns) / 1e9,
            )
        return self._timings

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}/{self.sample_index}, {self.state.value}, "
            f"prompt={self.num_prompt_tokens}, output={self.num_output_tokens}, "
            f"pending={self.num_pending}, computed={self.num_computed}, "
            f"scheduled={self.num_scheduled}, blocks={len(self.block_ids)})"
        )
