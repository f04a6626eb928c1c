"""The hands: owns programs, weights and KV on one backend, and answers a StepPlan with tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from ...kernels.backend import (
    Backend,
    KVSpec,
    LaunchingSampler,
    PreparedExecutable,
    SampleResult,
    Sampling,
    SamplingInputs,
    StepInputs,
)
from ...kernels.program import Program
from ...kernels.weights import RawWeight, WeightGroup
from ..config import ModelConfig
from ..core.plan import RowResult, ScheduledRequest, StepOutcome, StepPlan, TokenLogprob
from .inputs import SamplingInputsBuilder, StepInputsBuilder
from .pooling import Pooling

# Called with a request's first row position and its full-vocabulary logprobs [rows, V].
LogprobObserver = Callable[[int, np.ndarray], None]


@dataclass(frozen=True, slots=True)
class Execution:
    """A step's answer and where its time went, in seconds: building its inputs, and from its launch
    (or the answer of the step before, where that came later) to its own answer."""

    outcome: StepOutcome
    build_s: float
    execute_s: float


class Flight:
    """A step on its way: launched, then sampled, then answered. The runner fills it in."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.execution: Execution | None = None  # its answer, once there
        self.tokens = np.zeros(plan.num_logit_rows, dtype=np.int32)  # then too; 0 where it failed
        self.sampling: Sampling | None = None  # where the sampling program was launched
        self.step: StepInputs
        self.rows: SamplingInputs | None = None
        self.logits: Any = None
        self.build_s = 0.0
        self.launched = time.perf_counter()

    def fail(self, error: Exception) -> None:
        """A step that fails ends its own requests, and the engine goes on."""
        message = f"the step failed: {type(error).__name__}: {error}"
        self.land(dict.fromkeys(range(len(self.plan.requests)), message))

    def land(self, errors: dict[int, str] | None = None) -> None:
        """Its answer has no rows: there is nothing more to wait for."""
        outcome = StepOutcome(tuple(() for _ in self.plan.requests), errors)
        self.execution = Execution(outcome, self.build_s, time.perf_counter() - self.launched)


