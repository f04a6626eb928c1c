"""Which share of the machine's limit a model's figures reach: its cost, at rates measured now.

The limit is of the CPU. A GPU's rates take seconds of its own kernels to measure, which
`engineroom bench gpu --report` does; there the cells stay empty.
"""

from __future__ import annotations

from ...kernels.cpu import _native
from ..engine import Engine
from .cost import ModelCost
from .limits import Limits, cold_bytes


class Bound:
    """Seconds that an engine's work takes at least; the rates are measured anew for each answer,
    since memory's speed changes within seconds on a shared machine."""

    def __init__(self, engine: Engine) -> None:
        self._cost = ModelCost.of_engine(engine)
        self._threads = engine.config.threads or _native.usable_cores()

    def prompt_s(self, tokens: int) -> float | None:
        """Of a prompt alone, to its first token."""
        return None if self._cost is None else self._cost.prompt_s(tokens, self._rates())

    def decode_s(self, batch: int, context: int) -> float | None:
        """Of a step that gives each of `batch` sequences a token."""
        return None if self._cost is None else self._cost.decode_s(batch, context, self._rates())

    def run_s(self, batch: int, input_len: int, output_len: int) -> float | None:
        """Of requests that come at once, to the end of them all."""
        return (
            None
            if self._cost is None
            else self._cost.run_s(batch, input_len, output_len, self._rates())
        )

    def _rates(self) -> dict[str, float]:
        return Limits.measured(self._threads, cold_bytes()).rates()


def share(key: str, least_s: float | None, took_ms: float | None) -> dict[str, float]:
    """The cell, in percent; none where either is not known."""
    return {} if least_s is None or took_ms is None else {key: 1e5 * least_s / took_ms}
