"""Running a model over a text piece by piece, to see what its linear layers are given.

A tap is a value that linear layers multiply, those of a mixture's experts among them. `Taps` goes
through them in the program's order; its caller may replace the weights at each, and later values
are those of the replaced weights. A piece is a Program of its own: what it starts from are rows of
tables, looked up like embeddings, so that any backend runs it. Memory holds the values that later
pieces read, float32, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...kernels import ops
from ...kernels.backend import Backend, KVSpec, StepInputs
from ...kernels.ops import StepHandles
from ...kernels.program import Op, Program
from ...kernels.weights import F32, RawWeight, WeightGroup

_BLOCK = 16  # tokens of a block of the cache
_MOMENT_ROWS = 4096  # that are multiplied in float32 before they are added in float64

_LINEAR = ("linear", "expert_linear")

Weights = dict[str, RawWeight | WeightGroup]


@dataclass(frozen=True)
class Tap:
    """One value and the linear layers that multiply it, by their weights' canonical names.

    maker: the operation that makes it; alone: whether nothing else reads it; routing: where some
    of the layers are experts'.
    """

    value: int
    weights: tuple[str, ...]
    maker: Op
    alone: bool
    routing: Routing | None


@dataclass(frozen=True)
class Routing:
    """Rows go to the experts of the best top_k of `logits`, each with columns of its own or not."""

    logits: int
    top_k: int
    own_columns: bool


@dataclass(frozen=True, eq=False)
class Given:
    """The rows of a tap, float32 [n, K]; of a mixture the experts [n, k] that each goes to, and
    rows [n, k*K] where an expert gets columns of its own."""

    rows: np.ndarray
    experts: np.ndarray | None = None
    own_columns: bool = False

    def of(self, expert: int) -> np.ndarray:
        """The rows that an expert gets, in their order."""
        assert self.experts is not None
        token, place = np.nonzero(self.experts == expert)
        if not self.own_columns:
            return self.rows[token]
        return self.rows.reshape(*self.experts.shape, -1)[token, place]


def taps(program: Program, weights: Collection[str]) -> list[Tap]:
    """The taps of the linear layers with these weights, in order."""
    readers: dict[int, list[Op]] = {}
    for op in program:
        for i in op.inputs:
            if i is not None:
                readers.setdefault(i, []).append(op)
    made_by = {op.output: op for op in program}
    found: dict[int, Tap] = {}
    for op in program:
        x = op.inputs[0]
        if op.name not in _LINEAR or x is None or x in found:
            continue
        ops = [o for o in readers[x] if o.name in _LINEAR and o.inputs[0] == x]
        ops = [o for o in ops if _weight(program, o) in weights]
        if not ops:
            continue
        names = tuple(_weight(program, o) for o in ops)
        mixed = [_routing(program, o) for o in ops if o.name == "expert_linear"]
        alone = len(ops) == len(readers[x])
        found[x] = Tap(x, names, made_by[x], alone, mixed[0] if mixed else None)
    return list(found.values())


def _routing(program: Program, op: Op) -> Routing:
    x, weight, experts, _ = op.inputs
    (best,) = (o for o in program if o.output == experts)
    assert x is not None and weight is not None and best.inputs[0] is not None
    own = program.handles[x].shape[1] != program.handles[weight].shape[1]
    return Routing(best.inputs[0], int(best.attrs["top_k"]), own)  # type: ignore[arg-type]


def _weight(program: Program, op: Op) -> str:
    assert op.inputs[1] is not None
    return program.handles[op.inputs[1]].name


class Taps:
    """The values of a program's taps over sequences of token ids, all of one length.

    `weights` may be changed between two taps; what follows is computed with the new ones.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        backend: Backend,
        sequences: Sequence[Sequence[int]],
    ) -> None:
        self.weights = weights
        self._program = program
        self._backend = backend
        self._ids = np.asarray(sequences, np.int32)
        self._known: dict[int, np.ndarray] = {}
        self._last = dict(program.last_use())
        self._at = {op.output: index for index, op in enumerate(program.ops)}
        for op in program:  # ids cannot be kept: where they are read, they are made of logits anew
            if op.name == "top_experts":
                logits, read = op.inputs[0], self._last.pop(op.output)
                assert logits is not None
                self._last[logits] = max(self._last[logits], read)

    def go(self, found: Sequence[Tap]) -> Iterator[tuple[Tap, Given]]:
        """Each tap with its rows, those of all sequences one after another."""
        for tap in found:
            first = min(
                index
                for index, op in enumerate(self._program.ops)
                if op.name in _LINEAR and op.inputs[0] == tap.value
            )
            self._advance(tap.value, first)
            yield tap, self._given(tap)

    def _given(self, tap: Tap) -> Given:
        rows, routing = self._known[tap.value], tap.routing
        if routing is None:
            return Given(rows)
        if routing.logits not in self._known:
            self._known[routing.logits] = self._run(routing.logits)
        # By descending logit, ties to the lower id, as ops.top_experts says.
        order = np.argsort(-self._known[routing.logits], axis=1, kind="stable")
        return Given(rows, order[:, : routing.top_k], routing.own_columns)

    def _advance(self, tap: int, first: int) -> None:
        """Compute what is made before operation `first` and read from there on."""
        living = [
            value
            for value, index in self._at.items()
            if index < first <= self._last.get(value, -1) and self._width(value)
        ]
        kept = {}
        for value in sorted({*living, tap}):
            if value not in self._known:
                self._known[value] = self._run(value)
            kept[value] = self._known[value]
        self._known = kept

    def _width(self, value: int) -> int:
        """Columns of a value that can be kept; 0 for what stands for the written cache."""
        shape = self._program.handles[value].shape
        return int(shape[1]) if len(shape) == 2 else 0

    def _run(self, value: int) -> np.ndarray:
        """The rows of one value, from those that are known."""
        for op in self._program:  # rows of the vocabulary's table come first, by themselves
            if op.name == "embedding" and op.output != value and not self._known:
                self._known[op.output] = self._run(op.output)
        piece, tables = cut_piece(self._program, value, self._known, len(self._ids.reshape(-1)))
        count, length = self._ids.shape
        attention = [op for op in piece if op.name == "kv_write"]
        blocks = -(-length // _BLOCK)
        cache = None
        if attention:
            attrs = attention[0].attrs
            heads, dim = int(attrs["num_kv_heads"]), int(attrs["head_dim"])  # type: ignore[arg-type]
            spec = KVSpec(1, heads, dim, _BLOCK, "float32")
            cache = self._backend.allocate_kv(spec, blocks)
        packed = {}
        for name in piece.weights:
            raw = _table(name, tables[name]) if name in tables else self.weights[name]
            packed[name] = self._backend.pack(raw)
        executable = self._backend.lower(piece, packed, cache)
        out = np.empty((count * length, self._width(value)), np.float32)
        for i in range(count):
            rows = slice(i * length, (i + 1) * length)
            ids = np.arange(rows.start, rows.stop, dtype=np.int32) if tables else self._ids[i]
            out[rows] = executable.run(_step(ids, blocks)).numpy()
        return out


def cut_piece(
    program: Program, value: int, known: Mapping[int, np.ndarray], num_rows: int
) -> tuple[Program, dict[str, np.ndarray]]:
    """The Program that makes `value` from known values, and the tables that hold those, by name.

    Layers of the cache are numbered 0: a piece has at most one.
    """
    made_by = {op.output: op for op in program}
    needed: set[int] = set()
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if at in needed or at in known or at not in made_by:
            continue
        needed.add(at)
        waiting += [i for i in made_by[at].inputs if i is not None]
    piece = Program()
    step = StepHandles.of(piece)
    handles: dict[int, ops.Handle] = {}
    tables: dict[str, np.ndarray] = {}

    def handle(i: int | None) -> ops.Handle | None:
        if i is None or i in handles:
            return None if i is None else handles[i]
        old = program.handles[i]
        if old.kind == "input":
            return piece.input(old.name, old.shape)
        if old.kind == "weight":
            return piece.weight(old.name, old.shape)  # type: ignore[arg-type]
        tables[f"known.{i}"] = known[i]
        table = piece.weight(f"known.{i}", (num_rows, int(old.shape[1])))
        handles[i] = ops.embedding(table, step.token_ids)
        return handles[i]

    for op in program:
        if op.output in needed:
            inputs = tuple(handle(i) for i in op.inputs)
            attrs = {k: 0 if k == "layer" else v for k, v in op.attrs.items()}
            handles[op.output] = piece.append(
                op.name, inputs, attrs, program.handles[op.output].shape
            )
    return piece.finish(ops.select_rows(handles[value], step.logit_rows)), tables


def moments(rows: np.ndarray) -> np.ndarray:
    """X^T X of float32 rows [n, K]: float64 [K, K]."""
    out = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), _MOMENT_ROWS):
        part = rows[start : start + _MOMENT_ROWS]
        out += part.T @ part
    return out


def float_weight(name: str, values: np.ndarray) -> RawWeight:
    """float32 values as a weight."""
    data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    return RawWeight(name, F32, values.shape, {"data": data})


_table = float_weight


def _step(ids: np.ndarray, blocks: int) -> StepInputs:
    """One sequence, whole, in blocks 0, 1, ..."""
    at = np.arange(len(ids), dtype=np.int32)
    ends = np.array([0, len(ids)], np.int32)
    table = np.arange(blocks, dtype=np.int32)[None]
    return StepInputs(np.ascontiguousarray(ids), at, ends, ends[1:], table, at, at)


__all__ = ["Tap", "Taps", "Weights", "cut_piece", "float_weight", "moments", "taps"]
