"""What launches and the memory plan both ask of a Program: mixtures, tables of rope, heads, and
how large the arrays of a step are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..program import Op, Program
from . import attention, experts
from .cache import KVCache
from .device import loads_ahead
from .upload import room

__all__ = ["Mixtures", "metadata_size", "mixtures", "shape_of", "table_of", "tables_width"]


@dataclass(frozen=True)
class Mixtures:
    """The largest of a program's mixtures of experts: memory is taken for it."""

    num_experts: int
    top_k: int

    def route_size(self, num_tokens: int) -> int:
        """Elements of experts.Route."""
        return experts.Route.size(num_tokens, self.num_experts, self.top_k)


def mixtures(program: Program) -> Mixtures:
    """Of all its expert_linear; zeros where there is none."""
    layers = [op for op in program if op.name == "expert_linear"]
    return Mixtures(
        max((int(op.attrs["num_experts"]) for op in layers), default=0),  # type: ignore[arg-type]
        max((int(program.handles[op.inputs[2]].shape[1]) for op in layers), default=0),  # type: ignore[index]
    )


def table_of(op: Op) -> tuple[tuple[float, ...], float]:
    """What a rope's rotations depend on: its frequencies and attention factor."""
    attrs: Mapping[str, Any] = op.attrs
    return attrs["inv_freq"], attrs["attention_factor"]


def tables_width(program: Program) -> tuple[int, ...]:
    """float32 of a token in each table of rotations."""
    tables = {table_of(op) for op in program if op.name == "rope"}
    return tuple(2 * len(inv_freq) for inv_freq, _ in tables)


def shape_of(op: Op, product: str, kv: KVCache | None) -> attention.Shape:
    """The heads of an attention operation whose products with `kv` are of dtype `product`."""
    attrs: Mapping[str, Any] = op.attrs
    heads, kv_heads, head_dim = attrs["num_heads"], attrs["num_kv_heads"], attrs["head_dim"]
    grouped = kv is not None and kv.grouped
    return attention.Shape(heads, kv_heads, head_dim, product, loads_ahead(), grouped)


def metadata_size(
    tables: Iterable[int], num_shapes: int, tokens: int, rows: int, context: int, block_size: int
) -> int:
    """Elements of the largest upload of a step: its arrays, as executor.py lists them. Each item of
    attention has a token; a sequence's row of the block table is as long as the longest one's."""
    items = 3 * room([0]) + room([attention.ITEM * tokens])
    pairs = room([2 * attention.scratch_pairs(context)])
    blocks = min(tokens, rows) * -(-context // block_size)
    of_tokens = [tokens] * 3 + [width * tokens for width in tables]
    return room([*of_tokens, rows, blocks]) + num_shapes * (items + pairs)
