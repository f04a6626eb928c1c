"""Fairness between tenants (API keys): whose waiting request is admitted next, by served tokens.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
arXiv:2401.00588). Each tenant's counter is the tokens computed for it over its weight; among those
that have a request waiting at the best priority, the one with the smallest counter goes first. A
tenant that comes back after a pause is lifted to those that wait, so that idleness is not saved up.
Only the order of admission is decided here: work-conserving, and no output depends on it. With one
tenant it is first come, first served.

The waiting room is shared by the same weights. While it has room anybody may fill it; once it is
full, who has fewer waiting than another displaces the newest of the one with the most, so that a
flood of one tenant's is refused to that tenant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

__all__ = ["Account", "Shares", "fullest", "may_displace"]


class Account:
    """One tenant's counter. A tenant of weight 2 may be served twice what one of weight 1 is."""

    __slots__ = ("counter", "num_waiting", "tenant", "weight")

    def __init__(self, tenant: str, counter: float) -> None:
        self.tenant = tenant
        self.weight = 1.0
        self.counter = counter  # tokens / weight
        self.num_waiting = 0  # requests, each sample one: the scheduler's to count

    def charge(self, num_tokens: int) -> None:
        self.counter += num_tokens / self.weight


class Shares:
    """The accounts of all tenants; there are as many as there are API keys."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._left_last = 0.0  # counter of the tenant whose last waiting request was admitted last

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def account(self, tenant: str, weight: float) -> Account:
        """The tenant's account, at the weight that its newest request says."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant, 0.0)
        account.weight = weight
        return account

    def comes(self, account: Account, waiting: Collection[Account]) -> None:
        """A tenant that had none waiting has a request now, beside those of `waiting`."""
        floor = min((other.counter for other in waiting), default=self._left_last)
        account.counter = max(account.counter, floor)

    def leaves(self, account: Account) -> None:
        """The last waiting request of a tenant was admitted, or has ended."""
        self._left_last = account.counter


def fullest(accounts: Iterable[Account]) -> Account:
    """The one with the most waiting over its weight."""
    return max(accounts, key=lambda account: account.num_waiting / account.weight)


def may_displace(account: Account, coming: int, other: Account, leaving: int) -> bool:
    """True where `other`, after `leaving` of its requests left, waits with no fewer over its weight
    than `account` with those `coming`: so that two floods do not displace each other in turn."""
    mine = (account.num_waiting + coming) / account.weight
    return (other.num_waiting - leaving) / other.weight >= mine
