"""Cost: what a request has taken so far, in energy, money and greenhouse gas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Cost", "total"]


@dataclass(frozen=True, slots=True)
class Cost:
    """A request's share of the machine; on its last RequestOutput it is complete.

    joules: of electrical energy. money: in the currency of the configured prices, None where no
    price is configured. grams: of CO2 equivalent, None where no grid intensity is configured.
    estimated: True where any of the energy comes from a stated model and not from a meter.
    """

    joules: float
    money: float | None
    grams: float | None
    estimated: bool

    def __str__(self) -> str:
        """For a person: "0.42 J (estimated), cost 1.2e-08, 4.2e-05 g CO2e"."""
        parts = [f"{self.joules:.3g} J" + " (estimated)" * self.estimated]
        if self.money is not None:
            parts.append(f"cost {self.money:.3g}")
        if self.grams is not None:
            parts.append(f"{self.grams:.3g} g CO2e")
        return ", ".join(parts)


def total(costs: Iterable[Cost | None]) -> Cost | None:
    """The sum of several; None where there is none."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    money = [cost.money for cost in known if cost.money is not None]
    grams = [cost.grams for cost in known if cost.grams is not None]
    return Cost(
        joules=sum(cost.joules for cost in known),
        money=sum(money) if money else None,
        grams=sum(grams) if grams else None,
        estimated=any(cost.estimated for cost in known),
    )
