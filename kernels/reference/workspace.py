"""How much scratch a step takes: the largest sum of live values and one operation's temporaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..program import Op, Program, R, T
from . import attention as att
from . import linear as lin


def workspace_bytes(
    program: Program, max_tokens: int, max_rows: int, itemsize: int, num_workers: int
) -> int:
    """Upper bound in bytes for a step of max_tokens tokens and max_rows logit rows.

    Counts tensors, not the allocator's rounding or torch itself. `itemsize` is that of the
    activation dtype.
    """
    dims = {T: max_tokens, R: max_rows}
    kept_fp32 = program.fp32_values()
    last_use = program.last_use()

    def elements(value: int) -> int:
        count = 1
        for dim in program.handles[value].shape:
            count *= dims[dim] if isinstance(dim, str) else dim
        return count

    def held(value: int) -> int:
        return elements(value) * (4 if value in kept_fp32 else itemsize)

    live: dict[int, int] = {}
    peak = 0
    for index, op in enumerate(program.ops):
        live[op.output] = held(op.output)
        peak = max(peak, sum(live.values()) + _temporaries(op, elements, dims, program))
        for value in [v for v in live if last_use.get(v, index) <= index]:
            del live[value]
    columns = [h.shape[1] for h in program.weights.values() if len(h.shape) == 2]
    scratch = max((lin.scratch_bytes(int(k)) for k in columns), default=0)
    return peak + num_workers * scratch + _step_metadata(program, max_tokens)


def _temporaries(
    op: Op, elements: Callable[[int], int], dims: Mapping[str, int], program: Program
) -> int:
    """Bytes that one operation allocates beside the values that live on."""
    operands = [i for i in op.inputs if i is not None and program.handles[i].kind == "value"]
    widened = 4 * sum(elements(i) for i in operands)
    if op.name == "attention":
        heads = {k: int(op.attrs[k]) for k in ("num_heads", "num_kv_heads", "head_dim")}  # type: ignore[arg-type]
        return widened + att.scratch_bytes(max(dims.values()), **heads)
    if op.name == "linear":
        # The result, the operand, and both padded to whole row tiles.
        x = program.handles[op.inputs[0]]  # type: ignore[index]
        out = program.handles[op.output]
        padding = 4 * lin.ROW_TILE * (int(x.shape[1]) + int(out.shape[1]))
        return widened * 2 + 4 * elements(op.output) + padding
    if op.name == "expert_linear":
        # Rows gathered by expert, all of one expert at worst, as operand and result of a linear.
        top_k = int(program.handles[op.inputs[2]].shape[1])  # type: ignore[index]
        width = int(program.handles[op.inputs[1]].shape[1])  # type: ignore[index]
        pairs = elements(op.inputs[2])  # type: ignore[arg-type]
        out_width = int(program.handles[op.output].shape[1]) // top_k
        return widened + 4 * (pairs + lin.ROW_TILE) * 4 * (width + out_width)
    if op.name in ("top_experts", "expert_weights"):
        return widened + 8 * 8 * elements(op.inputs[0])  # type: ignore[arg-type]  # 64-bit indices
    if op.name == "expert_sum":
        return 2 * widened + 4 * 2 * elements(op.output)
    return widened + 4 * 4 * elements(op.output)


def _step_metadata(program: Program, max_tokens: int) -> int:
    """Index tensors and rotation tables of one step."""
    tables = {
        (op.attrs["inv_freq"], op.attrs["attention_factor"]) for op in program if op.name == "rope"
    }
    return max_tokens * (128 + sum(4 * 4 * len(f) for f, _ in tables))  # type: ignore[arg-type,misc]
