"""The hands: owns programs, weights and KV on one backend, and answers a StepPlan with tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ...kernels.backend import Backend, KVSpec, SampleResult
from ...kernels.program import Program
from ...kernels.weights import RawWeight, WeightGroup
from ..config import ModelConfig
from ..core.plan import RowResult, ScheduledRequest, StepOutcome, StepPlan, TokenLogprob
from .inputs import SamplingInputsBuilder, StepInputsBuilder

# Called with a request's first row position and its full-vocabulary logprobs [rows, V].
LogprobObserver = Callable[[int, np.ndarray], None]


@dataclass(frozen=True, slots=True)
class Execution:
    """A step's answer and where its time went, in seconds."""

    outcome: StepOutcome
    build_s: float
    execute_s: float


class Runner:
    """One model on one backend. Not thread-safe: one step at a time."""

    def __init__(
        self,
        backend: Backend,
        program: Program,
        weights: Mapping[str, RawWeight | WeightGroup],
        *,
        config: ModelConfig,
        kv: KVSpec,
        num_blocks: int,
    ) -> None:
        self.backend = backend
        self._cache = backend.allocate_kv(kv, num_blocks)
        self.kv_nbytes = num_blocks * kv.bytes_per_block
        packed = {name: backend.pack(weight) for name, weight in weights.items()}
        self._executable = backend.lower(program, packed, self._cache)
        self._sampler = backend.sampler(config.vocab_size)
        self._inputs = StepInputsBuilder(kv.block_size)
        self._sampling = SamplingInputsBuilder(config.vocab_size)
        self.observers: dict[tuple[str, int], LogprobObserver] = {}

    def execute(self, plan: StepPlan) -> Execution:
        """Run the model and the sampling program over one plan."""
        t0 = time.perf_counter()
        step = self._inputs.build(plan)
        rows = self._sampling.build(plan, step)
        t1 = time.perf_counter()
        logits = self._executable.run(step)
        errors: dict[int, str] = {}
        if rows.num_rows == 0:  # every request is in the middle of its prompt
            outcome = StepOutcome(tuple(() for _ in plan.requests))
        else:
            logits = self._host_processors(plan, logits, errors)
            result = self._sampler.run(logits, rows)
            if self.observers:
                self._observe(plan, logits)
            outcome = StepOutcome(_rows(plan, result, rows.num_logprobs), errors or None)
        return Execution(outcome, t1 - t0, time.perf_counter() - t1)

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
