"""A Program as launches want it: fused, and its values placed in scratch memory.

Launches run one after the other, so memory is free as soon as its last reader has been launched.
Nothing here depends on what the weights are: `workspace_bytes` is known before they are read.

Beside kernels.fuse: `rope` of the queries and of the keys, with the norms of their heads, and
`kv_write` are one launch where they stand together; linear layers of one input write side by side
into one value, so that they can be one launch where their formats agree.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..arena import Arena
from ..fuse import Step, early_rows, fuse
from ..program import Op, Program, R

__all__ = ["OPERATIONS", "Lowered", "Node", "Place", "aligned", "lower"]

ALIGN = 16  # bytes of a column, and rows of capacity: every value begins at a multiple of 256 bytes
OPERATIONS = (
    "add",
    "attention",
    "clamped_silu_mul",
    "embedding",
    "expert_linear",
    "expert_sum",
    "expert_weights",
    "gelu_tanh_mul",
    "kv_write",
    "linear",
    "rms_norm",
    "rope",
    "scale",
    "select_rows",
    "sigmoid_scale",
    "silu_mul",
    "softcap",
    "top_experts",
)


def aligned(rows: int) -> int:
    """Rows that room is made for where so many are needed."""
    return -(-rows // ALIGN) * ALIGN


@dataclass(frozen=True)
class Place:
    """Where a value lies. All in bytes of a row but for `width`, in elements.

    With room for C rows, row r of the value begins at column * C + r * stride + offset.
    """

    column: int
    stride: int
    offset: int
    width: int
    fp32: bool
    per_logit_row: bool


@dataclass(frozen=True)
class Node:
    """One launch, or a few that belong together.

    `ops`: the operation; for "linear" and "expert_linear" the layers, which `norm` may stand before
    and `after` follow; for "kv_write" the rope of queries and of keys, where fused, and the
    kv_write itself, with the norms of their heads in `norms`.
    """

    name: str
    ops: tuple[Op | None, ...]
    after: Op | None = None
    residual: int | None = None
    norm: Op | None = None
    norms: tuple[Op | None, ...] = ()

    @property
    def makes(self) -> tuple[int, ...]:
        """Values to be placed, those that stand for the written cache left out, and the normed
        input of a layer, which has a place of its own."""
        if self.name == "kv_write":
            return () if self.ops[0] is None else (self.ops[0].output,)
        made = [op.output for op in self.ops if op is not None]
        if self.after is None:
            return tuple(made)
        # A gate is in memory while the other layer is computed; a lone layer's sum never is.
        return (*made[:-1], self.after.output)

    @property
    def reads(self) -> tuple[int, ...]:
        """Values, inputs and weights that are read from outside the node."""
        ops = [op for op in (*self.norms, self.norm, *self.ops, self.after) if op is not None]
        made = {op.output for op in ops}
        return tuple(i for op in ops for i in op.inputs if i is not None and i not in made)


@dataclass(frozen=True)
class Lowered:
    """The launches, where values lie, and the scratch of one row of T and of R."""

    program: Program
    nodes: tuple[Node, ...]
    places: dict[int, Place]
    token_bytes: int
    row_bytes: int


def lower(program: Program, itemsize: int) -> Lowered:
    """Fuse and place a finished Program whose activations take `itemsize` bytes."""
    if program.result is None:
        raise ValueError("the program is not finished: call program.finish(result) first")
    program = early_rows(program)
    assert program.result is not None
    nodes = _nodes(program)
    last_read = {value: index for index, node in enumerate(nodes) for value in node.reads}
    last_read[program.result.id] = len(nodes)
    kept_fp32 = program.fp32_values()
    arenas = {False: Arena(ALIGN), True: Arena(ALIGN)}
    places: dict[int, Place] = {}
    living: dict[tuple[bool, int], set[int]] = {}  # region -> values that are still to be read

    def place(values: tuple[int, ...]) -> None:
        """Side by side in one region."""
        per_row = program.handles[values[0]].shape[0] == R
        widths = [int(program.handles[v].shape[1]) for v in values]
        sizes = [4 if v in kept_fp32 else itemsize for v in values]
        stride = sum(w * s for w, s in zip(widths, sizes, strict=True))
        column = arenas[per_row].take(stride)
        offset = 0
        for value, width, size in zip(values, widths, sizes, strict=True):
            places[value] = Place(column, stride, offset, width, size == 4, per_row)
            offset += width * size
        living[per_row, column] = set(values)

    for index, node in enumerate(nodes):
        inner = () if node.norm is None else (node.norm.output,)
        for value in inner:
            place((value,))
        if node.name == "linear" and node.after is None:
            place(node.makes)
        else:
            for value in node.makes:
                place((value,))
        for value in {*node.reads, *node.makes, *inner} & places.keys():
            if last_read.get(value, index) > index:
                continue
            region = places[value].per_logit_row, places[value].column
            living[region].discard(value)
            if not living[region]:
                arenas[region[0]].give_back(region[1])
    return Lowered(program, tuple(nodes), places, arenas[False].size, arenas[True].size)


def _nodes(program: Program) -> list[Node]:
    nodes = []
    steps = fuse(program, lambda name: 0)
    written = _written(program, steps)
    taken = {op.output for node in written.values() for op in (*node.ops, *node.norms) if op}
    added = _added_norms(program, steps)
    taken |= {norm.output for norm in added.values()}
    for step in steps:
        op = step.main[0]
        if op.output in added:
            norm = added[op.output]
            other = next(i for i in op.inputs if i != norm.output)
            nodes.append(Node("rms_norm", (norm,), op, other))
        elif op.output in written:
            nodes.append(written[op.output])
        elif op.output not in taken:
            nodes.append(Node(op.name, step.main, step.after, step.residual, step.norm))
    return nodes


def _added_norms(program: Program, steps: list[Step]) -> dict[int, Op]:
    """For an addition's output, the rms_norm that it adds to something else and alone reads."""
    norms = {step.main[0].output: step.main[0] for step in steps if step.main[0].name == "rms_norm"}
    reads = Counter(value for step in steps for value in step.reads)
    found: dict[int, Op] = {}
    for step in steps:
        op = step.main[0]
        for value in op.inputs if op.name == "add" and step.after is None else ():
            fp32 = value in program.fp32_values()
            if value in norms and reads[value] == 1 and len(set(op.inputs)) == 2 and not fp32:
                found.setdefault(op.output, norms[value])
    return found


