"""The scheduler: which tokens of which requests each step computes, and what its answer changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .blocks import BlockManager, IntegrityError, KeyChain
from .fairness import Account, Shares, fullest, may_displace
from .integrity import check_books
from .limits import SchedulerConfig, check_fits
from .plan import (
    PENDING,
    SAMPLE,
    RowResult,
    ScheduledRequest,
    StepOutcome,
    StepPlan,
    TokenLogprob,
)
from .queues import Waiting, index_of, insert_in_order
from .request import AdmissionError, FinishReason, Request, RequestState

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats", "Update"]

_MAX_IN_FLIGHT = 2  # a plan being computed, and the one planned behind it
_RUNNING, _FINISHED = RequestState.RUNNING, RequestState.FINISHED
_NO_ROWS: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
_LAST_OF_ONE = ((0,), (SAMPLE,))  # offsets and targets of a decoding request's one token


class Update(NamedTuple):
    """What a step, or an end without one, brought a request. Its state is already the new one."""

    request: Request
    new_token_ids: tuple[int, ...]
    new_logprobs: tuple[TokenLogprob, ...]
    new_prompt_logprobs: tuple[TokenLogprob, ...]
    text_delta: str
    finished: bool


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Now: requests and blocks (free + cached + owned = the pool). Since the start: totals."""

    num_running: int
    num_waiting: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    num_accepted: int
    num_finished: int
    num_preemptions: int
    num_prompt_tokens: int  # of first admissions
    num_cached_tokens: int  # of those, not computed because of a prefix hit


_NOTHING_ALLOWED = (
    "no token is allowed at this position: allowed_token_ids, bad_words, no_repeat_ngram_size and "
    "min_tokens together forbid the whole vocabulary"
)


class _Draft:
    """A plan under construction: what is taken is never given back."""

    __slots__ = ("admits", "budget", "preempted", "rows", "stopped", "taken")

    def __init__(self, budget: int, rows: int) -> None:
        self.budget = budget  # tokens still to give
        self.rows = rows  # prompt-logprob rows still to give
        self.taken: list[ScheduledRequest] = []
        self.preempted: list[Request] = []
        self.admits = True  # False once a request was short of a block, or preempted
        self.stopped = False  # True once a request must wait for those behind it to leave flight


