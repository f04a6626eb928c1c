"""Turns a lowered Program into the operations of a native one, each with its weights in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..program import Op
from .lower import Lowered, Node
from .tiles import (
    CpuWeight,
    Packer,
    by_expert,
    in_order,
    mixtures_of,
    rows_from_tiles,
    uses_of,
    values,
)


class Binder:
    """Appends the nodes of a Lowered to `native`, a StepProgram.

    dtype: what each operation rounds its result to. form_of: how the input of a linear layer is
    made ready for its weight.
    """

    def __init__(
        self,
        lowered: Lowered,
        weights: Mapping[str, CpuWeight],
        native: Any,
        packer: Packer,
        dtype: str,
        form_of: Callable[[CpuWeight], str],
    ) -> None:
        self._lowered = lowered
        self._program = lowered.program
        self._weights = dict(weights)
        for name, num_experts in mixtures_of(lowered.program).items():
            self._weights[name] = by_expert(weights[name], num_experts)
        self._native = native
        self._packer = packer
        self._dtype = dtype
        self._form_of = form_of
        self._fp32 = lowered.program.fp32_values()

    def bind(self) -> None:
        for node in self._lowered.nodes:
            getattr(self, f"_{node.name}", self._map)(node)

    def _weight(self, value: int | None) -> CpuWeight:
        assert value is not None
        return self._weights[self._program.handles[value].name]

    def _vector(self, value: int | None) -> np.ndarray:
        return np.concatenate([values(part) for part in self._weight(value).parts])

    def _rounding(self, value: int) -> str:
        return "float32" if value in self._fp32 else self._dtype

    def _rotations(self, node: Node) -> None:
        assert node.rotations is not None and node.rope is not None
        attrs = node.rope.attrs
        self._native.rotations(
            node.barrier,
            node.rotations.slot,
            list(attrs["inv_freq"]),  # type: ignore[arg-type]
            attrs["attention_factor"],
        )

    def _embedding(self, node: Node) -> None:
        op = _op(node)
        table = self._weight(op.inputs[0])
        if table.parts[0].columns is not None:
            raise ValueError(f"table {table.name!r} has its columns in another order")
        parts: list[Any]
        name = self._program.handles[op.inputs[0]].name  # type: ignore[index]
        # A program without the head finds the tiles that the one with it made.
        multiplied = "linear" in uses_of(self._program)[name] or bool(table.tiles)
        if rows_from_tiles(table.parts, multiplied):
            self._packer.pack([table], paired=False)  # also for the head
            parts = list(table.tiles)
        else:
            parts = [(p.format.name, p.data.view(np.ndarray), p.shape[0]) for p in table.parts]
        out = node.places[op.output].slot
        self._native.embedding(node.barrier, out, parts, self._rounding(op.output))

    def _rms_norm(self, node: Node) -> None:
        op = _op(node)
        x, weight = op.inputs
        self._native.rms_norm(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            node.places[op.output].slot,
            self._vector(weight),
            op.attrs["eps"],
            op.attrs["offset"],
            self._rounding(op.output),
        )

    def _map(self, node: Node) -> None:
        """add, scale, softcap and the gates."""
        op = _op(node)
        a, b = op.inputs[0], op.inputs[-1]
        parameter = op.attrs.get("factor", op.attrs.get("cap", 0.0))
        self._native.map(
            node.barrier,
            op.name,
            node.places[a].slot,  # type: ignore[index]
            node.places[b].slot,  # type: ignore[index]
            node.places[op.output].slot,
            parameter,
            self._rounding(op.output),
        )

    def _select_rows(self, node: Node) -> None:
        op = _op(node)
        x = node.places[op.inputs[0]].slot  # type: ignore[index]
        self._native.select_rows(node.barrier, x, node.places[op.output].slot)

    def _rope(self, node: Node) -> None:
        op = _op(node)
        assert node.rotations is not None
        self._native.rope(
            node.barrier,
            node.places[op.inputs[0]].slot,  # type: ignore[index]
            node.rotations.slot,
            node.places[op.output].slot,
            op.attrs["head_dim"],
            op.attrs["interleaved"],
            self._rounding(op.output),
        )

    def _kv_write(self, node: Node) -> None:
        op = _op(node)
        k, v = op.inputs
        self._native.kv_write(
            node.barrier,
            node.places[k].slot,  # type: ignore[index]
            node.places[v].slot,  # type: ignore[index]
            op.attrs["layer"],
        )

    def _attention(self, node: Node) -> None:
        op = _op(node)
        self._native.attention(
            node.barrier,
            node.places[op.inputs[0]].slot,  # type: ignore[index]
            node.places[op.output].slot,
            op.attrs["layer"],
            op.attrs["num_heads"],
            op.attrs["scale"],
            op.attrs["window"],
            op.attrs["softcap"],
            None if op.inputs[2] is None else self._vector(op.inputs[2]),
            self._rounding(op.output),
        )

    def _linear(self, node: Node) -> None:
        step = node.step
        assert step is not None
        norm = step.norm
        x = norm.inputs[0] if norm is not None else step.main[0].inputs[0]
        form = self._form_of(self._weight(step.main[0].inputs[1]))
        if step.after is None:
            outs = [node.places[op.output] for op in step.main]
            epilogue, residual = "store", None
        else:
            outs = [node.places[step.after.output]] * len(step.main)
            epilogue = "add" if step.residual is not None else step.after.name
            residual = None if step.residual is None else node.places[step.residual].slot
        paired = len(step.main) == 2 and step.after is not None  # gate and up, of equal rows
        self._packer.pack([self._weight(op.inputs[1]) for op in step.main], paired)
        entries = []
        for op, out in zip(step.main, outs, strict=True):
            bias = None if op.inputs[2] is None else self._vector(op.inputs[2])
            entries.append(self._entries(op, bias, out.slot))
        flat = in_order(entries, paired)
        self._native.linear(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            form,
            None if norm is None else self._vector(norm.inputs[1]),
            0.0 if norm is None else norm.attrs["eps"],
            0.0 if norm is None else norm.attrs["offset"],
            flat,
            epilogue,
            residual,
            self._dtype,
            self._rounding(step.outputs[0]),
            self._weight(step.main[0].inputs[1]).parts[0].columns,
        )

    def _top_experts(self, node: Node) -> None:
        op = _op(node)
        logits = node.places[op.inputs[0]].slot  # type: ignore[index]
        self._native.top_experts(node.barrier, logits, node.places[op.output].slot)

    def _expert_weights(self, node: Node) -> None:
        op = _op(node)
        logits, experts = (node.places[i].slot for i in op.inputs)  # type: ignore[index]
        self._native.expert_weights(
            node.barrier,
            logits,
            experts,
            node.places[op.output].slot,
            op.attrs["renormalise"],
            self._rounding(op.output),
        )

    def _expert_linear(self, node: Node) -> None:
        step = node.step
        assert step is not None
        x, _, experts, _ = step.main[0].inputs
        weights = [self._weight(op.inputs[1]) for op in step.main]
        paired = step.after is not None
        self._packer.pack(weights, paired)
        biases = [self._vector(op.inputs[3]) for op in step.main if op.inputs[3] is not None]
        self._native.expert_linear(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            node.places[experts].slot,  # type: ignore[index]
            node.places[step.outputs[0]].slot,
            self._form_of(self._weight(step.main[0].inputs[1])),
            in_order([w.tiles for w in weights], paired),
            biases,
            "store" if step.after is None else step.after.name,
            self._rounding(step.outputs[0]),
        )

    def _by_row(self, node: Node) -> None:
        """expert_sum, sigmoid_scale: an operand and a number or several for each of its rows."""
        op = _op(node)
        x, numbers = (node.places[i].slot for i in op.inputs)  # type: ignore[index]
        add = getattr(self._native, op.name)
        add(node.barrier, x, numbers, node.places[op.output].slot, self._rounding(op.output))

    _expert_sum = _sigmoid_scale = _by_row

    def _entries(
        self, op: Op, bias: np.ndarray | None, out: tuple[int, int, bool]
    ) -> list[tuple[Any, np.ndarray | None, tuple[int, int, bool], int]]:
        """(tiles, bias, result, first column) of each row range of one linear layer's weight."""
        weight = self._weight(op.inputs[1])
        entries, at = [], 0
        for part, tiles in zip(weight.parts, weight.tiles, strict=True):
            stop = at + part.shape[0]
            entries.append((tiles, None if bias is None else bias[at:stop].copy(), out, at))
            at = stop
        return entries


def _op(node: Node) -> Op:
    assert node.step is not None
    return node.step.main[0]
