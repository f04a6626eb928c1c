"""The least that a step can take on this machine: its bytes at the read bandwidth, its operations
at the dot peaks, whichever is longer. Both are measured, near the moment of the step."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.cpu.backend import CpuBackend
from ...kernels.program import T
from ..engine import Engine
from ..runtime.assemble import LoadPlan, plan_load
from ..runtime.load import open_model

_PEAKS = {"int8": "int8_gops", "bfloat16": "bf16_gflops", "float32": "f32_gflops"}


@dataclass(frozen=True)
class ModelCost:
    """What an engine's model reads and multiplies. An operation is a multiply or an add."""

    weight_bytes: int  # of all matrices that a step multiplies by, as they are packed
    kv_bytes: int  # of one token in one layer
    linear_ops: int  # of one token, the head left out
    head_ops: int  # of one row of logits
    attention_ops: int  # of one token with one key in one layer
    windows: tuple[int, ...]  # per layer: the keys that a token attends, 0 for all
    products: str  # which peak bounds the linear layers: a name of Limits.rates()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> ModelCost:
        """From the fields as JSON holds them."""
        return cls(**{**told, "windows": tuple(told["windows"])})

    @classmethod
    def of_engine(cls, engine: Engine) -> ModelCost | None:
        """From what loading planned; None where it is not the CPU that computes.

        Looking up a row of a table costs a step next to nothing, so the program is counted without
        its lookups.
        """
        loaded = engine.loaded
        if not isinstance(loaded.backend, CpuBackend):
            return None
        module, model = open_model(loaded.checkpoint)
        plan = plan_load(engine.config, loaded.checkpoint, module, model, loaded.backend_choice)
        program = copy.copy(plan.program)
        program.ops = [op for op in program.ops if op.name != "embedding"]
        linear = {True: 0, False: 0}  # operations, by whether they are done for every token
        for op in program.ops:
            if op.name == "linear":
                x, weight = (program.handles[i] for i in op.inputs[:2] if i is not None)
                linear[x.shape[0] == T] += 2 * math.prod(int(size) for size in weight.shape)
        return cls(
            weight_bytes=plan.backend.weights_bytes(program, plan.weights),
            kv_bytes=plan.kv.bytes_per_token // model.num_layers,
            linear_ops=linear[True],
            head_ops=linear[False],
            attention_ops=4 * model.num_heads * model.head_dim,
            windows=model.windows,
            products=_products(plan, loaded.backend),
        )

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

    def run_s(
        self, batch: int, input_len: int, output_len: int, moment: Mapping[str, Any]
    ) -> float | None:
        """Seconds of `batch` requests that come at once: their prompts, then every later token."""
        keys = batch * sum(_causal(input_len, window or input_len) for window in self.windows)
        prompts = self._seconds(
            self.weight_bytes,
            batch * (input_len * self.linear_ops + self.head_ops),
            keys * self.attention_ops,
            moment,
        )
        step = self.decode_s(batch, input_len + output_len // 2, moment)
        return None if prompts is None or step is None else prompts + (output_len - 1) * step

    def _seconds(
        self, read: int, linear: int, attention: int, moment: Mapping[str, Any]
    ) -> float | None:
        rates = [moment.get(name) for name in ("read_gbs", self.products, "bf16_gflops")]
        if not all(rates):
            return None
        bandwidth, products, scores = (1e9 * float(rate) for rate in rates if rate is not None)
        return max(read / bandwidth, linear / products + attention / scores)


def _causal(tokens: int, window: int) -> int:
    """Pairs of a token and a key that it attends."""
    window = min(window, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def _products(plan: LoadPlan, backend: CpuBackend) -> str:
    """The peak of the form in which most of what is multiplied comes."""
    elements: Counter[str] = Counter()
    for weight in plan.weights.values():
        if len(weight.shape) > 1:
            elements[_PEAKS[backend.input_form(weight)]] += math.prod(weight.shape)
    return elements.most_common(1)[0][0]
