"""The hands: owns programs, weights and KV on one backend, and answers a StepPlan with tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

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
from ...kernels.sampling import FAILED
from ...kernels.weights import RawWeight, WeightGroup
from ..config import ModelConfig
from ..core.answers import TokenLogprob
from ..core.form import FREE
from ..core.plan import Roster, StepOutcome, StepPlan
from .inputs import SamplingInputsBuilder, StepInputsBuilder
from .pooling import Pooling

_NONE: Mapping[int, TokenLogprob] = MappingProxyType({})
RESAMPLES = 4  # of a token that its request's form refuses; then the form chooses
# Called with a request's first row position and its full-vocabulary logprobs [rows, V].
LogprobObserver = Callable[[int, np.ndarray], None]


class Execution(NamedTuple):
    """A step's answer and where its time went, in seconds: building its inputs, and from its launch
    (or the answer of the step before, where that came later) to its own answer."""

    outcome: StepOutcome
    build_s: float
    execute_s: float


class Flight:
    """A step on its way: launched, then sampled, then answered. The runner fills it in."""

    __slots__ = (
        "build_s",
        "execution",
        "launched",
        "logits",
        "plan",
        "rows",
        "sampling",
        "step",
    )

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.execution: Execution | None = None  # its answer, once there
        self.sampling: Sampling | None = None  # where the sampling program was launched
        self.step: StepInputs
        self.rows: SamplingInputs | None = None
        self.logits: Any = None
        self.build_s = 0.0
        self.launched = time.perf_counter()

    def fail(self, error: Exception) -> None:
        """A step that fails ends its own requests, and the engine goes on."""
        message = f"the step failed: {type(error).__name__}: {error}"
        self.land(dict.fromkeys(range(len(self.plan.starts)), message))

    def land(self, errors: dict[int, str] | None = None) -> None:
        """There is nothing to wait for: its rows, if it has any, failed."""
        outcome = StepOutcome([FAILED] * self.plan.num_logit_rows, errors=errors or {})
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
        self._host: _ByHost | None = None  # of the last plan's roster
        self.observers: dict[tuple[str, int], LogprobObserver] = {}

    def launch(self, plan: StepPlan, before: Flight | None = None) -> Flight:
        """Run the model over one plan. `before` is the step that is still in flight, if any, and
        samples the tokens that the plan does not know."""
        flight = Flight(plan)
        try:
            rest = self.pooling.run(plan)
            if not rest.starts:
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
            sampled = np.maximum(self.answer(before).outcome.token_ids, 0)  # FAILED: it has ended
            late = step.token_ids < 0
            step.token_ids[late] = sampled[-1 - step.token_ids[late]]
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
        host = self._by_host(plan)
        return (
            bool(host.processors)
            or any(request.form.near for request, _ in host.forms)
            or any(request.key in self.observers for request in plan.roster.requests)
        )

    def _by_host(self, plan: StepPlan) -> _ByHost:
        host = self._host
        if host is None or host.roster is not plan.roster:
            host = self._host = _ByHost(plan.roster)
        return host

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
            return StepOutcome(())
        errors: dict[int, str] = {}
        host = self._by_host(plan)
        if flight.sampling is not None:
            result = flight.sampling.result()
        else:
            if host.processors:
                logits = self._process(host, logits, errors)
            result = self._sampler.run(logits, rows)
            for last in range(RESAMPLES, -1, -1):
                if not _refuse_unsettled(host, rows, result, forced=last == 0):
                    break
                result = self._sampler.run(logits, rows)
            if self.observers:
                self._observe(plan, logits)
        tokens = result.tokens.tolist()
        if host.wants_logprobs:
            return StepOutcome(tokens, _logprobs(tokens, result, rows.num_logprobs), errors)
        return StepOutcome(tokens, _NONE, errors)

    def _process(self, host: _ByHost, logits, errors: dict[int, str]):  # type: ignore[no-untyped-def]
        """Apply the library face's Python logits processors to their own rows."""
        values = logits.numpy()
        for place, request, row, process in host.processors:
            try:
                tokens = request.known_token_ids
                changed = np.asarray(process(tokens, values[row].copy()), dtype=np.float32)
                if changed.shape != values[row].shape:
                    raise ValueError(
                        f"returned shape {changed.shape}, expected {values[row].shape}"
                    )
                values[row] = changed
            except Exception as error:  # a caller's bug ends the caller's request, not the step
                errors[place] = f"logits_processor raised {type(error).__name__}: {error}"
        return self._sampler.from_numpy(values)

    def _observe(self, plan: StepPlan, logits) -> None:  # type: ignore[no-untyped-def]
        first, logprobs = 0, None
        for s in plan.requests:
            observer = self.observers.get(s.request.key)
            if observer is not None and s.logit_offsets:
                if logprobs is None:
                    logprobs = self._sampler.log_softmax(logits)
                position = s.start + s.logit_offsets[0] + 1
                observer(position, logprobs[first : first + len(s.logit_offsets)])
            first += len(s.logit_offsets)


class _ByHost:
    """The requests of a roster whose sampling Python code may have a part in."""

    def __init__(self, roster: Roster) -> None:
        sampling = [(place, roster.requests[place], row) for place, row in roster.sampling_rows]
        self.roster = roster
        # (its place in the roster, the request, its logit row, the function), and (request, row).
        self.processors = [
            (place, request, row, process)
            for place, request, row in sampling
            if (process := request.params.logits_processor) is not None
        ]
        self.forms = [(request, row) for _, request, row in sampling if request.form is not FREE]
        self.wants_logprobs = any(
            request.params.logprobs is not None
            or request.params.prompt_logprobs is not None
            or request.params.best_of is not None
            for request in roster.requests
        )


def _refuse_unsettled(
    host: _ByHost, rows: SamplingInputs, result: SampleResult, *, forced: bool
) -> bool:
    """Forbid in their masks the tokens behind which a request's form could not end in time; where
    `forced`, allow the form's own choice alone. True where there were any: the rows are then
    sampled again, and as a row is a function of itself the others keep their tokens."""
    found = False
    for request, row in host.forms:
        form = request.form
        if not form.near or result.tokens[row] < 0:
            continue
        token = int(result.tokens[row])
        if not form.settle(token):
            mask = rows.mask_table[rows.mask_row[row]]
            if forced:
                mask[:] = 0
                token = form.instead()
            mask[token >> 5] ^= np.uint32(1 << (token & 31))
            found = True
    return found


def _logprobs(
    tokens: list[int], result: SampleResult, num_logprobs: np.ndarray
) -> dict[int, TokenLogprob]:
    """Of the rows that want them."""
    out = {}
    for row in np.flatnonzero(num_logprobs >= 0).tolist():
        width = num_logprobs[row]
        top_ids = result.top_ids[row, :width].tolist()
        top = tuple(zip(top_ids, result.top_logprobs[row, :width].tolist(), strict=True))
        out[row] = TokenLogprob(
            tokens[row], float(result.logprobs[row]), int(result.ranks[row]), top
        )
    return out
