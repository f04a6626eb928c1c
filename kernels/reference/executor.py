"""Interprets a Program: a torch function per op, values rounded once and freed at last use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..backend import StepInputs, check_program
from ..program import Program
from . import attention as att
from . import elementwise as ew
from . import experts as mix
from . import linear as lin
from .sampling import ReferenceLogits

_one_step = threading.Lock()
_Attrs = Mapping[str, Any]  # of one Op


class ReferenceExecutable:
    """A Program bound to its packed weights and its KV cache."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Any],
        kv: att.KVCache | None,
        activation_dtype: torch.dtype,
        workers: lin.Workers,
    ) -> None:
        check_program("reference", program, weights, kv.spec if kv else None, _OPERATIONS)
        assert program.result is not None
        self._program = program
        self._result = program.result.id
        self._weights = {h.id: weights[name] for name, h in program.weights.items()}
        for op in program:
            if op.name == "expert_linear":
                weight = op.inputs[1]
                assert weight is not None
                packed = weights[program.handles[weight].name]
                self._weights[weight] = lin.by_expert(packed, int(op.attrs["num_experts"]))  # type: ignore[arg-type]
        self._kv = kv
        self._dtype = activation_dtype
        self._workers = workers
        self._fp32 = program.fp32_values()
        last_use = program.last_use()
        self._dead_after: list[list[int]] = [[] for _ in program.ops]
        for index, op in enumerate(program.ops):
            at = last_use.get(op.output, index)  # a value that nothing reads dies at once
            if at < len(program.ops):
                self._dead_after[at].append(op.output)

    def run(self, step: StepInputs) -> ReferenceLogits:
        """Compute one step. Errors: ValueError for token ids outside the vocabulary."""
        with torch.no_grad(), _one_torch_thread():
            run = _Run(step, self._kv, self._workers)
            values: dict[int, Any] = dict(self._weights)
            for name, handle in self._program.inputs.items():
                values[handle.id] = getattr(step, name)
            for op, dead in zip(self._program.ops, self._dead_after, strict=True):
                operands = [None if i is None else _wide(values[i]) for i in op.inputs]
                out = _OPERATIONS[op.name](run, op.attrs, *operands)
                del operands
                if out is not None and op.output not in self._fp32:
                    out = out.to(self._dtype)
                values[op.output] = out
                for i in dead:
                    del values[i]
            return ReferenceLogits(values[self._result])


class _Run:
    """What the operations of one step share."""

    def __init__(self, step: StepInputs, kv: att.KVCache | None, workers: lin.Workers) -> None:
        self.workers = workers
        # None only where no operation reads them: _check has seen to it.
        self.kv: Any = kv
        self.sequences: Any = att.Sequences(step, kv.spec.block_size) if kv is not None else None
        self._rotations: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def rotations(self, positions: np.ndarray, attrs: _Attrs) -> tuple[torch.Tensor, torch.Tensor]:
        key = (attrs["inv_freq"], attrs["attention_factor"])
        if key not in self._rotations:
            self._rotations[key] = ew.rotations(positions, *key)
        return self._rotations[key]


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """torch's own threads would place loop tails and split products by their number.

    The setting is in part the process's, in part the calling thread's, so one step runs at a time.
    """
    with _one_step:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _embedding(run: _Run, attrs: _Attrs, table: Any, ids: Any) -> torch.Tensor:
    return lin.embedding(table, ids)


def _linear(run: _Run, attrs: _Attrs, x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return lin.linear(x, weight, bias, run.workers)


def _rms_norm(run: _Run, attrs: _Attrs, x: Any, weight: Any) -> torch.Tensor:
    return ew.rms_norm(x, weight, attrs["eps"], attrs["offset"])


def _add(run: _Run, attrs: _Attrs, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def _scale(run: _Run, attrs: _Attrs, x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, attrs["factor"])


def _softcap(run: _Run, attrs: _Attrs, x: Any) -> torch.Tensor:
    return ew.softcap(x, attrs["cap"])


def _silu_mul(run: _Run, attrs: _Attrs, gate: Any, up: Any) -> torch.Tensor:
    return ew.silu_mul(gate, up)


def _gelu_tanh_mul(run: _Run, attrs: _Attrs, gate: Any, up: Any) -> torch.Tensor:
    return ew.gelu_tanh_mul(gate, up)


def _clamped_silu_mul(run: _Run, attrs: _Attrs, gate: Any, up: Any) -> torch.Tensor:
    return ew.clamped_silu_mul(gate, up)


def _sigmoid_scale(run: _Run, attrs: _Attrs, x: Any, gate: Any) -> torch.Tensor:
    return ew.sigmoid_scale(x, gate)


def _top_experts(run: _Run, attrs: _Attrs, logits: Any) -> torch.Tensor:
    return mix.top_experts(logits, attrs["top_k"])


def _expert_weights(run: _Run, attrs: _Attrs, logits: Any, experts: Any) -> torch.Tensor:
    return mix.expert_weights(logits, experts, attrs["renormalise"])


def _expert_linear(
    run: _Run, attrs: _Attrs, x: Any, weights: Any, experts: Any, bias: Any
) -> torch.Tensor:
    return mix.expert_linear(x, weights, experts, bias, run.workers)


def _expert_sum(run: _Run, attrs: _Attrs, x: Any, weights: Any) -> torch.Tensor:
    return mix.expert_sum(x, weights)


def _rope(run: _Run, attrs: _Attrs, x: Any, positions: Any) -> torch.Tensor:
    cos, sin = run.rotations(positions, attrs)
    return ew.rope(x, cos, sin, attrs["head_dim"], attrs["interleaved"])


def _kv_write(run: _Run, attrs: _Attrs, k: Any, v: Any) -> None:
    att.kv_write(k, v, run.kv, attrs["layer"], run.sequences)


def _attention(run: _Run, attrs: _Attrs, q: Any, written: Any, sinks: Any) -> torch.Tensor:
    return att.attention(q, run.kv, run.sequences, sinks=sinks, **attrs)


def _select_rows(run: _Run, attrs: _Attrs, x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    return x[torch.from_numpy(rows.astype(np.int64))]


_OPERATIONS: dict[str, Callable[..., torch.Tensor | None]] = {
    "add": _add,
    "attention": _attention,
    "clamped_silu_mul": _clamped_silu_mul,
    "embedding": _embedding,
    "expert_linear": _expert_linear,
    "expert_sum": _expert_sum,
    "expert_weights": _expert_weights,
    "gelu_tanh_mul": _gelu_tanh_mul,
    "kv_write": _kv_write,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "scale": _scale,
    "select_rows": _select_rows,
    "sigmoid_scale": _sigmoid_scale,
    "silu_mul": _silu_mul,
    "softcap": _softcap,
    "top_experts": _top_experts,
}
