"""Turns the nodes of a lowered Program into launches, packing weights on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..program import Op
from . import attention, elementwise, embedding, expert_linear, experts, linear, rms_norm, rope
from .cache import KVCache
from .cublas import Products
from .facts import shape_of, table_of
from .inputs import scratch_width
from .lower import Lowered, Node
from .quantised import PAIR, Matrix, QuantisedMatrix, alike, in_turns, pack, paired, vector
from .rms_norm import Norm
from .tuned import Tuned
from .weights import TritonWeight

Launch = Callable[["Step"], None]


class Step:
    """What the launches of one step read: metadata in device memory."""

    def __init__(self) -> None:
        self.token_ids: Any = None
        self.logit_rows: Any = None
        self.slot: Any = None
        self.tables: dict[Any, torch.Tensor] = {}  # rope's key -> [T, 2, F]
        self.work: dict[attention.Shape, attention.DevicePlan] = {}


@dataclass(frozen=True)
class Surroundings:
    """What launches of every step use.

    activations: of quantised weights, see quantised.pack; product: dtype of attention's products;
    view: a value of the step, [rows, width]; sums: scratch of quantised layers' inputs; products:
    large ones by a library, None for none; route: the pairs of the mixture of so many experts that
    is computed.
    """

    kv: KVCache | None
    dtype: torch.dtype
    device: torch.device
    activations: str
    tuned: Tuned
    product: str
    scratch: attention.Scratch
    view: Callable[[int | None], torch.Tensor]
    sums: Callable[[], torch.Tensor]
    products: Products | None
    route: Callable[[int], experts.Route]


class Binder:
    """`nbytes` of the weights packed so far, `sums_width` of the one that needs most scratch."""

    def __init__(
        self, around: Surroundings, lowered: Lowered, weights: Mapping[str, TritonWeight]
    ) -> None:
        self._around = around
        self._program = lowered.program
        self._weights = weights
        self._matrices: dict[str, Matrix] = {}
        self._orders: dict[bytes, torch.Tensor] = {}  # of columns, each held once
        self.sums_width = 0
        self.nbytes = 0
        self._routed: int | None = None  # the choice of experts that was sorted last
        self._uses: dict[str, int] = {}
        for op in self._program:
            for i in op.inputs:
                if i is not None and self._program.handles[i].kind == "weight":
                    name = self._program.handles[i].name
                    self._uses[name] = self._uses.get(name, 0) + 1

    def bind(self, node: Node) -> list[Launch]:
        """The launches of a node, in their order."""
        return getattr(self, f"_{node.name}", self._map)(node)

    def _name(self, value: int | None) -> str:
        assert value is not None
        return self._program.handles[value].name

    def _matrix(self, value: int | None) -> Matrix:
        name = self._name(value)
        if name not in self._matrices:
            self._matrices[name] = self._pack([self._weights[name]])
        return self._matrices[name]

    def _pack(self, group: Sequence[TritonWeight], *, in_pairs: bool = False) -> Matrix:
        parts = [part for weight in group for part in weight.parts]
        key: tuple[bool | str, ...] = (in_pairs, *(part.name for part in parts))
        matrix = group[0].matrices.get(key)
        if matrix is None:
            matrix = pack(parts, self._around.device, self._around.activations)
            matrix = paired(matrix) if in_pairs else matrix
        self.nbytes += matrix.nbytes
        if isinstance(matrix, QuantisedMatrix) and matrix.columns is not None:
            order = self._orders.setdefault(matrix.columns.cpu().numpy().tobytes(), matrix.columns)
            self.nbytes -= 0 if order is matrix.columns else order.nbytes
            matrix = replace(matrix, columns=order)
        group[0].matrices[key] = matrix
        self.sums_width = max(self.sums_width, scratch_width(matrix))
        return matrix

    def _vector(self, value: int | None) -> torch.Tensor | None:
        if value is None:
            return None
        made = vector(self._weights[self._name(value)].parts, self._around.device)
        self.nbytes += made.nbytes
        return made

    def _embedding(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        table = self._matrix(op.inputs[0])
        if isinstance(table, QuantisedMatrix) and table.columns is not None:
            raise ValueError(
                f"weight {self._name(op.inputs[0])!r} is a table of embeddings with its columns in "
                "another order (act-order), which the Triton backend does not read"
            )
        return [lambda step: embedding.embedding(table, step.token_ids, view(op.output))]

    def _select_rows(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        x = op.inputs[0]
        return [lambda step: embedding.select_rows(view(x), step.logit_rows, view(op.output))]

    def _rms_norm(self, node: Node) -> list[Launch]:
        op, view, norm = _op(node), self._around.view, self._norm(_op(node))
        out = op.output if node.after is None else node.after.output

        def launch(step: Step) -> None:
            other = None if node.residual is None else view(node.residual)
            rms_norm.launch(
                view(op.inputs[0]), norm.weight, view(out), norm.eps, norm.offset, other
            )

        return [launch]

    def _norm(self, op: Op) -> Norm:
        weight = self._vector(op.inputs[1])
        assert weight is not None
        return Norm(weight, float(op.attrs["eps"]), float(op.attrs["offset"]))  # type: ignore[arg-type]

    def _map(self, node: Node) -> list[Launch]:
        """add, scale, softcap, sigmoid_scale and the gates."""
        op, view = _op(node), self._around.view
        a, b = op.inputs[0], op.inputs[-1]
        parameter = float(op.attrs.get("factor", op.attrs.get("cap", 0.0)))  # type: ignore[arg-type]
        return [
            lambda step: elementwise.launch(op.name, view(a), view(b), view(op.output), parameter)
        ]

    def _rope(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        x, key, head_dim = op.inputs[0], table_of(op), int(op.attrs["head_dim"])  # type: ignore[arg-type]
        interleaved = bool(op.attrs["interleaved"])

        def launch(step: Step) -> None:
            rotation = rope.Rotation(step.tables[key], interleaved)
            rope.launch(head_dim, rotation, view(x), view(op.output))

        return [launch]

    def _kv_write(self, node: Node) -> list[Launch]:
        of_q, of_k, op = node.ops
        assert op is not None
        view, cache, layer = self._around.view, self._around.kv, int(op.attrs["layer"])  # type: ignore[arg-type]
        first, other = node.norms
        q = None if of_q is None else (first or of_q).inputs[0]
        k = op.inputs[0] if of_k is None else (other or of_k).inputs[0]
        norms = [None if norm is None else self._norm(norm) for norm in node.norms]
        v, head_dim = op.inputs[1], int(op.attrs["head_dim"])  # type: ignore[arg-type]

        def launch(step: Step) -> None:
            rotation = None
            if of_k is not None:
                table = step.tables[table_of(of_k)]
                rotation = rope.Rotation(table, bool(of_k.attrs["interleaved"]))
            rope.launch(
                head_dim,
                rotation,
                None if of_q is None else view(q),
                None if of_q is None else view(of_q.output),
                (view(k), view(v)),
                norms=norms,
                rotate_k=of_k is not None,
                cache=cache,
                slot=step.slot,
                layer=layer,
            )

        return [launch]

    def _attention(self, node: Node) -> list[Launch]:
        op, around = _op(node), self._around
        q, cache = op.inputs[0], around.kv
        assert cache is not None
        shape = shape_of(op, around.product, cache)
        names = ("layer", "scale", "window", "softcap")
        attrs: dict[str, Any] = {name: op.attrs[name] for name in names}
        slopes: Any = op.attrs["alibi_slopes"]
        attrs["slopes"] = torch.tensor(slopes, device=around.device) if slopes else None
        self.nbytes += 4 * len(slopes or ())
        attrs["sinks"] = self._vector(op.inputs[2])

        def launch(step: Step) -> None:
            work = step.work[shape]
            attention.launch(
                around.view(q), around.view(op.output), cache, work, around.scratch, shape, **attrs
            )

        return [launch]

    def _linear(self, node: Node) -> list[Launch]:
        ops = [op for op in node.ops if op is not None]
        x = ops[0].inputs[0]
        merged = len(ops) > 1 and self._can_merge(ops, gated=node.after is not None)
        launches: list[Launch] = []
        before = node.norm
        if before is not None and len(ops) > 1 and not merged:
            launches, before = self._rms_norm(Node("rms_norm", (before,))), None
        norm = None if before is None else self._norm(before)
        if before is not None:
            x = before.inputs[0]

        def layer(op: Op, out: int, after: str = "", other: int | None = None) -> Launch:
            matrix, bias = self._matrix(op.inputs[1]), self._vector(op.inputs[2])
            return self._layer(x, matrix, out, bias, after, other, (norm, before))

        if not merged:
            if node.after is None:
                return [*launches, *(layer(op, op.output) for op in ops)]
            if node.residual is not None:
                return [*launches, layer(ops[0], node.after.output, "add", node.residual)]
            gate, up = ops
            gated = layer(up, node.after.output, node.after.name, gate.output)
            return [*launches, layer(gate, gate.output), gated]
        weights = [self._weights[self._name(op.inputs[1])] for op in ops]
        matrix = self._pack(weights, in_pairs=node.after is not None)
        bias = self._biases(ops, in_pairs=node.after is not None)
        if node.after is None:
            return [self._layer(x, matrix, ops[0].output, bias, norm=(norm, before))]
        return [
            self._layer(x, matrix, node.after.output, bias, node.after.name, norm=(norm, before))
        ]

    def _biases(self, ops: list[Op], *, in_pairs: bool) -> torch.Tensor | None:
        """Of layers that are one matrix, in the order of its rows."""
        biases = [b for b in (self._vector(op.inputs[-1]) for op in ops) if b is not None]
        if not biases:
            return None
        bias = torch.cat(biases)
        return in_turns(bias[:, None]).ravel() if in_pairs else bias

    def _can_merge(self, ops: list[Op], *, gated: bool) -> bool:
        """Whether the layers' weights can be one matrix, of turns where `gated`."""
        names = [self._name(op.inputs[1]) for op in ops]
        parts = [part for name in names for part in self._weights[name].parts]
        fp32 = self._program.fp32_values()
        return (
            alike(parts)
            and all(self._uses[name] == 1 for name in names)
            and len({op.output in fp32 for op in ops}) == 1
            and len({op.inputs[-1] is None for op in ops}) == 1  # their biases
            and (not gated or self._turns(ops))
        )

    def _turns(self, ops: list[Op]) -> bool:
        """Whether the rows of a gate, those of an expert apart, are whole turns."""
        experts = int(ops[0].attrs.get("num_experts", 1))  # type: ignore[arg-type]
        rows = self._program.handles[ops[0].inputs[1]].shape[0]  # type: ignore[index]
        return int(rows) // experts % PAIR == 0

    def _top_experts(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        return [lambda step: experts.top_experts(view(op.inputs[0]), view(op.output))]

    def _expert_weights(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        (logits, chosen), renormalise = op.inputs, bool(op.attrs["renormalise"])
        return [
            lambda step: experts.expert_weights(
                view(logits), view(chosen), view(op.output), renormalise
            )
        ]

    def _expert_sum(self, node: Node) -> list[Launch]:
        op, view = _op(node), self._around.view
        x, weights = op.inputs
        return [lambda step: experts.expert_sum(view(x), view(weights), view(op.output))]

    def _expert_linear(self, node: Node) -> list[Launch]:
        op, around = _op(node), self._around
        chosen, num_experts = op.inputs[2], int(op.attrs["num_experts"])  # type: ignore[arg-type]
        launches: list[Launch] = []
        if chosen != self._routed:
            self._routed = chosen
            launches.append(
                lambda step: experts.sort(around.view(chosen), around.route(num_experts))
            )
        if node.after is None:
            bias = self._vector(op.inputs[3])
            return [*launches, self._expert_layer(op, self._matrix(op.inputs[1]), bias, op.output)]
        gate, up = ops = [layer for layer in node.ops if layer is not None]
        after = node.after
        if self._can_merge(ops, gated=True):
            names = [self._name(layer.inputs[1]) for layer in ops]
            both = self._pack([self._weights[name] for name in names], in_pairs=True)
            bias = self._biases(ops, in_pairs=True)
            return [*launches, self._expert_layer(op, both, bias, after.output, after.name)]
        first, other = (self._matrix(layer.inputs[1]) for layer in ops)
        of_gate, of_up = (self._vector(layer.inputs[3]) for layer in ops)
        return [
            *launches,
            self._expert_layer(gate, first, of_gate, gate.output),
            self._expert_layer(up, other, of_up, after.output, after.name, gate.output),
        ]

    def _expert_layer(
        self,
        op: Op,
        matrix: Matrix,
        bias: torch.Tensor | None,
        out: int,
        after: str = "",
        other: int | None = None,
    ) -> Launch:
        around, x, K = self._around, op.inputs[0], matrix.shape[1]
        num_experts = int(op.attrs["num_experts"])  # type: ignore[arg-type]
        num_rows = matrix.shape[0] // num_experts // (2 if matrix.paired else 1)

        def launch(step: Step) -> None:
            rows = around.view(x)
            expert_linear.launch(
                rows if rows.shape[1] == K else rows.view(-1, K),
                matrix,
                around.route(num_experts),
                around.view(out).view(-1, num_rows),
                round_to=around.dtype,
                bias=bias,
                after=after,
                other=None if other is None else around.view(other).view(-1, num_rows),
                scratch=around.sums(),
            )

        return launch

    def _layer(
        self,
        x: int | None,
        matrix: Matrix,
        out: int,
        bias: torch.Tensor | None,
        after: str = "",
        other: int | None = None,
        norm: tuple[Norm | None, Op | None] = (None, None),
    ) -> Launch:
        """x by the matrix to `out` and the values that lie behind it."""
        around = self._around
        width = matrix.shape[0] // (2 if matrix.paired else 1)
        before, of = norm
        plain = bias is None and after in ("", "add") and out not in self._program.fp32_values()
        run: Callable[..., None] = linear.launch
        products = None if around.tuned.is_ours(matrix) else around.products
        if plain and products is not None and products.has_our_bits(matrix, around.dtype):
            run = products.launch

        def launch(step: Step) -> None:
            first = around.view(out)
            run(
                around.view(x),
                matrix,
                first.as_strided((first.shape[0], width), first.stride()),
                round_to=around.dtype,
                bias=bias,
                after=after,
                other=None if other is None else around.view(other),
                scratch=around.sums(),
                tuned=around.tuned,
                norm=before,
                normed=None if of is None else around.view(of.output),
            )

        return launch


def _op(node: Node) -> Op:
    op = node.ops[0]
    assert op is not None
    return op
