"""Linear layers as measured on one card: tuned/<card>.json beside this file.

A table is read when a backend is made; nothing is tuned while serving. `engineroom bench kernels
--tune` writes one. Rows are for a weight's format, what multiplies it, its shape rounded up to
powers of two, and the width of the tile of tokens.

A row may set only what no bit of a result follows from: how many warps share a tile, and how many
steps are loaded ahead. Never the step along K, its order, or the rows of a tile: additions are in
the order that these give, and a row that is for some numbers of tokens would make it differ with
their number (law 2). They have no keys here, and an unknown key is an error. Nor may fewer than
four warps share a tile: that is another instruction, with sums of its own.

Beside the rows, 16-bit weights that the vendor's library was seen to multiply to other bits, or no
faster: the table can keep it from being called, and never has it called (cublas.py tries it first).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import triton

from .numerics import TORCH_DTYPES
from .quantised import LAYOUTS, FloatMatrix, Layout, Matrix

SCHEMA = "engineroom.tuned/1"  # of the JSON; the number changes when a field changes its meaning
FOLDER = Path(__file__).parent / "tuned"
WARPS = (4, 8)
STAGES = tuple(range(1, 9))


class Key(NamedTuple):
    """The launches that a row is for.

    weight: a format, the first of LAYOUTS among those that are held alike, or a dtype. x: the dtype
    of a layer's input, or "int8" or "fp8" where it is multiplied so. rows, columns: powers of two,
    as is `tokens`, the width of a tile.
    """

    weight: str
    x: str
    rows: int
    columns: int
    tokens: int

    @classmethod
    def of(cls, weight: Matrix, x: torch.dtype, tokens: int) -> Key:
        """Of a launch over tiles of `tokens`, its input being of dtype x."""
        rows, columns = (1 << (size - 1).bit_length() for size in weight.shape)
        if isinstance(weight, FloatMatrix):
            return cls(_name(weight.data.dtype), _name(x), rows, columns, tokens)
        return cls(_format(weight.layout), weight.activations or _name(x), rows, columns, tokens)


class Options(NamedTuple):
    """What a row sets."""

    num_warps: int
    num_stages: int


_POWERS = tuple(1 << i for i in range(31))
_MAY_BE: dict[str, tuple[object, ...]] = {
    "weight": (*LAYOUTS, *TORCH_DTYPES),
    "x": (*TORCH_DTYPES, "int8", "fp8"),
    "rows": _POWERS,
    "columns": _POWERS,
    "tokens": (16, 32, 64, 128),  # TOKENS of linear.py
    "num_warps": WARPS,
    "num_stages": STAGES,
}
_CUBLAS: dict[str, tuple[type, ...]] = {
    "dtype": (str,),
    "rows": (int,),
    "columns": (int,),
    "batch_invariant": (bool,),
    "same_bits": (bool,),
    "faster_from": (int, type(None)),
}
_LIBRARY_TOKENS = 1024  # of the library's smallest call: COUNTS of cublas.py


@dataclass(frozen=True)
class Tuned:
    """A card's rows; `source` says where they are from, or why there are none.

    ours: dtype, rows and columns of weights that the vendor's library is not called for.
    """

    rows: Mapping[Key, Options]
    source: str
    ours: frozenset[tuple[str, int, int]] = frozenset()

    def options(self, weight: Matrix, x: torch.dtype, tokens: int) -> dict[str, int]:
        """What takes the place of the launcher's own options; nothing where there is no row."""
        found = self.rows.get(Key.of(weight, x, tokens)) if self.rows else None
        return {} if found is None else found._asdict()

    def is_ours(self, weight: Matrix) -> bool:
        """Whether the vendor's library is known to be no help with this weight."""
        dtype = _name(weight.data.dtype) if isinstance(weight, FloatMatrix) else ""
        return (dtype, *weight.shape) in self.ours


UNTUNED = Tuned({}, "defaults")


def file_name(card: str) -> str:
    """The name of a card's table."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json"


def load(card: str) -> Tuned:
    """The table of the card of that name. One that another Triton was tuned with is not used: its
    options were seen to keep the bits by that compiler. Errors: ValueError for a table that is not
    as this file says."""
    path = FOLDER / file_name(card)
    if not path.exists():
        return Tuned({}, f"defaults: no table for {card}")
    found, version = parse(path.read_text("utf-8"), path.name)
    if version != triton.__version__:
        return Tuned(
            {}, f"defaults: {path.name} is for triton {version}, and {triton.__version__} runs here"
        )
    return found


def parse(text: str, name: str) -> tuple[Tuned, str]:
    """A table, and the version of Triton that it was measured with.

    Errors: ValueError, with `name` and the row, for what a table may not hold.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}; write it again with --tune") from error
    _only(table, {"schema", "card", "triton", "rows", "cublas"}, name)
    if table["schema"] != SCHEMA:
        raise ValueError(
            f"{name} has schema {table['schema']!r}, and {SCHEMA!r} is read here; write it again "
            "with `engineroom bench kernels --tune`"
        )
    for field in ("rows", "cublas"):
        if not isinstance(table[field], list):
            raise ValueError(f"{name}: {field} is {table[field]!r}, and has to be a list")
    rows: dict[Key, Options] = {}
    for number, row in enumerate(table["rows"]):
        where = f"{name}, row {number}"
        _only(row, set(_MAY_BE), where)
        for field, allowed in _MAY_BE.items():
            if type(row[field]) is not type(allowed[0]) or row[field] not in allowed:
                raise ValueError(f"{where}: {field} is {row[field]!r}; it may be {_list(allowed)}")
        key = Key(*(row[field] for field in Key._fields))
        if key in rows:
            raise ValueError(f"{where} is for the same launches as a row before it: {key}")
        rows[key] = Options(row["num_warps"], row["num_stages"])
    ours = set()
    for number, row in enumerate(table["cublas"]):
        where = f"{name}, cublas {number}"
        _only(row, set(_CUBLAS), where)
        for field, types in _CUBLAS.items():
            if type(row[field]) not in types:
                raise ValueError(f"{where}: {field} is {row[field]!r}")
        fast = row["faster_from"] is not None and row["faster_from"] <= _LIBRARY_TOKENS
        if not (row["same_bits"] and fast):
            ours.add((row["dtype"], row["rows"], row["columns"]))
    return Tuned(rows, f"{name}, {len(rows)} rows", frozenset(ours)), table["triton"]


def render(card: str, rows: Mapping[Key, Options], cublas: list[dict[str, Any]]) -> str:
    """A table as `parse` reads it, in one order whatever order rows were found in.

    cublas: of 16-bit weights of exactly that shape, whether cuBLAS gives a row the same bits in
    every batch, and, called as cublas.py does, the bits of our kernel; and from how many tokens on
    it is faster (None: never).
    """
    table = {
        "schema": SCHEMA,
        "card": card,
        "triton": triton.__version__,
        "rows": [{**key._asdict(), **rows[key]._asdict()} for key in sorted(rows)],
        "cublas": sorted(cublas, key=lambda row: (row["dtype"], row["rows"], row["columns"])),
    }
    return json.dumps(table, indent=1, allow_nan=False) + "\n"


def _only(found: Any, keys: set[str], where: str) -> None:
    have = set(found) if isinstance(found, dict) else set()
    if have != keys:
        raise ValueError(
            f"{where} has unknown keys {sorted(have - keys)} and lacks {sorted(keys - have)}; what "
            "decides the order of additions can have no key"
        )


def _list(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _format(layout: Layout) -> str:
    return next(name for name, other in LAYOUTS.items() if other == layout)
