"""The least that a step can take on this machine: its bytes at the read bandwidth, its operations
at the dot peaks, whichever is longer. Both are the probe's, of the moment of the measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What an engine's model reads and multiplies. An operation is a multiply or an add."""

    weight_bytes: int  # of all matrices that a step multiplies by, as they are packed
    kv_bytes: int  # of one token in one layer
    linear_ops: int  # of one token, the head left out
    head_ops: int  # of one row of logits
    attention_ops: int  # of one token with one key in one layer
    windows: tuple[int, ...]  # per layer: the keys that a token attends, 0 for all
    products: str  # which of the probe's peaks bounds the linear layers

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Cost:
        """From the fields as JSON holds them."""
        return cls(**{**told, "windows": tuple(told["windows"])})

    def decode_s(self, batch: int, context: int, moment: Mapping[str, Any]) -> float | None:
        """Seconds of a step of `batch` tokens, each with `context` keys. None: no such peak."""
        keys = batch * sum(min(context, window or context) for window in self.windows)
        return self._seconds(
            self.weight_bytes + keys * self.kv_bytes,
            batch * (self.linear_ops + self.head_ops),
            keys * self.attention_ops,
            moment,
        )

    def prompt_s(self, tokens: int, moment: Mapping[str, Any]) -> float | None:
        """Seconds until a prompt's first token. None: no such peak."""
        keys = sum(_causal(tokens, window or tokens) for window in self.windows)
        return self._seconds(
            self.weight_bytes,
            tokens * self.linear_ops + self.head_ops,
            keys * self.attention_ops,
            moment,
        )

    def _seconds(
        self, read: int, linear: int, attention: int, moment: Mapping[str, Any]
    ) -> float | None:
        rates = [moment.get(name) for name in ("read_gbs", self.products, "bf16_gflops")]
        if not all(rates):
            return None
        bandwidth, products, scores = (rate * 1e9 for rate in rates if rate is not None)
        return max(read / bandwidth, linear / products + attention / scores)


def _causal(tokens: int, window: int) -> int:
    """Pairs of a token and a key that it attends."""
    window = min(window, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window
