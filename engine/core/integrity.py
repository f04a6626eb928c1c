"""The scheduler's books, checked all at once: what tests assert after every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

from .blocks import IntegrityError
from .limits import SchedulerConfig
from .plan import StepPlan
from .request import Request, RequestState

__all__ = ["check_books"]


def check_books(
    config: SchedulerConfig,
    *,
    running: Sequence[Request],
    waiting: Sequence[Request],
    live: Collection[Request],
    leaving: Collection[Request],
    in_flight: Collection[StepPlan],
) -> None:
    """Every request is where its state says, once, with counts that can be. IntegrityError."""
    flights: Counter[Request] = Counter()
    samples: Counter[Request] = Counter()
    for plan in in_flight:
        for s in plan.requests:
            flights[s.request] += 1
            samples[s.request] += s.samples
    counted = Counter(running)
    counted.update(waiting)
    _expect(Counter(live) == counted, "a live request is in no queue, or in two")
    _expect(all(a.order < b.order for a, b in pairwise(running)), "running is out of order")
    _expect(len(running) <= config.max_num_seqs, "too many are running")
    for request in {*live, *leaving, *flights}:
        _check_request(request, flights[request], samples[request], config.block_size)
        finished = request.state is RequestState.FINISHED
        _expect(finished == (request in leaving), "neither lives nor leaves", request)
    for request in running:
        _expect(request.state is RequestState.RUNNING, "is in the running list", request)
    for request in waiting:
        _expect(
            request.state is RequestState.WAITING
            and not request.block_ids
            and request.num_scheduled == 0,
            "waits but holds something",
            request,
        )


def _check_request(request: Request, flights: int, samples: int, block_size: int) -> None:
    _expect(request.in_flight == flights, "is miscounted in flight", request)
    _expect(
        0 <= request.num_computed <= request.num_scheduled <= len(request.block_ids) * block_size,
        "is computed beyond its blocks",
        request,
    )
    if request.state is RequestState.FINISHED:
        return  # its tokens in flight are dropped already, its last blocks not yet
    _expect(request.num_scheduled <= request.num_tokens, "computes what is not there", request)
    _expect(request.num_pending == samples, "is miscounted as being sampled", request)
    _expect(request.num_output_tokens < max(request.max_tokens, 1), "has outlived its end", request)


def _expect(holds: bool, what: str, request: Request | None = None) -> None:
    if not holds:
        raise IntegrityError(what if request is None else f"{request} {what}")
