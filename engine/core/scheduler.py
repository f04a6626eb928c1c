"""The scheduler: every live request from the door to its end, and what a step's answer changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .answers import FinishReason, Growth, TokenLogprob
from .blocks import BlockManager, IntegrityError
from .checks import AdmissionError
from .fairness import Account, Shares, fullest, may_displace
from .integrity import check_books
from .limits import SchedulerConfig, check_fits
from .plan import DECODE, Share, StepOutcome, StepPlan
from .planner import Planner
from .queues import Waiting, index_of
from .request import Request, RequestState
from .stretch import Stretch
from .telling import NOTHING_ALLOWED, Ending, tell, whole_text

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats", "Update"]

_MAX_IN_FLIGHT = 2  # a plan being computed, and the one planned behind it
_RUNNING, _FINISHED = RequestState.RUNNING, RequestState.FINISHED


class Update(NamedTuple):
    """What a step, or an end without one, brought a request. Its state is already the new one.

    A quiet request has one update, at its end, of all that its steps brought it.
    """

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
        self._planner = Planner(config, self.blocks, self._waiting, self._running, clock)
        self._parked: dict[Request, list[Request]] = {}  # leader -> samples waiting for its prompt
        self._num_parked = 0
        self._live: dict[str, dict[int, Request]] = {}
        self._in_flight: deque[StepPlan] = deque()
        self._leaving: set[Request] = set()  # finished, but a plan in flight still uses the blocks
        self._ended: list[Update] = []  # ends that no commit has carried yet
        self.num_generated_tokens = 0
        self._num_accepted = 0
        self._num_finished = 0

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

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can run before a commit, an arrival or a release.

        Errors: RuntimeError where two plans are uncommitted already.
        """
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise RuntimeError(f"{_MAX_IN_FLIGHT} plans are in flight already; commit one first")
        plan = self._planner.plan()
        if plan is not None:
            self._in_flight.append(plan)
        return plan

    def _charge_running(self) -> None:
        for request in self._running:
            request.settle_account()

    # --------------------------------------------------------------------------------- commit

    def growths(self, outcome: StepOutcome) -> list[Growth]:
        """What the answer of the oldest plan in flight tells of requests that are read by growths
        and of which there is no more to tell: soon, since the rest can wait. commit() is next, and
        says nothing of them."""
        stretch = self._planner.stretch
        if stretch is None or not stretch.growing or not stretch.is_plain(outcome):
            return []
        return stretch.grow(outcome.token_ids)

    def commit(self, plan: StepPlan, outcome: StepOutcome) -> list[Update]:
        """Take the step's answer. Returns what changed, ends without a step first.

        Rows of requests that have ended meanwhile are dropped.
        Errors: RuntimeError for a plan that is not the oldest in flight; ValueError for an
        outcome that does not have the plan's shape (nothing is committed).
        """
        if not self._in_flight or self._in_flight[0] is not plan:
            raise RuntimeError(f"plan {plan.step_id} is not the oldest in flight")
        if len(outcome.token_ids) != plan.num_logit_rows:
            raise ValueError(
                f"step {plan.step_id} has {plan.num_logit_rows} logit rows, its outcome "
                f"{len(outcome.token_ids)} tokens"
            )
        self._in_flight.popleft()
        now = self._clock()
        updates = self.drain_finished()
        stretch = self._planner.stretch
        if stretch is not None:
            if stretch.is_plain(outcome):
                updates += self._take(stretch, outcome, now)
                return updates
            self._planner.end_stretch()
        token_ids, logprobs, errors = outcome.token_ids, outcome.logprobs, outcome.errors
        block_size, parked = self.config.block_size, self._parked
        end = num_quiet = 0  # logit rows of those so far; tokens that changed nothing else
        for place, (request, share, start) in enumerate(
            zip(plan.roster.requests, plan.roster.shares, plan.starts, strict=True)
        ):
            first, end = end, end + len(share.targets)
            request.in_flight -= 1
            if request.state is _FINISHED:
                if request.in_flight == 0:
                    self._leave(request)
                continue
            if errors and place in errors:
                updates.append(self._end(request, FinishReason.ERROR, now, error=errors[place]))
                continue
            request.num_computed = computed = start + share.num_tokens
            if computed >= (request.num_published + 1) * block_size:
                self._publish(request)
            if parked and computed >= request.num_prompt_tokens:
                self._unpark(request)
            if share is DECODE:
                token = token_ids[first]
                if (
                    request.quiet
                    and request.decodes
                    and computed + 1 < request.max_length
                    and token >= 0
                    and token not in request.stop_ids
                ):
                    request.place(token)
                    num_quiet += 1
                    continue
                update = self._append(request, token, logprobs.get(first), (), now)
            else:
                update = self._settle(request, share, outcome, first, now)
            if update is not None:
                updates.append(update)
        self.num_generated_tokens += num_quiet
        return updates

    def _take(self, stretch: Stretch, outcome: StepOutcome, now: float) -> list[Update]:
        """Commit a step of a stretch: each request has a token more, and few are looked at."""
        requests = stretch.roster.requests
        for place in stretch.take(outcome.token_ids):
            self._publish(requests[place])
        self.num_generated_tokens += len(requests)
        token_ids, logprobs = outcome.token_ids, outcome.logprobs
        updates = []
        for place, push in (*stretch.untold(), *stretch.read):
            stretch.catch_up(place)
            request, token = requests[place], token_ids[place]
            if push is not None and place not in logprobs:
                try:
                    delta = push(token)
                except Exception:
                    pass  # _tell() meets it again, and ends the request with it
                else:
                    updates.append(Update(request, (token,), (), (), delta, False))
                    continue
            update = self._tell(request, token, logprobs.get(place), (), now)
            if update is not None:
                updates.append(update)
        return updates

    def _settle(
        self, request: Request, share: Share, outcome: StepOutcome, first: int, now: float
    ) -> Update | None:
        """One request's share of a step is computed; its answers are the logit rows from `first`
        on."""
        token_ids, logprobs = outcome.token_ids, outcome.logprobs
        last = first + len(share.targets) - share.samples
        scored = tuple([logprobs[row] for row in range(first, last) if row in logprobs])
        request.prompt_logprobs += scored
        if share.samples:
            return self._append(request, token_ids[last], logprobs.get(last), scored, now)
        if request.max_tokens == 0 and request.num_computed >= request.num_prompt_tokens:
            return self._end(request, FinishReason.LENGTH, now, scored=scored)
        return Update(request, (), (), scored, "", False) if scored else None

    def _publish(self, request: Request) -> None:
        """Let others hit the blocks that are now full of computed tokens."""
        num_full = request.num_computed // self.config.block_size
        if self.config.enable_prefix_caching:
            keys = request.prefix_keys(self.config.block_size, num_full)
            for i in range(request.num_published, num_full):
                self.blocks.publish(request.block_ids[i], keys[i])
        request.num_published = num_full

    def _append(
        self,
        request: Request,
        token: int,
        logprob: TokenLogprob | None,
        scored: tuple[TokenLogprob, ...],
        now: float,
    ) -> Update | None:
        """One sampled token: put it in its place, and tell of it."""
        if token < 0:
            why = request.form.error or NOTHING_ALLOWED
            return self._end(request, FinishReason.ERROR, now, scored=scored, error=why)
        request.place(token)
        self.num_generated_tokens += 1
        if not request.decodes:
            request.begin_decoding(now)
        return self._tell(request, token, logprob, scored, now)

    def _tell(
        self,
        request: Request,
        token: int,
        logprob: TokenLogprob | None,
        scored: tuple[TokenLogprob, ...],
        now: float,
    ) -> Update | None:
        """The latest token is in its place: say so, and end the request if it does."""
        logprobs: tuple[TokenLogprob, ...] = ()
        if logprob is not None:
            logprobs = (logprob,)
            request.logprobs.append(logprob)
        told = tell(request, token)
        if isinstance(told, Ending):
            return self._end(
                request,
                told.reason,
                now,
                tokens=(token,),
                logprobs=logprobs,
                scored=scored,
                delta=told.delta,
                stop_reason=told.stop,
                error=told.error,
                silent=told.silent,
            )
        if request.quiet:
            return None
        return Update(request, (token,), logprobs, scored, told, False)

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
        silent: bool = False,
    ) -> Update:
        """The one way out: -> FINISHED, out of every queue, blocks returned (or left in flight)."""
        self._planner.end_stretch()
        was_running = request.state is _RUNNING
        request.settle_account()
        if request.quiet:
            tokens = request.output_token_ids
            try:
                delta = whole_text(request, tokens[:-1] if silent else tokens, reason)
            except Exception as problem:  # as above
                reason, stop_reason = FinishReason.ERROR, None
                why = f"{type(problem).__name__}: {problem}"
                error = error or f"the output could not be made text: {why}"
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
            num_preemptions=self._planner.num_preemptions,
            num_prompt_tokens=self._planner.num_prompt_tokens,
            num_cached_tokens=self._planner.num_cached_tokens,
        )

    def check_integrity(self) -> None:
        """Every law of the books at once, O(everything); tests call it after each step.

        Errors: IntegrityError.
        """
        self._planner.end_stretch()
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
