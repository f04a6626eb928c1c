"""A weight on the CPU: what it came as, the tiles that it becomes, and the memory these take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..program import Program
from ..weights import RawWeight, WeightGroup, release_pages
from . import _native
from .packed_cache import PackedCache
from .quantise import as_packed

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A weight as it came; what a Program does with it decides how `lower` packs it.

    `tiles`: what `lower` made, one for each part; another Program over this weight shares them.
    """

    parts: tuple[RawWeight, ...]
    shape: tuple[int, ...]
    tiles: list[_native.PackedMatrix] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)


class Packer:
    """Makes tiles, on the threads that will multiply by them, or takes them from `cache`.

    compact: bf16 takes 12 bits an element where that loses nothing and saves memory.
    """

    def __init__(self, pool: _native.Pool, compact: bool, cache: PackedCache | None) -> None:
        self._pool = pool
        self._compact = compact
        self._cache = cache

    def pack(self, weights: Sequence[CpuWeight], paired: bool) -> None:
        """Make the tiles of a linear layer's weights, of those that have none yet.

        paired: gate and up, of equal rows, are multiplied tile by tile together.
        """
        new = [w for w in {id(w): w for w in weights}.values() if not w.tiles]
        paired = paired and len(new) == 2
        parts = in_order([w.parts for w in new], paired)

        def pack(parts: Sequence[RawWeight]) -> list[_native.PackedMatrix]:
            return self._packed(parts, paired)

        tiles = iter(pack(parts) if self._cache is None else self._cache.tiles(parts, pack))
        made = {id(part): next(tiles) for part in parts}
        for w in new:
            w.tiles[:] = [made[id(part)] for part in w.parts]

    def _packed(self, parts: Sequence[RawWeight], paired: bool) -> list[_native.PackedMatrix]:
        rows = [as_packed(part, self._pool.size) for part in parts]
        matrices = [(r.format.name, r.data.view(np.ndarray), r.shape[0], r.shape[1]) for r in rows]
        tiles = _native.pack_layer(self._pool, matrices, paired, self._compact)
        for part in parts:
            for data in part.buffers.values():
                release_pages(data.view(np.ndarray))
        return tiles


def weights_bytes(program: Program, weights: Mapping[str, RawWeight | WeightGroup]) -> int:
    """Memory that the weights take once lowered: tiles, and tables that rows are read of.

    bf16 tiles count in full here, before a weight is read; packed they take 12 bits an element
    of a trained weight's 16 (`compact` of _native.pack), but not for AMX.
    """
    total = 0
    uses, mixtures = uses_of(program), mixtures_of(program)
    for name, weight in weights.items():
        parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
        if len(weight.shape) == 1:
            total += 4 * weight.shape[0]
            continue
        used = uses.get(name, set())
        from_tiles = "embedding" in used and rows_from_tiles(parts, "linear" in used)
        if "linear" in used or from_tiles:
            total += sum(_native.packed_bytes(p.packed_format.name, *p.shape) for p in parts)
        if name in mixtures:
            each = by_expert(CpuWeight(parts, weight.shape), mixtures[name]).parts
            total += sum(_native.packed_bytes(p.packed_format.name, *p.shape) for p in each)
        if "embedding" in used and not from_tiles:
            total += sum(p.nbytes for p in parts)
    return total


def rows_from_tiles(parts: Sequence[RawWeight], multiplied: bool) -> bool:
    """Whether an embedding reads its rows back from tiles instead of the checkpoint.

    So it is for a table that loading makes, and for one that linear layers multiply by as well (the
    head that is tied to it), which is then held once.
    """
    if not all(part.is_as_stored for part in parts):
        return True
    return multiplied and all(part.packed_format is part.format for part in parts)


def uses_of(program: Program) -> dict[str, set[str]]:
    """Weight name -> the operations that read it."""
    uses: dict[str, set[str]] = {}
    for op in program:
        for i in op.inputs:
            if i is not None and program.handles[i].kind == "weight":
                uses.setdefault(program.handles[i].name, set()).add(op.name)
    return uses


def mixtures_of(program: Program) -> dict[str, int]:
    """Weight name -> how many experts' rows it holds."""
    return {
        program.handles[op.inputs[1]].name: int(op.attrs["num_experts"])  # type: ignore[index,arg-type]
        for op in program
        if op.name == "expert_linear"
    }


def by_expert(weight: CpuWeight, num_experts: int) -> CpuWeight:
    """The weight with one part an expert. Errors: ValueError for an expert of several formats."""
    groups = WeightGroup(weight.parts).split(num_experts)
    for e, group in enumerate(groups):
        if len(group.parts) > 1:
            raise ValueError(
                f"weight {weight.name!r}: expert {e} is {len(group.parts)} tensors or formats; "
                "the CPU backend takes one an expert"
            )
    return CpuWeight(tuple(group.parts[0] for group in groups), weight.shape, weight.tiles)


def in_order(groups: Sequence[Sequence[_T]], paired: bool) -> list[_T]:
    """The parts of a layer's weights one after another or, of two, in pairs."""
    return [part for group in (zip(*groups, strict=True) if paired else groups) for part in group]


def values(part: RawWeight) -> np.ndarray:
    """fp32 [elements], as the checkpoint's format has them."""
    out = np.empty(part.shape, np.float32)
    _native.dequantise(part.format.name, part.data.view(np.ndarray), out.reshape(-1))
    return out.reshape(-1)
