"""The planner: which tokens of which requests the next step computes, and at whose expense.

The one law. There is no prefill phase and no decode phase. Each request has num_tokens tokens
(prompt, output, and the one still being sampled) of which num_scheduled are computed or in flight;
each step lets num_scheduled catch up with num_tokens under one budget of tokens. Reaching the end
samples the next token, so a decoding request is one token behind, a new one is its prompt behind, a
prefix hit is a head start, a chunk is what the budget left, and a preempted request is one that has
fallen back to 0 and keeps its output.

Order: by priority; within one priority the running requests, oldest first, before the waiting ones;
of those, whose turn it is between tenants (fairness.py), and within one the oldest first. A running
request short of a block takes it from the last running one; a waiting request takes blocks and
seats only from running ones of strictly lower priority. Victims always stand behind, so nothing
already planned is undone; and the first in the order always gets on, since every request alone fits
in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .blocks import BlockManager
from .limits import SchedulerConfig
from .plan import DECODE, SAMPLE, Roster, Share, StepPlan
from .queues import Waiting, insert_in_order
from .request import PENDING, Request
from .stretch import Stretch

__all__ = ["Planner"]


class _Draft:
    """A plan under construction: what is taken is never given back."""

    __slots__ = ("admits", "budget", "preempted", "rows", "stopped", "taken", "token_ids")

    def __init__(self, budget: int, rows: int) -> None:
        self.budget = budget  # tokens still to give
        self.rows = rows  # prompt-logprob rows still to give
        self.taken: list[tuple[Request, Share, int]] = []  # from where on
        self.token_ids: list[int] = []
        self.preempted: list[Request] = []
        self.admits = True  # False once a request was short of a block, or preempted
        self.stopped = False  # True once a request must wait for those behind it to leave flight


class Planner:
    """Plans steps over the scheduler's own queues and blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        waiting: Waiting,
        running: list[Request],
        clock: Callable[[], float],
    ) -> None:
        """`running` is in order, and kept so by both."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of first admissions
        self.num_cached_tokens = 0  # of those, not computed because of a prefix hit
        self._config = config
        self._blocks = blocks
        self._waiting = waiting
        self._running = running
        self._clock = clock
        self._num_steps = 0
        self._roster: Roster | None = None  # the last plan's, while nobody was preempted since
        self.stretch: Stretch | None = None  # while it lasts, every plan is its next step

    def plan(self) -> StepPlan | None:
        """The next step; None when nothing can run before a commit, an arrival or a release."""
        stretch = self.stretch or self._begin_stretch()
        if stretch is not None:
            plan = self._go_on(stretch)
            if plan is not None:
                return plan
            self.end_stretch()
        config = self._config
        draft = _Draft(config.max_num_batched_tokens, config.max_prompt_logprob_rows)
        running, block_size = self._running, config.block_size
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
            share = _share(request, draft, start)
            if share is not None:
                end = start + share.num_tokens
                if end <= len(request.block_ids) * block_size or self._grow(
                    request, end, draft, index
                ):
                    _take(request, share, draft)
            index += 1
        while draft.admits and draft.budget and self._admit(draft, index):
            index += 1
        return self._finish(draft)

    def _begin_stretch(self) -> Stretch | None:
        """A stretch of the last plan's roster, if the next steps can be one."""
        roster = self._roster
        if (
            roster is None
            or not roster.only_decodes
            or self._somebody_comes()
            or self._running != list(roster.requests)
            or not all(request.decodes for request in roster.requests)
        ):
            return None
        left = min([request.max_length - request.num_scheduled for request in roster.requests])
        if left <= 2:  # somebody samples its last token in the next step, or in the one in flight
            return None
        self.stretch = Stretch(roster, self._config.block_size)
        return self.stretch

    def _go_on(self, stretch: Stretch) -> StepPlan | None:
        """The stretch's next step; None where it is none."""
        step, roster = stretch.planned, stretch.roster
        if step >= stretch.end or self._somebody_comes():
            return None
        turned = stretch.turn(step)
        for place in turned:
            request = roster.requests[place]
            need = self._blocks.blocks_for(stretch.starts[place] + step + 1)
            if need > len(request.block_ids):
                new = self._blocks.acquire((), need - len(request.block_ids))
                if new is None:
                    return None
                request.block_ids += new
        tokens = stretch.next_tokens()
        stretch.planned += 1
        step_id = self._num_steps
        self._num_steps += 1
        starts = tuple([start + step for start in stretch.starts])
        return StepPlan(step_id, roster, starts, tokens, (), turned)

    def end_stretch(self) -> None:
        """Before a request is looked at by itself."""
        stretch, self.stretch = self.stretch, None
        if stretch is not None:
            stretch.close()

    def _somebody_comes(self) -> bool:
        """Whether anybody who waits might be admitted, or it is to be chosen who would be."""
        waiting, running = self._waiting, self._running
        if not len(waiting):
            return False
        full = len(running) >= self._config.max_num_seqs
        return not full or waiting.num_tenants > 1 or waiting.priority < running[-1].priority

    def _finish(self, draft: _Draft) -> StepPlan | None:
        if not draft.taken:
            return None
        requests, shares, starts = zip(*draft.taken, strict=True)
        roster = self._roster
        if roster is None or roster.requests != requests or roster.shares != shares:
            tables = tuple([request.block_ids for request in requests])
            roster = self._roster = Roster(requests, shares, tables)
        step_id = self._num_steps
        self._num_steps += 1
        return StepPlan(step_id, roster, starts, draft.token_ids, tuple(draft.preempted))

    def _grow(self, request: Request, end: int, draft: _Draft, index: int) -> bool:
        """Make the table of running[index] cover `end` tokens, preempting those behind it."""
        need = self._blocks.blocks_for(end) - len(request.block_ids)
        cut = self._cut_for((), need, index + 1, draft)
        new = None
        if cut is not None:
            self._preempt_from(cut, draft)
            new = self._blocks.acquire((), need)
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
        start = len(hits) * self._config.block_size
        share = _share(request, draft, start)
        if share is None:
            return False
        need = self._blocks.blocks_for(len(request.token_ids)) - len(hits)
        cut = self._cut_for(
            hits,
            need,
            index,
            draft,
            spare=self._config.watermark,
            seats=len(self._running) + 1 - self._config.max_num_seqs,
        )
        if cut is None:
            return False
        self._preempt_from(cut, draft)
        table = self._blocks.acquire(hits, need)
        if table is None:
            return False
        self._waiting.pop(request)
        request.account.num_waiting -= 1
        if request.num_preemptions == 0:
            request.num_cached_tokens = start
            self.num_cached_tokens += start
            self.num_prompt_tokens += request.num_prompt_tokens
        request.start(table, len(hits), start, self._clock())
        insert_in_order(self._running, request)
        _take(request, share, draft)
        return True

    def _hits(self, request: Request) -> list[int]:
        """Cached blocks of its known prefix, leaving at least one token to compute.

        A position whose prompt logprob is still to be emitted is computed, never hit.
        """
        if not (self._config.enable_prefix_caching and request.reuses_prefix):
            return []
        reach = len(request.token_ids) - 1
        if request.wants_prompt_rows:
            reach = min(reach, request.prompt_rows)
        num_blocks = reach // self._config.block_size
        keys = request.prefix_keys(self._config.block_size, num_blocks)
        return self._blocks.match(keys[:num_blocks])

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
        shortage = self._blocks.shortage(hits, num_new)
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
            freed += self._blocks.would_free(victim.block_ids, given_up)
        if flying:
            draft.stopped = True  # with nothing planned behind, they will have left flight
            return None
        return cut

    def _preempt_from(self, cut: int, draft: _Draft) -> None:
        """Send running[cut:] back to the queue, the last first."""
        if cut == len(self._running):
            return
        draft.admits = False  # a victim may fit again at once, on blocks that it now shares
        self._roster = None
        now = self._clock()
        for victim in reversed(self._running[cut:]):
            victim.settle_account()
            self._blocks.release(victim.block_ids)
            victim.fall_back(now)
            self._waiting.push(victim)
            victim.account.num_waiting += 1
            draft.preempted.append(victim)
            self.num_preemptions += 1
        del self._running[cut:]


