"""A Program: the list of operations that a model's forward pass records, once, for every backend.

A model file calls `kernels.ops` on handles; each call checks shapes, appends one `Op` here and
returns the handle of its result. The token dimension is the symbol `T` (rows that want logits:
`R`), so one Program serves every number of tokens. It is fine-grained and says nothing of fusion,
packing or activation formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

T = "T"  # tokens in the step
R = "R"  # rows of the step that want logits
Dim = int | str


@dataclass(frozen=True)
class Handle:
    """A value of the Program: what an operation made, a step input, or a weight.

    `kind` is "value", "input" or "weight"; `id` numbers the values of its Program in the order
    of their making; `name` is set for inputs and weights.
    """

    program: Program = field(repr=False, compare=False)
    id: int
    shape: tuple[Dim, ...]
    kind: str
    name: str = ""


Attr = int | float | str | bool | None | tuple[float, ...]


@dataclass(frozen=True)
class Op:
    """One operation: its name in `kernels.ops`, operand ids, attributes, and the id it defines."""

    name: str
    inputs: tuple[int | None, ...]
    attrs: Mapping[str, Attr]
    output: int


class Program:
    """An append-only list of operations over handles; frozen by `finish(result)`."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.handles: list[Handle] = []
        self.inputs: dict[str, Handle] = {}
        self.weights: dict[str, Handle] = {}
        self.result: Handle | None = None

    def input(self, name: str, shape: tuple[Dim, ...]) -> Handle:
        """The step input of that name (see `ops.STEP_INPUTS`); asked twice, the same handle."""
        if name not in self.inputs:
            self.inputs[name] = self._new(shape, "input", name)
        return self.inputs[name]

    def weight(self, name: str, shape: tuple[int, ...]) -> Handle:
        """The weight of that canonical name; asked twice, it is the same handle."""
        known = self.weights.get(name)
        if known is not None:
            if known.shape != tuple(shape):
                raise ValueError(f"weight {name!r} was {known.shape} before and is {shape} now")
            return known
        self.weights[name] = self._new(tuple(shape), "weight", name)
        return self.weights[name]

    def append(
        self,
        name: str,
        inputs: tuple[Handle | None, ...],
        attrs: Mapping[str, Attr],
        shape: tuple[Dim, ...],
    ) -> Handle:
        """Record one operation; returns the handle of its result. Only `kernels.ops` calls this."""
        if self.result is not None:
            raise ValueError(f"the program is finished; {name} cannot be added")
        for operand in inputs:
            if operand is not None and operand.program is not self:
                raise ValueError(f"{name}: operand {operand} belongs to another program")
        out = self._new(shape, "value", "")
        ids = tuple(None if h is None else h.id for h in inputs)
        self.ops.append(Op(name, ids, MappingProxyType(dict(attrs)), out.id))
        return out

    def finish(self, result: Handle) -> Program:
        """Declare `result` the Program's value and close it."""
        self.result = result
        return self

    def last_use(self) -> dict[int, int]:
        """For each value id, the index of the last operation that reads it (for arenas)."""
        last: dict[int, int] = {}
        for index, op in enumerate(self.ops):
            for operand in op.inputs:
                if operand is not None:
                    last[operand] = index
        if self.result is not None:
            last[self.result.id] = len(self.ops)
        return last

    def fp32_values(self) -> frozenset[int]:
        """The values that ops.py keeps in fp32 whatever the activation dtype is.

        The logits: the result, back through scale and softcap to the op before. And experts' ids.
        """
        made_by = {op.output: op for op in self.ops}
        kept = {op.output for op in self.ops if op.name == "top_experts"}
        at = self.result.id if self.result is not None else None
        while at is not None:
            kept.add(at)
            op = made_by.get(at)
            at = op.inputs[0] if op is not None and op.name in ("scale", "softcap") else None
        return frozenset(kept)

    def matrices(self) -> list[int]:
        """The weights that linear layers multiply by."""
        linear = (op.inputs[1] for op in self if op.name in ("linear", "expert_linear"))
        return [i for i in dict.fromkeys(linear) if i is not None]

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __str__(self) -> str:
        """One line per operation, for reading."""

        def show(i: int | None) -> str:
            if i is None:
                return "-"
            h = self.handles[i]
            return h.name or f"%{h.id}"

        lines = []
        for op in self.ops:
            attrs = "".join(f", {k}={v}" for k, v in op.attrs.items())
            shape = list(self.handles[op.output].shape)
            lines.append(
                f"%{op.output} {shape} = {op.name}({', '.join(map(show, op.inputs))}{attrs})"
            )
        return "\n".join(lines)

    def _new(self, shape: tuple[Dim, ...], kind: str, name: str) -> Handle:
        handle = Handle(self, len(self.handles), tuple(shape), kind, name)
        self.handles.append(handle)
        return handle
