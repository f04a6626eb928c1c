"""Stretches change nothing that anybody sees: the same world with them and without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from engineroom.engine.core.answers import Growth
from engineroom.engine.core.detokenize import TextStream
from engineroom.engine.core.plan import StepPlan
from engineroom.engine.core.planner import Planner
from engineroom.engine.core.request import Request
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig, Update
from tests.counts import count

from .fakes import EOS, STOPS, VOCAB, FakeDevice, Script, token_bytes


def brittle(token: int) -> bytes:
    if token == 3:
        raise KeyError(token)
    return token_bytes(token)


class World:
    """Requests that mostly decode; `told`: all that its scheduler planned and answered."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        block_size = rng.choice((1, 2, 4, 8))
        self.num_blocks = -(-rng.choice((60, 120, 400)) // block_size)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=rng.choice((1, 3, 6)),
                max_num_batched_tokens=rng.choice((8, 64)),
                max_model_len=60,
                num_blocks=self.num_blocks,
                block_size=block_size,
                max_waiting=50,
                enable_prefix_caching=rng.random() < 0.7,
            ),
            clock=self.clock,
        )
        self.device = FakeDevice(self.num_blocks, block_size)
        self.depth = rng.choice((0, 1))
        self.to_come = rng.randrange(1, 20)
        self.hurry = rng.choice((0.02, 0.1, 1.0))
        self.looks = rng.choice((0.0, 0.0, 0.2))  # at the books, a turn: what is read catches up
        self.told: list[Any] = []
        self.requests: list[Request] = []
        self.num_stretched = self.num_grown = 0

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def run(self) -> World:
        flight: list[StepPlan] = []
        while self.to_come or self.scheduler.has_work:
            if self.to_come and (self.rng.random() < self.hurry or not self.scheduler.has_work):
                self.arrive()
            if self.rng.random() < 0.02 and self.requests:
                self.scheduler.abort(self.rng.choice(self.requests).request_id)
            plan = self.scheduler.schedule()
            if plan is not None:
                self.note(plan)
                flight.append(plan)
            if flight and (plan is None or len(flight) > self.depth):
                first = flight.pop(0)
                outcome = self.device.execute(first)
                growths = self.scheduler.growths(outcome)
                self.num_grown += len(growths)
                self.tell(self.scheduler.commit(first, outcome), growths)
            self.tell(self.scheduler.drain_finished())
            if self.rng.random() < self.looks:
                self.scheduler.check_integrity()
        self.scheduler.check_integrity()
        self.told.append(self.scheduler.stats())
        self.told += [r.timings() for r in self.requests]
        return self

    def arrive(self) -> None:
        rng = self.rng
        self.to_come -= 1
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        params = SamplingParams(
            max_tokens=rng.choice((1, 20, 40)),
            stop=tuple(rng.sample(STOPS, rng.choice((0, 0, 0, 2)))),
            ignore_eos=rng.random() < 0.8,
            repetition_penalty=rng.choice((1.0, 1.0, 1.5)),
            logprobs=rng.choice((None, None, 0)),
        )
        pieces = brittle if rng.random() < 0.1 else token_bytes
        text = TextStream(pieces, stop=params.stop)
        request = Request(
            request_id=f"r{self.to_come}",
            prompt_token_ids=prompt,
            params=params,
            max_tokens=params.max_tokens or 1,
            seed=rng.randrange(1 << 30),
            priority=rng.choice((0, 0, 0, 1)),
            arrival=self.now,
            eos_token_ids=frozenset({EOS}),
            final_only=rng.random() < 0.7,
            growths=params.logprobs is None and rng.random() < 0.7,
            text=text,
            tenant=rng.choice("abc"),
        )
        dead_end = rng.randrange(20) if rng.random() < 0.1 else None
        self.device.scripts[request] = Script.of(tuple(prompt), request.seed, 0, dead_end)
        self.scheduler.add(request)
        self.requests.append(request)

    def note(self, plan: StepPlan) -> None:
        self.num_stretched += plan.turned is not None
        parts = [
            (s.request.key, s.start, list(s.token_ids), list(s.block_ids)) for s in plan.requests
        ]
        self.told.append((plan.step_id, parts, [r.key for r in plan.preempted]))

    def tell(self, updates: list[Update], growths: Sequence[Growth] = ()) -> None:
        told: list[Any] = [*growths]
        for update in updates:
            request, *rest = update
            if request.tells_growth and not update.finished:
                told.append(Growth(request.request_id, update.new_token_ids, update.text_delta))
            else:
                tokens = request.output_token_ids
                told.append(
                    (request.request_id, rest, tokens, request.finish_reason, request.error)
                )
        # Which of a step's requests comes first is nobody's business.
        self.told += sorted(told, key=lambda one: one[0])


def test_the_same_with_stretches_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    stretched = grown = 0
    for seed in range(count(reduced=150, full=5000)):
        world = World(seed).run()
        with monkeypatch.context() as patch:
            patch.setattr(Planner, "_begin_stretch", lambda self: None)
            plain = World(seed).run()
        assert plain.num_stretched == plain.num_grown == 0
        for one, other in zip(world.told, plain.told, strict=True):
            assert one == other, f"seed {seed}"
        stretched += world.num_stretched
        grown += world.num_grown
    assert stretched > 1000 and grown > 300, "there were no stretches to speak of"