def _written(program: Program, steps: list[Step]) -> dict[int, Node]:
    """The node of each kv_write, by its output: with the ropes of its keys and of the queries that
    meet them, and the norms of their heads, of which it is the only reader."""
    made = {value: index for index, step in enumerate(steps) for value in step.outputs}
    by = {step.main[0].output: step.main[0] for step in steps if len(step.main) == 1}
    reads = Counter(value for step in steps for value in step.reads)

    def before(value: int | None, index: int) -> bool:
        return value is not None and made.get(value, -1) < index

    def made_by(name: str, value: int | None) -> Op | None:
        op = None if value is None else by.get(value)
        return op if op is not None and op.name == name and reads[op.output] == 1 else None

    def norm_of(rope: Op | None, index: int) -> Op | None:
        norm = None if rope is None else made_by("rms_norm", rope.inputs[0])
        if rope is None or norm is None or not before(norm.inputs[0], index):
            return None
        size = program.handles[norm.inputs[1]].shape[0]  # type: ignore[index]
        return norm if size == rope.attrs["head_dim"] else None

    found: dict[int, Node] = {}
    for index, step in enumerate(steps):
        op = step.main[0]
        if op.name != "kv_write":
            continue
        of_k, of_q = made_by("rope", op.inputs[0]), None
        if of_k is not None and of_k.attrs["head_dim"] != op.attrs["head_dim"]:
            of_k = None
        readers = [s.main[0] for s in steps if op.output in s.reads]
        if of_k is not None and len(readers) == 1:
            of_q = made_by("rope", readers[0].inputs[0])
            if of_q is not None and dict(of_q.attrs) != dict(of_k.attrs):
                of_q = None
        norms = (norm_of(of_q, index), norm_of(of_k, index))
        if of_q is not None and not before((norms[0] or of_q).inputs[0], index):
            of_q, norms = None, (None, norms[1])
        found[op.output] = Node("kv_write", (of_q, of_k, op), norms=norms)
    return found
