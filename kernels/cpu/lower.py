"""A Program as the native op list wants it: fused, its values placed in an arena, its barriers set.

Pure bookkeeping over `kernels.fuse`; `binder.py` turns the result into a native StepProgram.

Barriers. Most operations work row by row, each thread on its own range of rows; such operations
follow each other without waiting. One that reads what other threads wrote (a linear layer,
attention, a row selection) has a barrier before it, and so has the one after it.

Arena. A value takes `width` columns of [rows, width] floats; T values and R values have an arena
each. Memory is given to a new value only across a barrier from the last reader of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ..arena import Arena
from ..fuse import GATES, Step, early_rows, fuse
from ..program import Op, Program, R

__all__ = ["OPERATIONS", "Lowered", "Node", "Place", "lower"]

_IN_PLACE = frozenset(("add", "scale", "softcap", *GATES, "rope", "sigmoid_scale"))
_BY_ROWS = (
    _IN_PLACE
    | {"embedding", "rms_norm", "kv_write", "rotations"}
    | {"top_experts", "expert_weights", "expert_sum"}
)
_ACROSS_ROWS = {"linear", "expert_linear", "select_rows", "attention"}
OPERATIONS = tuple(sorted(_ACROSS_ROWS | _BY_ROWS - {"rotations"}))
_ALIGN = 16  # columns: a value's rows may begin a cache line


@dataclass(frozen=True)
class Place:
    """Where a value lies: its first column in the arena of T or of R rows, and its width."""

    column: int
    width: int
    per_logit_row: bool

    @property
    def slot(self) -> tuple[int, int, bool]:
        """As the native module takes it."""
        return (self.column, self.width, self.per_logit_row)


@dataclass(frozen=True)
class Node:
    """One native operation. `places` are those of the values it reads and makes, by id."""

    name: str  # of the operation; "linear" or "expert_linear" for every pattern of such layers
    step: Step | None  # None: "rotations"
    barrier: bool
    places: dict[int, Place]
    rotations: Place | None = None  # rope's table, or the one that a "rotations" node fills
    rope: Op | None = None  # the first rope operation that reads a "rotations" node's table


@dataclass(frozen=True)
class Lowered:
    """The op list, how many columns its arenas have, and where the result is."""

    program: Program
    nodes: tuple[Node, ...]
    token_columns: int
    row_columns: int
    result: Place


def lower(program: Program, form_of: Callable[[str], Hashable]) -> Lowered:
    """Fuse, place and order a finished Program. `form_of`: see `kernels.fuse.fuse`."""
    program = early_rows(program)
    if program.result is None:
        raise ValueError("the program is not finished: call program.finish(result) first")
    steps = fuse(program, form_of)
    tables = _rotation_tables(steps)
    last_read = _last_reads(program, steps)
    arenas = {False: Arena(_ALIGN), True: Arena(_ALIGN)}
    places: dict[int, Place] = {}
    nodes: list[Node] = []
    dead: list[int] = []  # read for the last time since the last barrier

    def place(value: int) -> Place:
        rows, width = program.handles[value].shape
        per_row = rows == R
        places[value] = Place(arenas[per_row].take(int(width)), int(width), per_row)
        return places[value]

    table_places: dict[tuple[object, ...], Place] = {}
    for key, rope in tables.items():
        width = 2 * len(key[0])  # type: ignore[arg-type]
        table_places[key] = Place(arenas[False].take(width), width, False)
        nodes.append(Node("rotations", None, False, {}, table_places[key], rope))

    rows_of = "T" if nodes else None  # whose row ranges the threads have been working on
    for index, step in enumerate(steps):
        op = step.main[0]
        by_rows = op.name in _BY_ROWS
        rows = _rows(program, step)
        barrier = rows_of is not None and not (by_rows and rows == rows_of)
        rows_of = rows if by_rows or op.name == "select_rows" else "columns"
        if barrier:
            for value in dead:
                arenas[places[value].per_logit_row].give_back(places[value].column)
            dead = []
        reads = [i for i in step.reads if program.handles[i].kind == "value"]
        ending = [v for v in reads if last_read.get(v) == index and v in places]
        for value in step.outputs:
            if program.handles[value].shape == (0,):
                continue  # stands for the written cache
            over = _overwritten(program, step, value, ending)
            if over is None:
                place(value)
            else:
                places[value] = places[over]
                ending.remove(over)
        dead += ending
        used = {v: places[v] for v in (*reads, *step.outputs) if v in places}
        table = table_places.get(_table_key(op)) if op.name == "rope" else None
        nodes.append(Node(op.name, step, barrier, used, table))
    return Lowered(
        program,
        tuple(nodes),
        arenas[False].size,
        arenas[True].size,
        places[program.result.id],
    )


def _overwritten(program: Program, step: Step, value: int, ending: list[int]) -> int | None:
    """The operand in whose memory the result may lie: read for the last time, by elements."""
    if step.residual is not None:
        candidates: tuple[int | None, ...] = (step.residual,)
    elif step.main[0].name in _IN_PLACE:
        candidates = step.main[0].inputs
    else:
        return None
    shape = program.handles[value].shape
    for operand in candidates:
        if operand in ending and program.handles[operand].shape == shape:
            return operand
    return None


def _last_reads(program: Program, steps: list[Step]) -> dict[int, int]:
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for value in step.reads:
            last[value] = index
    assert program.result is not None
    last[program.result.id] = len(steps)
    return last


def _rows(program: Program, step: Step) -> str:
    """Whose rows a step makes: T or R. A kv_write works on its operands' rows."""
    shape = program.handles[step.outputs[0]].shape
    if shape == (0,):
        operand = step.main[0].inputs[0]
        assert operand is not None
        shape = program.handles[operand].shape
    return str(shape[0])


def _table_key(op: Op) -> tuple[object, ...]:
    return (op.attrs["inv_freq"], op.attrs["attention_factor"])


def _rotation_tables(steps: list[Step]) -> dict[tuple[object, ...], Op]:
    """One entry for each set of frequencies, with the first operation that uses it."""
    found: dict[tuple[object, ...], Op] = {}
    for step in steps:
        for op in step.main:
            if op.name == "rope":
                found.setdefault(_table_key(op), op)
    return found
