"""Named rewrite patterns over a Program: what may be computed together without changing a bit.

A recorded Program is fine-grained. `fuse()` gives it back as a list of `Step`s, each one or several
of its operations. Because every operation rounds its result as before and rows are independent
(law 2), a fused step's result equals the operations' own, bit for bit, and a test says so.

Patterns
    early_rows       row-wise work that only the logit rows need is done on those rows alone
    norm_linear      rms_norm in front of the linear layers that are its only readers
    linear_group     linear layers of one input: q/k/v, gate/up
    linear_add       a linear layer and the residual addition that is its only reader
    gated_linear     gate and up layers and the GATES operation that is their only reader
    gated_experts    the same of two expert_linear with one input and one choice of experts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from .program import Handle, Op, Program, R

__all__ = ["GATES", "Step", "early_rows", "fuse"]

GATES = ("silu_mul", "gelu_tanh_mul", "clamped_silu_mul")  # an activation times what is beside it
# Result row t depends on row t of the operands and on nothing that belongs to a token.
_ROW_WISE = (
    *("linear", "rms_norm", "add", "scale", "softcap", *GATES),
    *("top_experts", "expert_weights", "expert_linear", "expert_sum", "sigmoid_scale"),
)


@dataclass(frozen=True)
class Step:
    """Operations computed together; `output` is the value that others may read.

    `main` are the operations that give the step its name: one, or the linear layers of a group.
    `norm` stands before them; `after` (an addition or a gate) follows. A group without `after`
    defines one value per linear layer, the outputs of `main`.
    """

    pattern: str
    main: tuple[Op, ...]
    norm: Op | None = None
    after: Op | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """The values that this step makes."""
        return (self.after.output,) if self.after else tuple(op.output for op in self.main)

    @property
    def residual(self) -> int | None:
        """The value that `after` adds, where it is an addition."""
        if self.after is None or self.after.name != "add":
            return None
        first, second = self.after.inputs
        return second if first == self.main[0].output else first

    @property
    def reads(self) -> tuple[int, ...]:
        """The values and step inputs that this step reads from outside, weights included."""
        ops = [op for op in (self.norm, *self.main, self.after) if op is not None]
        made = {op.output for op in ops}
        read = [i for op in ops for i in op.inputs if i is not None and i not in made]
        return tuple(dict.fromkeys(read))


def early_rows(program: Program) -> Program:
    """The same Program with select_rows moved up through the row-wise operations before it.

    The last layer's feed-forward part and the final norm then run on the rows that want logits.
    """
    made_by = {op.output: op for op in program}
    readers: dict[int, list[Op]] = defaultdict(list)
    for op in program:
        for operand in op.inputs:
            if operand is not None:
                readers[operand].append(op)
    chosen: set[int] = set()  # outputs of operations that move to R rows

    def movable(value: int) -> bool:
        op = made_by.get(value)
        return (
            op is not None
            and op.name in _ROW_WISE
            and program.handles[value].shape[0] != R
            and all(
                reader.name == "select_rows" or reader.output in chosen for reader in readers[value]
            )
        )

    for op in reversed(program.ops):
        if movable(op.output):
            chosen.add(op.output)
    if not chosen:
        return program

    new = Program()
    place: dict[int, Handle] = {}  # old id -> handle in `new`
    on_rows: dict[int, Handle] = {}  # old id of a T value -> its selected rows
    for handle in program.handles:
        if handle.kind == "input":
            place[handle.id] = new.input(handle.name, handle.shape)
        elif handle.kind == "weight":
            place[handle.id] = new.weight(handle.name, handle.shape)  # type: ignore[arg-type]
    rows = place[program.inputs["logit_rows"].id]

    def selected(old: int) -> Handle:
        if old not in on_rows:
            value = place[old]
            on_rows[old] = new.append("select_rows", (value, rows), {}, (R, *value.shape[1:]))
        return on_rows[old]

    for op in program:
        if op.name == "select_rows" and op.inputs[0] is not None:
            place[op.output] = selected(op.inputs[0])
            continue
        moved = op.output in chosen
        operands: list[Handle | None] = []
        for i in op.inputs:
            if i is None:
                operands.append(None)
            elif moved and program.handles[i].kind == "value":
                operands.append(selected(i))
            else:
                operands.append(place[i])
        shape = program.handles[op.output].shape
        made = new.append(op.name, tuple(operands), op.attrs, (R, *shape[1:]) if moved else shape)
        (on_rows if moved else place)[op.output] = made
    assert program.result is not None
    return new.finish(place[program.result.id])


def fuse(program: Program, form_of: Callable[[str], Hashable]) -> list[Step]:
    """The Program's operations as fused steps, in an order that respects who reads whom.

    `form_of(weight name)` says how a backend wants the activations that multiply a weight: linear
    layers share a step only where it is equal.
    """
    readers: dict[int, list[int]] = defaultdict(list)  # value -> indices of operations
    for index, op in enumerate(program.ops):
        for operand in op.inputs:
            if operand is not None:
                readers[operand].append(index)
    made_at = {op.output: index for index, op in enumerate(program.ops)}
    taken: set[int] = set()
    placed: dict[int, Step] = {}  # at the index of the operation that it stands in place of

    for index, op in enumerate(program.ops):
        if op.name not in ("linear", "expert_linear") or index in taken:
            continue
        group = _group(program, index, readers, taken, form_of)
        after = _after(program, group, readers)
        norm = _norm(program, group, readers, made_at)
        ops = tuple(program.ops[i] for i in group)
        if op.name == "expert_linear":
            if after is None:
                continue
            names = ["gated_experts"]
        else:
            names = ["norm"] if norm is not None else []
            names.append("linear_group" if len(ops) > 1 else "linear")
            if after is not None:
                name = program.ops[after].name
                names = [*names[:-1], "linear_add" if name == "add" else "gated_linear"]
        step = Step(
            "_".join(names),
            ops,
            None if norm is None else program.ops[norm],
            None if after is None else program.ops[after],
        )
        taken.update(group)
        taken.update(i for i in (norm, after) if i is not None)
        # An addition may read what is made after the layer; a group stands where it begins.
        placed[group[0] if after is None or step.residual is None else after] = step
    return [
        placed[index] if index in placed else Step(op.name, (op,))
        for index, op in enumerate(program.ops)
        if index in placed or index not in taken
    ]


def _group(
    program: Program,
    first: int,
    readers: dict[int, list[int]],
    taken: set[int],
    form_of: Callable[[str], Hashable],
) -> list[int]:
    """Indices of the linear layers that read what `first` reads, in the same form.

    Those of experts read the same experts as well, and have biases alike.
    """
    op = program.ops[first]
    x, weight = op.inputs[0], op.inputs[1]
    assert x is not None and weight is not None
    form = form_of(program.handles[weight].name)
    found = []
    for index in readers[x]:
        other = program.ops[index]
        if other.name != op.name or index in taken or other.inputs[0] != x:
            continue
        if op.name == "expert_linear" and (
            other.inputs[2] != op.inputs[2] or (other.inputs[3] is None) != (op.inputs[3] is None)
        ):
            continue
        if form_of(program.handles[other.inputs[1]].name) == form:  # type: ignore[index]
            found.append(index)
    return found


def _after(program: Program, group: Sequence[int], readers: dict[int, list[int]]) -> int | None:
    """Index of the one operation that reads all that the group makes, where it can be fused."""
    outputs = [program.ops[i].output for i in group]
    if any(len(readers[v]) != 1 for v in outputs) or program.result is None:
        return None
    index = readers[outputs[0]][0]
    op = program.ops[index]
    if any(readers[v][0] != index for v in outputs) or program.result.id in outputs:
        return None
    first = program.ops[group[0]].name
    if len(group) == 1 and first == "linear" and op.name == "add" and op.inputs[0] != op.inputs[1]:
        return index
    if len(group) == 2 and op.name in GATES and list(op.inputs) == outputs:
        return index
    return None


def _norm(
    program: Program,
    group: Sequence[int],
    readers: dict[int, list[int]],
    made_at: dict[int, int],
) -> int | None:
    """Index of the rms_norm whose only readers are this group of `linear`, over whole rows."""
    first = program.ops[group[0]]
    x = first.inputs[0]
    assert x is not None
    index = made_at.get(x)
    if first.name != "linear" or index is None or program.ops[index].name != "rms_norm":
        return None
    weight = program.ops[index].inputs[1]
    assert weight is not None
    whole_rows = program.handles[weight].shape[0] == program.handles[x].shape[1]
    return index if whole_rows and sorted(readers[x]) == sorted(group) else None
