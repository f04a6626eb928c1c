"""The two queues of the scheduler: who waits, who runs, both in the scheduler's one order."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator
from operator import attrgetter

from .fairness import Account, Shares
from .request import Request, RequestState

__all__ = ["NOBODY", "Waiting", "index_of", "insert_in_order"]

NOBODY = float("inf")  # the priority of an empty queue: nobody stands behind it
_Order = tuple[int, float, int]
_Entry = tuple[_Order, Request]
_order = attrgetter("order")


class Waiting:
    """Waiting requests: by priority, then by whose turn it is (see fairness.py), then in order.

    Each tenant has a heap of its own. A request that ends while waiting stays there as a dead entry
    until it surfaces or until dead entries outnumber the living. `settle` brings the accounts up to
    date; it is called before a choice between tenants.
    """

    def __init__(self, shares: Shares, settle: Callable[[], None]) -> None:
        self._shares = shares
        self._settle = settle
        self._heaps: dict[Account, list[_Entry]] = {}  # none is empty
        self._num_entries = 0
        self._num_dead = 0

    def __len__(self) -> int:
        return self._num_entries - self._num_dead

    def __iter__(self) -> Iterator[Request]:
        entries = (entry for heap in self._heaps.values() for entry in heap)
        return (r for _, r in entries if r.state is RequestState.WAITING)

    def push(self, request: Request) -> None:
        account = request.account
        heap = self._heaps.get(account)
        if heap is None:
            self._shares.comes(account, self._heaps)
            heap = self._heaps[account] = []
        heapq.heappush(heap, (request.order, request))
        self._num_entries += 1

    def head(self) -> Request | None:
        """The one whose turn it is, left in place."""
        heads = self._heads()
        if len(heads) > 1:
            self._settle()
            return min(heads, key=lambda r: (r.priority, r.account.counter, r.order))
        return heads[0] if heads else None

    def pop(self, head: Request) -> None:
        """Remove what head() returned."""
        self._drop_first(head.account)

    def one_ended(self) -> None:
        """A request of this queue has just become FINISHED."""
        self._num_dead += 1
        if self._num_dead > 64 + len(self):
            for account, heap in list(self._heaps.items()):
                heap[:] = [entry for entry in heap if entry[1].state is RequestState.WAITING]
                heapq.heapify(heap)
                if not heap:
                    self._leave(account)
            self._num_entries = sum(map(len, self._heaps.values()))
            self._num_dead = 0

    @property
    def num_tenants(self) -> int:
        """Of whom anybody waits, or waited until a moment ago."""
        return len(self._heaps)

    @property
    def priority(self) -> float:
        """The best of those that wait; NOBODY where none does."""
        return min([request.priority for request in self._heads()], default=NOBODY)

    def _heads(self) -> list[Request]:
        """The first of each tenant's."""
        found = []
        for account, heap in list(self._heaps.items()) if self._num_dead else self._heaps.items():
            while heap and heap[0][1].state is not RequestState.WAITING:
                self._drop_first(account)
                self._num_dead -= 1
            if heap:
                found.append(heap[0][1])
        return found

    def _drop_first(self, account: Account) -> None:
        heap = self._heaps[account]
        heapq.heappop(heap)
        self._num_entries -= 1
        if not heap:
            self._leave(account)

    def _leave(self, account: Account) -> None:
        del self._heaps[account]
        self._shares.leaves(account)


def insert_in_order(running: list[Request], request: Request) -> None:
    running.insert(bisect_left(running, request.order, key=_order), request)


def index_of(running: list[Request], request: Request) -> int:
    return bisect_left(running, request.order, key=_order)