class Scheduler:
    """Owns every live request from add() to its one terminal Update.

    A request's samples share request_id. Calls come from one thread. schedule() may be called
    with one plan uncommitted; commits come in the order of the plans.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        fault: Callable[[str], bool] | None = None,
    ) -> None:
        """`fault` lets tests refuse block acquisitions (see BlockManager)."""
        self.config = config
        self._clock = clock
        self.blocks = BlockManager(
            config.num_blocks, config.block_size, config.enable_prefix_caching, fault
        )
        self._shares = Shares()
        self._waiting = Waiting(self._shares, self._charge_running)
        self._running: list[Request] = []  # in order
        self._parked: dict[Request, list[Request]] = {}  # leader -> samples waiting for its prompt
        self._num_parked = 0
        self._live: dict[str, dict[int, Request]] = {}
        self._in_flight: deque[StepPlan] = deque()
        self._leaving: set[Request] = set()  # finished, but a plan in flight still uses the blocks
        self._ended: list[Update] = []  # ends that no commit has carried yet
        self._num_steps = 0
        self._num_accepted = 0
        self._num_finished = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    # ---------------------------------------------------------------------------- at the door

    def add(self, *requests: Request) -> list[str]:
        """Accept all of these new requests, of one tenant, or none.

        Returns the ids of waiting requests that were aborted to make room (see fairness.py).
        Errors: AdmissionError with the numbers.
        """
        account = self._shares.account(requests[0].tenant, requests[0].weight)
        displaced = self._room_for(len(requests), account)
        keys = set()
        for request in requests:
            check_fits(request, self.config)
            if request.key in keys or request.sample_index in self._live.get(
                request.request_id, ()
            ):
                raise AdmissionError(
                    "duplicate_id",
                    f"request id {request.request_id!r}, sample {request.sample_index}, is "
                    "already running; ids must be unique while in use",
                )
            keys.add(request.key)
        for request_id in displaced:
            self.abort(request_id)
        now = self._clock()
        for request in requests:
            self._num_accepted += 1
            request.account = account
            account.num_waiting += 1
            request.accept(self._num_accepted, now)
            self._live.setdefault(request.request_id, {})[request.sample_index] = request
            leader = request.leader
            if leader is not None and self._worth_waiting_for(leader):
                self._parked.setdefault(leader, []).append(request)
                self._num_parked += 1
            else:
                self._waiting.push(request)
        return displaced

    def _room_for(self, coming: int, account: Account) -> list[str]:
        """Whom to displace, that so many may wait. Errors: AdmissionError("queue_full")."""
        short = self.num_waiting + coming - self.config.max_waiting
        found: list[str] = []
        freed = 0
        if short > 0 and self.num_waiting:
            other = fullest(self._shares)
            for request_id, samples in reversed(self._live.items()):
                if freed >= short or other is account:
                    break
                first = samples.get(0)  # it runs before the others: none has shown anything
                if first is not None and first.account is other and _has_not_run(first):
                    found.append(request_id)
                    freed += len(samples)
            if freed >= short and may_displace(account, coming, other, freed):
                return found
        if short > 0:
            raise AdmissionError(
                "queue_full",
                f"{self.num_waiting} requests are waiting and {coming} more do not fit in "
                f"the queue of max_waiting={self.config.max_waiting}; try again later",
            )
        return found

    def _worth_waiting_for(self, leader: Request) -> bool:
        """True while blocks are still to come that another sample of its prompt would hit."""
        return (
            self.config.enable_prefix_caching
            and self._is_live(leader)
            and leader.num_computed < leader.num_prompt_tokens
            and leader.num_prompt_tokens > self.config.block_size
        )

    def _is_live(self, request: Request) -> bool:
        return self._live.get(request.request_id, {}).get(request.sample_index) is request

    # ------------------------------------------------------------------------------- schedule

    # The one law. There is no prefill phase and no decode phase. Each request has num_tokens
    # tokens (prompt, output, and the one still being sampled) of which num_scheduled are computed
    # or in flight; each step lets num_scheduled catch up with num_tokens under one budget of
    # tokens. Reaching the end samples the next token, so a decoding request is one token behind,
    # a new one is its prompt behind, a prefix hit is a head start, a chunk is what the budget
    # left, and a preempted request is one that has fallen back to 0 and keeps its output.
    #
    # Order: by priority; within one priority the running requests, oldest first, before the
    # waiting ones; of those, whose turn it is between tenants (fairness.py), and within one the
    # oldest first. A running request short of a block takes it from the last running one; a
    # waiting request takes blocks and seats only from running ones of strictly lower priority.
    # Victims always stand behind, so nothing already planned is undone; and the first in the
    # order always gets on, since every request alone fits in the pool.
    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can run before a commit, an arrival or a release.

        Errors: RuntimeError where two plans are uncommitted already.
        """
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise RuntimeError(f"{_MAX_IN_FLIGHT} plans are in flight already; commit one first")
        draft = _Draft(self.config.max_num_batched_tokens, self.config.max_prompt_logprob_rows)
        running, block_size = self._running, self.config.block_size
        best_waiting = self._waiting.priority
        index = 0
        while index < len(running) and draft.budget:
            request = running[index]
            if best_waiting < request.priority and draft.admits:
                if self._admit(draft, index):
                    index += 1  # the newcomer stands somewhere before `request`
                    best_waiting = self._waiting.priority
                else:
                    draft.admits = False
                continue  # with what is left of the running list
            if draft.stopped:
                break
            start = request.num_scheduled
            num_tokens = self._chunk(request, draft, start)
            if num_tokens and (
                start + num_tokens <= len(request.block_ids) * block_size
                or self._grow(request, start + num_tokens, draft, index)
            ):
                self._take(request, num_tokens, draft)
            index += 1
        while draft.admits and draft.budget and self._admit(draft, index):
            index += 1
        return self._finish_plan(draft)

    def _finish_plan(self, draft: _Draft) -> StepPlan | None:
        if not draft.taken:
            return None
        plan = StepPlan(self._num_steps, tuple(draft.taken), tuple(draft.preempted))
        self._num_steps += 1
        self._in_flight.append(plan)
        return plan

    def _chunk(self, request: Request, draft: _Draft, start: int) -> int:
        """How many tokens from `start` this step gives the request; 0 = none now."""
        length = len(request.token_ids)
        if request.num_pending and length - request.num_prompt_tokens >= request.max_tokens:
            return 0
        num_tokens = min(length - start, draft.budget)
        if request.prompt_rows < request.max_prompt_rows:
            # Rows before prompt_rows were emitted before a preemption and are not asked again.
            last = max(start, request.prompt_rows) + draft.rows
            if last < request.max_prompt_rows:
                num_tokens = min(num_tokens, last - start)
        return num_tokens

    def _grow(self, request: Request, end: int, draft: _Draft, index: int) -> bool:
        """Make the table of running[index] cover `end` tokens, preempting those behind it."""
        need = self.blocks.blocks_for(end) - len(request.block_ids)
        cut = self._cut_for((), need, index + 1, draft)
        new = None
        if cut is not None:
            self._preempt_from(cut, draft)
            new = self.blocks.acquire((), need)
        if new is None:
            draft.admits = False
            return False
        request.block_ids += new
        return True

    def _admit(self, draft: _Draft, index: int) -> bool:
        """Start the first waiting request, if it can run; it may preempt running[index:], which are
        unplanned and of strictly lower priority.

        Blocks for all its known tokens are taken at once, so that a prompt once begun is not
        preempted for its own rest.
        """
        request = self._waiting.head()
        if request is None:
            return False
        hits = self._hits(request)
        start = len(hits) * self.config.block_size
        num_tokens = self._chunk(request, draft, start)
        if num_tokens == 0:
            return False
        need = self.blocks.blocks_for(len(request.token_ids)) - len(hits)
        cut = self._cut_for(
            hits,
            need,
            index,
            draft,
            spare=self.config.watermark,
            seats=len(self._running) + 1 - self.config.max_num_seqs,
        )
        if cut is None:
            return False
        self._preempt_from(cut, draft)
        table = self.blocks.acquire(hits, need)
        if table is None:
            return False
        self._waiting.pop(request)
        request.account.num_waiting -= 1
        if request.num_preemptions == 0:
            request.num_cached_tokens = start
            self._num_cached_tokens += start
            self._num_prompt_tokens += request.num_prompt_tokens
        request.start(table, len(hits), start, self._clock())
        insert_in_order(self._running, request)
        self._take(request, num_tokens, draft)
        return True

    def _hits(self, request: Request) -> list[int]:
        """Cached blocks of its known prefix, leaving at least one token to compute.

        A position whose prompt logprob is still to be emitted is computed, never hit.
        """
        if not (self.config.enable_prefix_caching and request.reuses_prefix):
            return []
        reach = len(request.token_ids) - 1
        if request.wants_prompt_rows:
            reach = min(reach, request.prompt_rows)
        num_blocks = reach // self.config.block_size
        return self.blocks.match(self._keys(request, num_blocks)[:num_blocks])

    def _keys(self, request: Request, num_blocks: int) -> list[bytes]:
        if request.keys is None:
            request.keys = KeyChain(
                self.config.block_size, adapter=request.adapter, salt=request.cache_salt
            )
        return request.keys.extend(request.token_ids, num_blocks)

    def _cut_for(
        self,
        hits: Sequence[int],
        num_new: int,
        first: int,
        draft: _Draft,
        *,
        spare: int = 0,
        seats: int = 0,
    ) -> int | None:
        """Where to cut the running list, at `first` or behind, so that what is left of the pool
        can give `hits` and `num_new` blocks: the fewest victims that do, None where none do.

        `spare` blocks stay free while anything keeps running; `seats` requests must go anyway.
        """
        shortage = self.blocks.shortage(hits, num_new)
        most = len(self._running) - max(seats, 0)
        cut = len(self._running)
        given_up = dict.fromkeys(hits, -1)  # held by the newcomer: their release frees nothing
        freed = 0
        flying = False
        while cut > most or freed < shortage + (spare if cut else 0):
            if cut <= first:
                return None
            cut -= 1
            victim = self._running[cut]
            flying = flying or victim.in_flight > 0
            freed += self.blocks.would_free(victim.block_ids, given_up)
        if flying:
            draft.stopped = True  # with nothing planned behind, they will have left flight
            return None
        return cut

    def _preempt_from(self, cut: int, draft: _Draft) -> None:
        """Send running[cut:] back to the queue, the last first."""
        if cut == len(self._running):
            return
        draft.admits = False  # a victim may fit again at once, on blocks that it now shares
        now = self._clock()
        for victim in reversed(self._running[cut:]):
            _charge(victim)
            self.blocks.release(victim.block_ids)
            victim.fall_back(now)
            self._waiting.push(victim)
            victim.account.num_waiting += 1
            draft.preempted.append(victim)
            self._num_preemptions += 1
        del self._running[cut:]

    def _take(self, request: Request, num_tokens: int, draft: _Draft) -> None:
        """Plan the request's next tokens: the one place where num_scheduled grows."""
        tokens = request.token_ids
        start = request.num_scheduled
        end = start + num_tokens
        samples = end == len(tokens) and request.max_tokens > 0
        if request.prompt_rows < request.max_prompt_rows:
            offsets, targets = self._rows(request, end, samples, draft)
        elif not samples:
            offsets, targets = _NO_ROWS
        elif num_tokens == 1:
            offsets, targets = _LAST_OF_ONE
        else:
            offsets, targets = (num_tokens - 1,), (SAMPLE,)
        draft.taken.append(
            ScheduledRequest(request, start, tokens[start:end], request.block_ids, offsets, targets)
        )
        draft.budget -= num_tokens
        request.num_scheduled = end
        request.in_flight += 1
        if samples:
            tokens.append(PENDING)
            request.num_pending += 1

    def _rows(
        self, request: Request, end: int, samples: bool, draft: _Draft
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and targets where prompt logprobs are still to come: position p's row scores
        prompt token p + 1.
        """
        start, tokens = request.num_scheduled, request.token_ids
        first = max(start, request.prompt_rows)
        last = min(end, request.max_prompt_rows)
        offsets = tuple(range(first - start, last - start))
        targets = tuple(tokens[first + 1 : last + 1])
        draft.rows -= len(offsets)
        request.prompt_rows += len(offsets)
        if samples:
            return (*offsets, end - 1 - start), (*targets, SAMPLE)
        return offsets, targets

    def _charge_running(self) -> None:
        for request in self._running:
            _charge(request)

    # --------------------------------------------------------------------------------- commit

    def commit(self, plan: StepPlan, outcome: StepOutcome) -> list[Update]:
        """Take the step's answer. Returns what changed, ends without a step first.

        Rows of requests that have ended meanwhile are dropped.
        Errors: RuntimeError for a plan that is not the oldest in flight; ValueError for an
        outcome that does not have the plan's shape (nothing is committed).
        """
        if not self._in_flight or self._in_flight[0] is not plan:
            raise RuntimeError(f"plan {plan.step_id} is not the oldest in flight")
        self._check_shape(plan, outcome)
        self._in_flight.popleft()
        now = self._clock()
        updates = self.drain_finished()
        errors = outcome.errors
        for index, (scheduled, rows) in enumerate(zip(plan.requests, outcome.rows, strict=True)):
            request = scheduled[0]
            request.in_flight -= 1
            if request.state is _FINISHED:
                if request.in_flight == 0:
                    self._leave(request)
            elif errors and index in errors:
                updates.append(self._end(request, FinishReason.ERROR, now, error=errors[index]))
            else:
                update = self._settle(scheduled, rows, now)
                if update is not None:
                    updates.append(update)
        return updates

    def _check_shape(self, plan: StepPlan, outcome: StepOutcome) -> None:
        wanted = [len(s.targets) for s in plan.requests]
        given = [len(rows) for rows in outcome.rows]
        for index in outcome.errors or ():
            if 0 <= index < len(given):
                given[index] = wanted[index]  # a request that failed has no rows to give
        if wanted != given:
            raise ValueError(
                f"step {plan.step_id} wants {wanted} logit rows of its requests, its outcome has "
                f"{given}"
            )

    def _settle(
        self, scheduled: ScheduledRequest, rows: Sequence[RowResult], now: float
    ) -> Update | None:
        """One request's share of a step: its tokens are computed, its rows are answers."""
        request, start, tokens, _, _, targets = scheduled
        request.num_computed = computed = start + len(tokens)
        if computed >= (request.num_published + 1) * self.config.block_size:
            self._publish(request)
        if self._parked and computed >= request.num_prompt_tokens:
            self._unpark(request)
        num_rows = len(targets)
        samples = num_rows > 0 and targets[-1] == SAMPLE
        scored: tuple[TokenLogprob, ...] = ()
        if num_rows > samples:
            found = [row.logprob for row in rows[: num_rows - samples]]
            scored = tuple(entry for entry in found if entry is not None)
            request.prompt_logprobs += scored
        if samples:
            return self._append(request, rows[-1], scored, now)
        if request.max_tokens == 0 and computed >= request.num_prompt_tokens:
            return self._end(request, FinishReason.LENGTH, now, scored=scored)
        return Update(request, (), (), scored, "", False) if scored else None

    def _publish(self, request: Request) -> None:
        """Let others hit the blocks that are now full of computed tokens."""
        num_full = request.num_computed // self.config.block_size
        if self.config.enable_prefix_caching:
            keys = self._keys(request, num_full)
            for i in range(request.num_published, num_full):
                self.blocks.publish(request.block_ids[i], keys[i])
        request.num_published = num_full

    def _append(
        self, request: Request, row: RowResult, scored: tuple[TokenLogprob, ...], now: float
    ) -> Update:
        """One sampled token: put it in its place, make it text, end the request if it does."""
        token, text = row.token_id, request.text
        if token < 0:
            why = request.form.error or _NOTHING_ALLOWED
            return self._end(request, FinishReason.ERROR, now, scored=scored, error=why)
        tokens = request.token_ids
        tokens[-request.num_pending] = token
        request.num_pending -= 1
        if not request.decodes:
            self._mark_decode(request, now)
        logprobs: tuple[TokenLogprob, ...] = ()
        if row.logprob is not None:
            logprobs = (row.logprob,)
            request.logprobs.append(row.logprob)
        num_output = len(tokens) - request.num_prompt_tokens - request.num_pending
        delta = ""
        stop: str | int | None = None
        reason: FinishReason | None = None
        error: str | None = None
        silent = False  # a stop token shows in the text no more than a stop string does
        try:
            if token in request.stop_ids and num_output >= request.params.min_tokens:
                reason = FinishReason.STOP
                if request.params.ignore_eos or token not in request.eos_token_ids:
                    stop = token
                silent = not request.params.include_stop_str_in_output
            elif request.form.take(token):
                reason = FinishReason.LENGTH if request.form.cut else FinishReason.STOP
            elif num_output >= request.max_tokens:
                reason = FinishReason.LENGTH
            if text is not None:
                if not silent:
                    delta = text.push(token)
                if reason is not None:
                    delta += text.finish()
                if text.matched is not None:
                    reason, stop = FinishReason.STOP, text.matched
        except Exception as problem:  # one request's text must not end the step of all
            reason = FinishReason.ERROR
            error = f"token {token} could not be made text: {type(problem).__name__}: {problem}"
        if reason is None:
            return Update(request, (token,), logprobs, scored, delta, False)
        return self._end(
            request,
            reason,
            now,
            tokens=(token,),
            logprobs=logprobs,
            scored=scored,
            delta=delta,
            stop_reason=stop,
            error=error,
        )

    def _mark_decode(self, request: Request, now: float) -> None:
        request.decodes = True
        instant = request.timeline.mark("decode", now)
        if request.first_token_ns is None:
            request.first_token_ns = instant

    # -------------------------------------------------------------------------------- the end

    def abort(self, request_id: str) -> int:
        """End every sample of `request_id` now; returns how many there were (0: unknown id).

        What a step in flight still brings them is dropped; until it is committed it keeps their
        blocks. Text held back for a stop string is not given out: the output stays a prefix.
        """
        return self._end_all(request_id, FinishReason.ABORT, None)

    def fail(self, request_id: str, message: str) -> None:
        """End every sample of `request_id` with an error."""
        self._end_all(request_id, FinishReason.ERROR, message)

    def drain_finished(self) -> list[Update]:
        """The ends that no commit has carried: of aborts and failures. Each comes out once."""
        ended, self._ended = self._ended, []
        return ended

    def _end_all(self, request_id: str, reason: FinishReason, error: str | None) -> int:
        samples = list(self._live.get(request_id, {}).values())
        now = self._clock()
        self._ended += [self._end(request, reason, now, error=error) for request in samples]
        return len(samples)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        now: float,
        *,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        scored: tuple[TokenLogprob, ...] = (),
        delta: str = "",
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Update:
        """The one way out: -> FINISHED, out of every queue, blocks returned (or left in flight)."""
        was_running = request.state is _RUNNING
        _charge(request)
        request.finish(reason, now, stop_reason=stop_reason, error=error)
        if was_running:
            del self._running[index_of(self._running, request)]
        else:
            request.account.num_waiting -= 1
            if not self._take_from_parked(request):
                self._waiting.one_ended()
        self._unpark(request)
        samples = self._live[request.request_id]
        del samples[request.sample_index]
        if not samples:
            del self._live[request.request_id]
        self._num_finished += 1
        self._leaving.add(request)
        if request.in_flight == 0:
            self._leave(request)
        return Update(request, tokens, logprobs, scored, delta, True)

    def _leave(self, request: Request) -> None:
        """No plan in flight uses its blocks any more."""
        self._leaving.remove(request)
        self.blocks.release(request.block_ids)
        request.block_ids = []

    def _take_from_parked(self, request: Request) -> bool:
        followers = self._parked.get(request.leader) if request.leader is not None else None
        if followers is None or request not in followers:
            return False
        followers.remove(request)
        self._num_parked -= 1
        return True

    def _unpark(self, leader: Request) -> None:
        """Its prompt is computed, or it has ended: its samples queue up like everyone."""
        for request in self._parked.pop(leader, ()):
            self._num_parked -= 1
            self._waiting.push(request)

    # ------------------------------------------------------------------------------- the state

    @property
    def has_work(self) -> bool:
        """True until every accepted request has ended, its end was told and its plan committed."""
        return bool(self._live or self._ended or self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._num_parked

    @property
    def num_running(self) -> int:
        return len(self._running)

    def stats(self) -> SchedulerStats:
        blocks = self.blocks
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            free_blocks=blocks.num_free - blocks.num_cached,
            cached_blocks=blocks.num_cached,
            owned_blocks=blocks.num_owned,
            num_accepted=self._num_accepted,
            num_finished=self._num_finished,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )

    def check_integrity(self) -> None:
        """Every law of the books at once, O(everything); tests call it after each step.

        Errors: IntegrityError.
        """
        self.blocks.check_integrity(r.block_ids for r in (*self._running, *self._leaving))
        check_books(
            self.config,
            running=self._running,
            waiting=[*self._waiting, *(r for group in self._parked.values() for r in group)],
            live=[r for samples in self._live.values() for r in samples.values()],
            leaving=self._leaving,
            in_flight=self._in_flight,
        )
        if self.num_waiting != len([*self._waiting]) + sum(map(len, self._parked.values())):
            raise IntegrityError("the waiting are miscounted")
        if self.num_waiting != sum(account.num_waiting for account in self._shares):
            raise IntegrityError("the waiting of the tenants are miscounted")


def _has_not_run(request: Request) -> bool:
    return request.state is RequestState.WAITING and request.num_preemptions == 0


def _charge(request: Request) -> None:
    """Put what it was served since the last time on its tenant's account: tokens computed or in
    flight, but for those found in the cache or computed anew after a preemption."""
    served = request.num_scheduled - request.num_charged
    if served > 0:
        request.account.charge(served)
        request.num_charged = request.num_scheduled