class Runner:
    """One model on one backend. Not thread-safe.

    A step is launch(), sample(), answer(), and none of them raises for the step's own sake: what
    failed is in the answer. On a backend that overlaps the first two do not wait for the device,
    and a step may be launched before the one before it is answered; it is sampled afterwards.
    """

    def __init__(
        self,
        backend: Backend,
        program: Program,
        weights: Mapping[str, RawWeight | WeightGroup],
        *,
        config: ModelConfig,
        kv: KVSpec,
        num_blocks: int,
        limits: tuple[int, int, int],
        hidden: Callable[[], Program],
    ) -> None:
        """limits: tokens and logit rows of a step, and tokens of a sequence, at most. `hidden`
        records the program whose rows are pooled into embeddings (see models.record_hidden)."""
        self.backend = backend
        self._cache = backend.allocate_kv(kv, num_blocks)
        self.kv_nbytes = num_blocks * kv.bytes_per_block
        packed = {name: backend.pack(weight) for name, weight in weights.items()}
        self._executable = backend.lower(program, packed, self._cache)
        if isinstance(self._executable, PreparedExecutable):
            self._executable.prepare(*limits)
        self._sampler = backend.sampler(config.vocab_size)
        sampler = self._sampler
        self._launching = sampler if isinstance(sampler, LaunchingSampler) else None
        self._answered = 0.0  # when the last step was
        self._inputs = StepInputsBuilder(kv.block_size)
        self.pooling = Pooling(
            lambda: backend.lower(hidden(), packed, self._cache), StepInputsBuilder(kv.block_size)
        )
        self._sampling = SamplingInputsBuilder(config.vocab_size)
        self.observers: dict[tuple[str, int], LogprobObserver] = {}

    def launch(self, plan: StepPlan, before: Flight | None = None) -> Flight:
        """Run the model over one plan. `before` is the step that is still in flight, if any, and
        samples the tokens that the plan does not know."""
        flight = Flight(plan)
        try:
            rest = self.pooling.run(plan)
            if not rest.requests:
                flight.land()
                return flight
            step = self._inputs.build(rest, None if before is None else before.plan)
            if before is None:
                flight.rows = self._sampling.build(plan, step)
            flight.build_s = time.perf_counter() - flight.launched
            flight.step = step if before is None else self._behind(before, step)
            flight.launched = time.perf_counter()
            flight.logits = self._executable.run(flight.step)
        except Exception as error:
            flight.fail(error)
        return flight

    def _behind(self, before: Flight, step: StepInputs) -> StepInputs:
        """The step with the tokens that the one before it samples: on the device, or known."""
        if before.sampling is not None and before.execution is None:
            return replace(step, sampled=before.sampling.tokens)
        if before.plan.num_logit_rows:  # the host samples, from logits that the next step replaces
            self.answer(before)
        late = step.token_ids < 0
        step.token_ids[late] = before.tokens[-1 - step.token_ids[late]]
        return step

    def sample(self, flight: Flight) -> None:
        """Launch the sampling program over a step's logits, where it need not wait for them.

        Every earlier step must be committed: penalties, bans and the like read the tokens so far.
        """
        if flight.execution is not None:
            return
        try:
            if flight.rows is None:
                started = time.perf_counter()
                flight.rows = self._sampling.build(flight.plan, flight.step)
                flight.build_s += time.perf_counter() - started
            sampler = self._launching
            if sampler and flight.rows.num_rows and not self._wanted_by_host(flight.plan):
                flight.sampling = sampler.launch(flight.logits, flight.rows)
        except Exception as error:
            flight.fail(error)

    def _wanted_by_host(self, plan: StepPlan) -> bool:
        """True where Python code reads or changes the step's logits."""
        return any(
            s.request.params.logits_processor is not None or s.request.key in self.observers
            for s in plan.requests
        )

    def answer(self, flight: Flight) -> Execution:
        """The step's answer, once it is there; the same again where it was asked for already."""
        if flight.execution is None:
            try:
                outcome = self._outcome(flight)
                now = time.perf_counter()
                execute_s = now - max(flight.launched, self._answered)
                flight.execution = Execution(outcome, flight.build_s, execute_s)
            except Exception as error:
                flight.fail(error)
            self._answered = time.perf_counter()
        assert flight.execution is not None
        return flight.execution

    def _outcome(self, flight: Flight) -> StepOutcome:
        plan, rows, logits = flight.plan, flight.rows, flight.logits
        assert rows is not None
        if rows.num_rows == 0:  # every request is in the middle of its prompt
            logits.wait()
            return StepOutcome(tuple(() for _ in plan.requests))
        errors: dict[int, str] = {}
        if flight.sampling is not None:
            result = flight.sampling.result()
        else:
            logits = self._host_processors(plan, logits, errors)
            result = self._sampler.run(logits, rows)
            if self.observers:
                self._observe(plan, logits)
        flight.tokens = np.maximum(result.tokens, 0)  # -1: the row failed, and its request ends
        return StepOutcome(_rows(plan, result, rows.num_logprobs), errors or None)

    def _host_processors(self, plan: StepPlan, logits, errors: dict[int, str]):  # type: ignore[no-untyped-def]
        """Apply the library face's Python logits processors to their own rows."""
        if not any(s.request.params.logits_processor for s in plan.requests):
            return logits
        host = logits.numpy()
        for index, (s, first) in enumerate(_first_rows(plan)):
            process = s.request.params.logits_processor
            if not s.samples or process is None:
                continue
            row = first + len(s.logit_offsets) - 1
            tokens = s.request.known_token_ids
            try:
                changed = np.asarray(process(tokens, host[row].copy()), dtype=np.float32)
                if changed.shape != host[row].shape:
                    raise ValueError(f"returned shape {changed.shape}, expected {host[row].shape}")
                host[row] = changed
            except Exception as error:  # a caller's bug ends the caller's request, not the step
                errors[index] = f"logits_processor raised {type(error).__name__}: {error}"
        return self._sampler.from_numpy(host)

    def _observe(self, plan: StepPlan, logits) -> None:  # type: ignore[no-untyped-def]
        wanted = [
            (s, first, self.observers[s.request.key])
            for s, first in _first_rows(plan)
            if s.request.key in self.observers and s.logit_offsets
        ]
        if wanted:
            logprobs = self._sampler.log_softmax(logits)
            for s, first, observer in wanted:
                position = s.start + s.logit_offsets[0] + 1
                observer(position, logprobs[first : first + len(s.logit_offsets)])


def _first_rows(plan: StepPlan) -> list[tuple[ScheduledRequest, int]]:
    """Each scheduled request with the index of its first logit row."""
    out, at = [], 0
    for s in plan.requests:
        out.append((s, at))
        at += len(s.logit_offsets)
    return out


def _rows(
    plan: StepPlan, result: SampleResult, num_logprobs: np.ndarray
) -> tuple[tuple[RowResult, ...], ...]:
    tokens = result.tokens.tolist()
    wanted = num_logprobs.tolist()

    def logprob(row: int) -> TokenLogprob:
        top = tuple(
            zip(
                result.top_ids[row, : wanted[row]].tolist(),
                result.top_logprobs[row, : wanted[row]].tolist(),
                strict=True,
            )
        )
        return TokenLogprob(tokens[row], float(result.logprobs[row]), int(result.ranks[row]), top)

    found = iter(
        [
            RowResult(token, logprob(row) if wanted[row] >= 0 else None)
            for row, token in enumerate(tokens)
        ]
    )
    return tuple([tuple(islice(found, len(s.targets))) for s in plan.requests])
