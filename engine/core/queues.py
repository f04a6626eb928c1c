"""The two queues of the scheduler: who waits, who runs, both in the scheduler's one order."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from operator import attrgetter

from .request import Request, RequestState

__all__ = ["NOBODY", "Waiting", "index_of", "insert_in_order"]

NOBODY = float("inf")  # the priority of an empty queue: nobody stands behind it
_Order = tuple[int, float, int]
_order = attrgetter("order")


class Waiting:
    """Waiting requests, first in order first. A request that ends while waiting stays in the heap
    as a dead entry until it surfaces or until dead entries outnumber the living.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[_Order, Request]] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def __iter__(self) -> Iterator[Request]:
        return (r for _, r in self._heap if r.state is RequestState.WAITING)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.order, request))

    def head(self) -> Request | None:
        """The first in order, left in place."""
        while self._heap:
            request = self._heap[0][1]
            if request.state is RequestState.WAITING:
                return request
            heapq.heappop(self._heap)
            self._num_dead -= 1
        return None

    def pop(self) -> None:
        """Remove what head() returned."""
        heapq.heappop(self._heap)

    def one_ended(self) -> None:
        """A request of this queue has just become FINISHED."""
        self._num_dead += 1
        if self._num_dead > 64 + len(self):
            self._heap = [entry for entry in self._heap if entry[1].state is RequestState.WAITING]
            heapq.heapify(self._heap)
            self._num_dead = 0

    @property
    def priority(self) -> float:
        """Of the head; NOBODY where none waits."""
        head = self.head()
        return NOBODY if head is None else head.priority


def insert_in_order(running: list[Request], request: Request) -> None:
    running.insert(bisect_left(running, request.order, key=_order), request)


def index_of(running: list[Request], request: Request) -> int:
    return bisect_left(running, request.order, key=_order)
