"""What launches and the memory plan both ask of a Program: mixtures, tables of rope, heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..program import Op, Program
from . import attention, experts
from .device import loads_ahead

__all__ = ["Mixtures", "mixtures", "shape_of", "table_of"]


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


def shape_of(op: Op, product: str) -> attention.Shape:
    """The heads of an attention operation whose products are of dtype `product`."""
    attrs: Mapping[str, Any] = op.attrs
    heads, kv_heads, head_dim = attrs["num_heads"], attrs["num_kv_heads"], attrs["head_dim"]
    return attention.Shape(heads, kv_heads, head_dim, product, loads_ahead())
