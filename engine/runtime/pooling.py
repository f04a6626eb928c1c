"""Embeddings: the mean of a prompt's hidden states, taken as the chunks of the prompt are computed.

A request that asks for one samples nothing and wants no logits, so its share of a step is run by a
program of its own, which ends at the final norm. Rows are added in ascending order of position, in
float64: neither chunks nor neighbours show in a bit (law 2 says so of the rows themselves).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...kernels.backend import Executable
from ..core.plan import StepPlan
from .inputs import StepInputsBuilder


class Pool:
    """The sum of one prompt's hidden states so far."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_added = 0
        self._sum: np.ndarray | None = None  # [H] float64

    def add(self, start: int, rows: np.ndarray) -> None:
        """Take rows [n, H] of positions start onward; those known from before a preemption, which
        are the same again, count once."""
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1], np.float64)
        for row in rows[self._num_added - start :]:
            self._sum += row
        self._num_added = max(self._num_added, start + len(rows))

    def embedding(self) -> tuple[float, ...] | None:
        """The mean at unit length, [H] of float32 values; None before the prompt's end.

        All zeros stay zeros; what is not finite stays so.
        """
        if self._sum is None or self._num_added < self._num_tokens:
            return None
        mean = self._sum / self._num_tokens
        norm = math.sqrt(math.fsum(mean * mean))
        unit = (mean / (norm or 1.0)).astype(np.float32)
        return tuple(unit.tolist())


class Pooling:
    """The requests that are pooled. `lower` makes their executable, when the first one comes."""

    def __init__(self, lower: Callable[[], Executable], inputs: StepInputsBuilder) -> None:
        self.pools: dict[tuple[str, int], Pool] = {}  # by Request.key
        self._lower = lower
        self._inputs = inputs
        self._executable: Executable | None = None

    def run(self, plan: StepPlan) -> StepPlan:
        """Compute the share of those requests, and return the plan of the others."""
        if not self.pools:
            return plan
        mine: list[int] = []
        others: list[int] = []
        for place, request in enumerate(plan.roster.requests):
            (mine if request.key in self.pools else others).append(place)
        if not mine:
            return plan
        if self._executable is None:
            self._executable = self._lower()
        pooled = plan.part(mine)
        step = self._inputs.build(pooled)
        every = np.arange(len(step.token_ids), dtype=np.int32)
        rows = self._executable.run(replace(step, logit_rows=every)).numpy()
        for s, first in zip(pooled.requests, step.query_start.tolist(), strict=False):
            self.pools[s.request.key].add(s.start, rows[first : first + s.num_tokens])
        return plan.part(others)


__all__ = ["Pool", "Pooling"]
