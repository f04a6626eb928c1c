"""Step inputs that are kept from step to step, against the same made anew."""

from __future__ import annotations

import dataclasses

import numpy as np

from engineroom.engine.core import history
from engineroom.engine.core.plan import StepOutcome, StepPlan
from engineroom.engine.core.request import Request
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig
from engineroom.engine.runtime.inputs import SamplingInputsBuilder, StepInputsBuilder
from engineroom.kernels.backend import SamplingInputs, StepInputs
from tests.counts import count

VOCAB, BLOCK = 50, 4


def _random_request(rng: np.random.Generator, index: int) -> Request:
    params = SamplingParams(
        max_tokens=int(rng.integers(1, 30)),
        prompt_logprobs=0 if rng.random() < 0.2 else None,
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.4])),
        logit_bias={3: 1.0} if rng.random() < 0.2 else None,
        no_repeat_ngram_size=int(rng.choice([0, 0, 2])),
        allowed_token_ids=tuple(range(9)) if rng.random() < 0.2 else None,
        ignore_eos=True,
    )
    prompt = rng.integers(0, VOCAB, rng.integers(1, 20)).tolist()
    return Request(
        request_id=str(index),
        prompt_token_ids=prompt,
        params=params,
        max_tokens=params.max_tokens or 1,
        seed=index,
    )


def _answer(rng: np.random.Generator, plan: StepPlan) -> StepOutcome:
    return StepOutcome(
        [int(rng.integers(VOCAB)) if t < 0 else t for s in plan.requests for t in s.targets]
    )


def _equal(kept: StepInputs | SamplingInputs, anew: StepInputs | SamplingInputs) -> None:
    for field in dataclasses.fields(kept):
        a, b = getattr(kept, field.name), getattr(anew, field.name)
        if a is None or b is None:
            assert a is b, field.name
        else:
            assert a.dtype == b.dtype and a.tolist() == b.tolist(), field.name


def test_what_is_kept_equals_what_is_made_anew() -> None:
    """Requests come, grow, are preempted and leave; blocks are few, so that lists are reused."""
    for seed in range(count(reduced=6, full=200)):
        rng = np.random.default_rng(seed)
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=6,
                max_num_batched_tokens=24,
                max_model_len=64,
                num_blocks=24,
                block_size=BLOCK,
            )
        )
        steps, rows = StepInputsBuilder(BLOCK), SamplingInputsBuilder(VOCAB)
        preempted = 0
        for turn in range(120):
            if turn < 60 and rng.random() < 0.3:
                scheduler.add(_random_request(rng, turn))
            plan = scheduler.schedule()
            if plan is None:
                continue
            preempted += len(plan.preempted)
            if rng.random() < 0.1:  # a step that the kept builder never saw
                scheduler.commit(plan, _answer(rng, plan))
                continue
            step = steps.build(plan)
            sampling = rows.build(plan, step)
            _equal(step, StepInputsBuilder(BLOCK).build(plan))
            _equal(sampling, SamplingInputsBuilder(VOCAB).build(plan, step))
            _check_step(plan, step)
            _check_rows(plan, sampling)
            scheduler.commit(plan, _answer(rng, plan))
        assert preempted or seed


def _check_step(plan: StepPlan, step: StepInputs) -> None:
    """Against the shapes' own words, token by token."""
    at = 0
    for row, s in enumerate(plan.requests):
        for offset, token in enumerate(s.token_ids):
            position = s.start + offset
            block = s.block_ids[position // BLOCK]
            assert step.token_ids[at] == token and step.positions[at] == position
            assert step.slot[at] == block * BLOCK + position % BLOCK
            at += 1
        table = step.block_table[row].tolist()
        assert table == [*s.block_ids, *[0] * (len(table) - len(s.block_ids))]
        assert step.query_start[row + 1] == at
        assert step.seq_len[row] == s.start + len(s.token_ids)


def _check_rows(plan: StepPlan, sampling: SamplingInputs) -> None:
    """Positions and histories, from the requests themselves."""
    row = 0
    for s in plan.requests:
        request, p = s.request, s.request.params
        penalised = p.repetition_penalty != 1.0 or p.frequency_penalty
        for offset, target in zip(s.logit_offsets, s.targets, strict=True):
            assert sampling.position[row] == s.start + offset + 1
            assert sampling.target[row] == target
            first, last = sampling.history_start[row : row + 2]
            ids = sampling.history_ids[first:last].tolist()
            counts = sampling.history_count[first:last].tolist()
            seen = history.token_counts(request.prompt_token_ids, request.output_token_ids)
            expected = seen if penalised and target < 0 else {}
            assert dict(zip(ids, counts, strict=True)) == expected and ids == list(expected)
            row += 1