def _share(request: Request, draft: _Draft, start: int) -> Share | None:
    """What this step computes of the request from `start` on; None: nothing now."""
    tokens = request.token_ids
    length = len(tokens)
    if request.num_prompt_tokens <= start == length - 1:
        return DECODE if length < request.max_length else None  # else: it is being sampled
    num_tokens = min(length - start, draft.budget)
    first_row = max(start, request.prompt_rows)
    if request.wants_prompt_rows:
        # Rows before prompt_rows were emitted before a preemption and are not asked again.
        last = first_row + draft.rows
        if last < request.max_prompt_rows:
            num_tokens = min(num_tokens, last - start)
    if num_tokens <= 0:
        return None
    end = start + num_tokens
    # Position p's row scores prompt token p + 1.
    rows = range(first_row, min(end, request.max_prompt_rows))
    offsets = tuple([position - start for position in rows])
    targets = tuple([tokens[position + 1] for position in rows])
    if end == length and request.max_tokens > 0:
        return Share(num_tokens, (*offsets, num_tokens - 1), (*targets, SAMPLE))
    return Share(num_tokens, offsets, targets)


def _take(request: Request, share: Share, draft: _Draft) -> None:
    """Plan the request's next tokens: the one place where num_scheduled grows."""
    tokens, start = request.token_ids, request.num_scheduled
    draft.taken.append((request, share, start))
    request.in_flight += 1
    if share is DECODE:
        draft.token_ids.append(tokens[start])
        draft.budget -= 1
        request.num_scheduled = start + 1
        samples = True
    else:
        end = start + share.num_tokens
        draft.token_ids += tokens[start:end]
        draft.budget -= share.num_tokens
        request.num_scheduled = end
        samples = share.samples
        scored = len(share.targets) - samples
        draft.rows -= scored
        request.prompt_rows += scored
    if samples:
        tokens.append(PENDING)
        request.num_pending += 1
