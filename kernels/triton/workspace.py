"""What steps take beside weights and cache, planned to the byte: an executable that has been
prepared holds `Workspace.taken`, and takes no more.

Beyond that are only estimates of what is not tensors of ours: recorded launches and the vendor's
library; and the sampler's memory, which grows to what requests ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..backend import DTYPE_BYTES, KVSpec
from ..program import Program
from ..weights import RawWeight, WeightGroup
from . import attention, cublas, graphs, inputs, sampling
from .facts import metadata_size, mixtures, shape_of, tables_width
from .lower import Lowered, aligned, lower
from .quantised import LAYOUTS
from .upload import room

__all__ = ["Workspace", "plan"]


@dataclass(frozen=True)
class Workspace:
    """All in bytes. values: of a step; splits: of attention's softmax; sums: what stands for the
    inputs of quantised layers; route: pairs of experts; metadata: of a step, and of those that are
    recorded."""

    values: int
    splits: int
    sums: int
    route: int
    metadata: int
    recordings: int
    sampling: int
    library: int

    @property
    def taken(self) -> int:
        """By an executable that has been prepared."""
        return self.values + self.splits + self.sums + self.route + self.metadata

    @property
    def total(self) -> int:
        return self.taken + self.recordings + self.sampling + self.library


def _recorded_size(
    tables: tuple[int, ...], num_shapes: int, bucket: graphs.Bucket, table_width: int
) -> int:
    """Elements of a recorded step's upload."""
    rows, pairs = bucket
    of_shape = [0, attention.ITEM * rows]
    of_shape += [attention.ITEM * (rows + 1), 2 * pairs] if pairs else [0, 0]
    of_rows = [rows] * 4 + [width * rows for width in tables] + [rows * table_width]
    return room(of_rows) + num_shapes * room(of_shape)


def plan(
    program: Program,
    *,
    dtype: str,
    activations: str,
    limits: tuple[int, int, int],
    weights: Mapping[str, RawWeight | WeightGroup] | None,
    kv: KVSpec | None,
    on_card: bool,
) -> Workspace:
    """limits: tokens and logit rows of a step, and tokens of a sequence, at most. Without weights
    or kv, the most that any format or block size may take."""
    max_tokens, max_rows, context = limits
    lowered = lower(program, DTYPE_BYTES[dtype])
    tokens, rows = aligned(max_tokens), aligned(max_rows)
    most = max(tokens, rows)
    mixed = mixtures(program)
    shapes = {shape_of(op, dtype, None) for op in program if op.name == "attention"}
    pairs = attention.scratch_pairs(context)
    tables, block_size = tables_width(lowered.program), 1 if kv is None else kv.block_size
    metadata = metadata_size(tables, len(shapes), max_tokens, max_rows, context, block_size)
    recorded = list(graphs.buckets(shapes, max_tokens, max_rows, context))
    width = -(-context // block_size)
    metadata += max(_recorded_size(tables, len(shapes), bucket, width) for bucket in recorded)
    assert program.result is not None
    return Workspace(
        values=tokens * lowered.token_bytes + rows * lowered.row_bytes,
        splits=max((shape.scratch_bytes(pairs) for shape in shapes), default=0),
        sums=4 * most * max(1, mixed.top_k) * _sums_width(lowered, weights, activations),
        route=4 * mixed.route_size(most),
        metadata=4 * metadata,
        recordings=len(recorded) * graphs.launches(lowered) * graphs.NODE_BYTES,
        sampling=sampling.workspace_bytes(rows, int(program.result.shape[1])),
        library=cublas.workspace_bytes(program) if on_card else 0,
    )


def _sums_width(
    lowered: Lowered, weights: Mapping[str, RawWeight | WeightGroup] | None, activations: str
) -> int:
    """Columns of the scratch of the layer that needs most."""
    handles = lowered.program.weights
    matrices = {name: h for name, h in handles.items() if len(h.shape) == 2}
    if weights is None:
        widths = [inputs.most_scratch(int(h.shape[1]), activations) for h in matrices.values()]
        return max(widths, default=0)
    most = 0
    for name, handle in matrices.items():
        weight = weights[name]
        for part in (weight,) if isinstance(weight, RawWeight) else weight.parts:
            layout = LAYOUTS.get(part.packed_format.name)
            if layout is not None:
                by = activations if layout.multiplies(activations) else ""
                width = inputs.Scratch.of(layout, int(handle.shape[1]), by).width
                most = max(most, width)
    return most
