"""Deterministic simulation of scheduler, blocks and detokeniser: one seed, one world.

    python -m tests.core.simulate SEED          replays one seed and prints what happens
    python -m tests.core.simulate SEED COUNT    runs COUNT seeds from SEED and prints the rate

Each seed draws limits, arrivals, aborts, failures, refused allocations and whether a step is in
flight; the model (tests/core/fakes.py) and the clock are fake. After every event the books must
balance; each accepted request must end exactly once, within a number of turns computed from its
size, with the model's pure output or, where it was cut short, a prefix of it.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, field, replace

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.detokenize import TextStream
from engineroom.engine.core.plan import StepOutcome, StepPlan
from engineroom.engine.core.request import PENDING, Request
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig, Update

from .fakes import EOS, STOPS, VOCAB, FakeDevice, Script, Truth, score, token_bytes, truth


class SimulationError(AssertionError):
    """A law was broken; says how to see it again."""


@dataclass
class Watched:
    """An accepted request, what it must answer, and what it has answered."""

    request: Request
    truth: Truth
    work: int  # turns that it needs when it is first in the order
    bound: int  # turns within which it must end
    since: int
    rework: int  # of it and all that were alive when it came: done again for each overtaker
    cut_short: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0
    ended: bool = False


class World:
    """One seed's run. `loud` prints every event."""

    def __init__(self, seed: int, *, loud: bool = False) -> None:
        self.seed = seed
        self.loud = loud
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        block_size = rng.choice((1, 2, 4, 4, 8))
        num_blocks = rng.choice((4, 8, 8, 12, 24)) * (4 if block_size < 4 else 1)
        self.config = SchedulerConfig(
            max_num_seqs=rng.choice((1, 3, 4, 8)),
            max_num_batched_tokens=rng.choice((1, 3, 8, 16, 64)),
            max_model_len=rng.choice((24, 48, 64)),
            num_blocks=num_blocks,
            block_size=block_size,
            max_waiting=rng.choice((3, 8, 30)),
            enable_prefix_caching=rng.random() < 0.8,
            max_prompt_logprob_rows=rng.choice((1, 4, 64)),
        )
        self.fault_rate = rng.choice((0.0, 0.0, 0.05, 0.3))
        self.depth = rng.choice((0, 1))  # steps left in flight while the next is planned
        self.num_faults = 0
        self.turn = 0
        self.scheduler = Scheduler(self.config, clock=self._clock, fault=self._fault)
        self.device = FakeDevice(num_blocks, block_size)
        self.flight: list[tuple[StepPlan, StepOutcome | None]] = []
        self.last: StepPlan | None = None
        self.watched: dict[Request, Watched] = {}
        self.live: dict[Request, Watched] = {}
        self.to_arrive = rng.randrange(1, 16)
        self.hurry = rng.choice((0.1, 0.4, 0.9))  # arrivals a turn
        self.num_refused = 0
        self.roots = [self._tokens(rng.randrange(1, 17)) for _ in range(2)]

    def run(self) -> World:
        """Errors: SimulationError, with the seed and the command that replays it."""
        try:
            while self.to_arrive or self.scheduler.has_work:
                self._turn()
            self._check_end()
        except Exception as error:
            raise SimulationError(
                f"seed {self.seed}, turn {self.turn}: {type(error).__name__}: {error}\n"
                f"replay: python -m tests.core.simulate {self.seed}"
            ) from error
        return self

    # ------------------------------------------------------------------------------- one turn

    def _turn(self) -> None:
        rng = self.rng
        self.turn += 1
        if self.to_arrive and (rng.random() < self.hurry or not self.scheduler.has_work):
            self._arrive()
        if rng.random() < 0.03:
            self._cut_short()
        faults = self.num_faults
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan)
            eager = rng.random() < 0.5 and all(outcome for _, outcome in self.flight)
            self.flight.append((plan, self._execute(plan) if eager else None))
        elif not self.flight and self.scheduler.num_waiting and self.num_faults == faults:
            raise AssertionError("nothing runs though requests wait, nothing is in flight")
        if plan is None or len(self.flight) > self.depth or rng.random() < 0.2:
            self._commit()
        if rng.random() < 0.1:
            self._take(self.scheduler.drain_finished())
        self.scheduler.check_integrity()
        for w in self.live.values():
            waited = self.turn - w.since - self.num_faults
            ended = w.request.is_finished  # this world drains an abort when it likes
            assert ended or waited <= w.bound, f"{w.request} has not ended after {waited} turns"

    def _arrive(self) -> None:
        rng = self.rng
        self.to_arrive -= 1
        prompt = list(rng.choice(self.roots))[: rng.randrange(1, 17)]
        prompt += self._tokens(rng.choice((0, 1, 4, 12)))
        group = self._group(f"r{self.to_arrive}", prompt)
        try:
            self.scheduler.add(*group)
        except AdmissionError as error:
            self.num_refused += 1
            self._say(f"refused {error.code}: {group[0]}")
            self._check_refusal(error, group)
            return
        self._say(f"accepted {len(group)} x {group[0]} priority {group[0].priority}")
        for request in group:
            self._watch(request)

    def _group(self, request_id: str, prompt: list[int]) -> list[Request]:
        rng = self.rng
        max_tokens = rng.choice((1, 3, 8, 20))
        num_samples = rng.choice((1, 1, 1, 3))
        scored = num_samples == 1 and rng.random() < 0.2
        params = SamplingParams(
            n=num_samples,
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, 0, min(2, max_tokens))),
            stop=tuple(rng.sample(STOPS, rng.choice((0, 0, 1, 3)))),
            stop_token_ids=(3,) if rng.random() < 0.1 else (),
            include_stop_str_in_output=rng.random() < 0.3,
            ignore_eos=rng.random() < 0.3,
            repetition_penalty=rng.choice((1.0, 1.0, 1.5)),
            logprobs=rng.choice((None, 0)),
            prompt_logprobs=0 if scored else None,
        )
        if scored and rng.random() < 0.2:
            params = params.replace(max_tokens=0, min_tokens=0)
        shared = {
            "request_id": request_id,
            "prompt_token_ids": prompt,
            "params": params,
            "max_tokens": params.max_tokens,
            "seed": rng.randrange(1 << 30),
            "priority": rng.choice((0, 0, 0, 1, -1)),
            "arrival": self.now,
            "cache_salt": rng.choice((b"", b"", b"salt")),
            "eos_token_ids": frozenset({EOS}),
            "final_only": rng.random() < 0.3,
        }
        group: list[Request] = []
        for index in range(num_samples):
            text = TextStream(
                token_bytes,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
            leader = group[0] if group else None
            group.append(Request(**shared, sample_index=index, text=text, leader=leader))
        return group

    def _watch(self, request: Request) -> None:
        rng, config = self.rng, self.config
        prompt = request.prompt_token_ids
        dead_end = rng.randrange(4) if rng.random() < 0.05 else None
        script = Script.of(prompt, request.seed, request.sample_index, dead_end)
        self.device.scripts[request] = script
        size = len(prompt) + request.max_tokens
        chunk = config.max_num_batched_tokens
        if request.max_prompt_rows:
            chunk = min(chunk, config.max_prompt_logprob_rows)
        work = -(-size // chunk) + request.max_tokens + 1
        # The first in the order gets on in each turn (in every second one where it must wait for
        # its own token, or for victims to leave flight), and loses what it has only to one that
        # comes later with a better priority.
        for w in self.live.values():
            if request.priority < w.request.priority:
                w.rework += work
                w.bound += 4 * w.rework
        ahead = work + sum(w.work for w in self.live.values())
        w = Watched(
            request=request,
            truth=truth(script, request.params, request.max_tokens, request.eos_token_ids),
            work=work,
            bound=4 * ahead + 8,
            since=self.turn - self.num_faults,
            rework=ahead,
        )
        self.watched[request] = self.live[request] = w

    def _cut_short(self) -> None:
        """Abort or fail somebody: alive, ended, or never seen; now and then twice."""
        rng = self.rng
        if not self.watched:
            assert self.scheduler.abort("nobody") == 0
            return
        request_id = rng.choice(list(self.watched)).request_id
        group = [w for r, w in self.live.items() if r.request_id == request_id]
        reason = rng.choice((FinishReason.ABORT, FinishReason.ABORT, FinishReason.ERROR))
        self._say(f"{reason.value} {request_id}")
        alive = [w for w in group if not w.request.is_finished]
        if reason is FinishReason.ABORT:
            assert self.scheduler.abort(request_id) == len(alive)
            assert self.scheduler.abort(request_id) == 0
        else:
            self.scheduler.fail(request_id, "injected")
        for w in alive:
            w.cut_short = reason
        self.scheduler.check_integrity()

    def _execute(self, plan: StepPlan) -> StepOutcome:
        outcome = self.device.execute(plan)
        if self.rng.random() < 0.01:
            victim = self.rng.randrange(len(plan.requests))
            return replace(outcome, errors={victim: "injected"})
        return outcome

    def _commit(self) -> None:
        if not self.flight:
            return
        plan, outcome = self.flight.pop(0)
        if outcome is None:
            outcome = self._execute(plan)
        for index in outcome.errors or ():
            request = plan.requests[index].request
            if not request.is_finished:
                self.watched[request].cut_short = FinishReason.ERROR
        self._take(self.scheduler.commit(plan, outcome))

    def _take(self, updates: list[Update]) -> None:
        for u in updates:
            w = self.watched[u.request]
            assert not w.ended, f"{u.request} is heard of after its end"
            w.tokens += u.new_token_ids
            w.text += u.text_delta
            w.num_logprobs += len(u.new_logprobs)
            for entry in u.new_prompt_logprobs:
                w.num_prompt_logprobs += 1
                position = w.num_prompt_logprobs
                assert entry == score(position, u.request.token_ids[position]), "out of turn"
            assert u.finished == u.request.is_finished
            if u.finished:
                w.ended = True
                del self.live[u.request]
                self._say(f"ended {u.request} {u.request.finish_reason}")
                self._check_answer(w)

    # --------------------------------------------------------------------------------- checks

    def _check_plan(self, plan: StepPlan) -> None:
        config = self.config
        self._say(
            f"step {plan.step_id}: "
            + " ".join(f"{s.request.request_id}@{s.start}+{s.num_tokens}" for s in plan.requests)
        )
        assert 0 < plan.num_tokens <= config.max_num_batched_tokens, "over the token budget"
        assert len(plan.requests) <= config.max_num_seqs
        assert len({s.request for s in plan.requests}) == len(plan.requests)
        assert not {s.request for s in plan.requests} & set(plan.preempted), "preempted and planned"
        scored = plan.num_logit_rows - sum(s.samples for s in plan.requests)
        assert scored <= config.max_prompt_logprob_rows, "too many prompt-logprob rows"
        last, self.last = self.last, plan
        if last is not None and plan.roster is last.roster:
            ends = [s.start + s.num_tokens for s in last.requests]
            assert list(plan.starts) == ends, "a kept roster must go on where it ended"
        for s in plan.requests:
            assert s.num_tokens > 0
            assert s.block_ids is s.request.block_ids
            assert PENDING not in s.token_ids[:-1], "more than one token is not known"

    def _check_answer(self, w: Watched) -> None:
        request, whole = w.request, w.truth
        assert tuple(w.tokens) == request.output_token_ids
        assert w.num_prompt_logprobs == len(request.prompt_logprobs)
        assert w.num_logprobs == (0 if request.params.logprobs is None else len(w.tokens))
        assert request.text is not None and w.text == request.text.text
        assert sum(s.length_ns for s in request.timeline.segments) == request.timeline.total_ns
        if w.cut_short is not None:
            assert request.finish_reason is w.cut_short
            assert whole.tokens[: len(w.tokens)] == tuple(w.tokens), "not a prefix"
            assert whole.text.startswith(w.text), "text is not a prefix"
            return
        assert tuple(w.tokens) == whole.tokens, f"{w.tokens} is not {whole}"
        assert request.finish_reason is whole.reason, f"{request.finish_reason} is not {whole}"
        assert request.stop_reason == whole.stop
        if whole.reason is not FinishReason.ERROR:
            assert w.text == whole.text, f"{w.text!r} is not {whole}"
            assert w.num_prompt_logprobs == request.max_prompt_rows
        else:
            assert whole.text.startswith(w.text)

    def _check_refusal(self, error: AdmissionError, group: list[Request]) -> None:
        """A refusal must be true, and must leave nothing behind."""
        config, request = self.config, group[0]
        room = request.num_prompt_tokens + max(request.max_tokens - 1, 0)
        refused = {
            "queue_full": self.scheduler.num_waiting + len(group) > config.max_waiting,
            "context_length": request.num_prompt_tokens + request.max_tokens > config.max_model_len,
            "never_fits": -(-room // config.block_size) > config.num_blocks,
        }
        assert refused[error.code], f"wrongly refused: {error}"
        assert self.scheduler.abort(request.request_id) == 0

    def _check_end(self) -> None:
        self._take(self.scheduler.drain_finished())
        self.scheduler.check_integrity()
        assert not self.live, f"never ended: {list(self.live)}"
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == stats.owned_blocks == 0
        assert stats.num_accepted == stats.num_finished == len(self.watched)

    # ---------------------------------------------------------------------------------- tools

    def _clock(self) -> float:
        self.now += 0.001
        return self.now

    def _fault(self, point: str) -> bool:
        refused = self.rng.random() < self.fault_rate
        self.num_faults += refused
        return refused

    def _tokens(self, n: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(n)]

    def _say(self, what: str) -> None:
        if self.loud:
            print(f"{self.turn:4} {what}")


def main(arguments: list[str]) -> None:
    first = int(arguments[0])
    if len(arguments) == 1:
        world = World(first, loud=True)
        print(world.config, f"faults {world.fault_rate} in flight {world.depth}")
        world.run()
        print(world.scheduler.stats())
        return
    started = time.perf_counter()
    worlds = turns = preemptions = refused = faults = 0
    for seed in range(first, first + int(arguments[1])):
        world = World(seed).run()
        worlds += 1
        turns += world.turn
        preemptions += world.scheduler.stats().num_preemptions
        refused += world.num_refused
        faults += world.num_faults
    seconds = time.perf_counter() - started
    print(
        f"{worlds} seeds in {seconds:.1f} s ({worlds / seconds:.0f}/s), {turns} turns, "
        f"{preemptions} preemptions, {refused} refusals, {faults} allocations refused"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
