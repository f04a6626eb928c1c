"""The native CPU backend: packs weights into tiles, holds the cache, runs a step in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import DTYPE_BYTES, BackendUnavailable, KVSpec, StepInputs, check_program
from ..program import Program, R
from ..weights import BF16, FP8, FP8_128, RawWeight, WeightGroup
from . import _native
from .binder import Binder
from .lower import OPERATIONS, lower
from .packed_cache import PackedCache
from .sampler import CpuLogits, CpuSampler
from .tiles import CpuWeight, Packer, weights_bytes

ACTIVATIONS = ("auto", "int8", "float32")
BFLOAT16 = (BF16, FP8, FP8_128)  # whose elements are bfloat16 numbers, before any scale
# Formats whose table is none of integers: what int8 activations multiply is off by at most one part
# in so many of a block's largest value (CodeTable in kernels.hpp).
TABLE_ROUNDING: Mapping[str, int] = {"NF4": 353, "FP4": 320}
UNVERIFIED = ("amx",)  # kernels that were proved over a model of the instructions only

Weight = RawWeight | WeightGroup | CpuWeight


@dataclass(frozen=True, eq=False)
class CpuCache:
    """A paged cache in native memory."""

    spec: KVSpec
    native: _native.KVCache


class CpuBackend:
    """Implements kernels.backend.Backend.

    activation_dtype: a key of DTYPE_BYTES; each operation computes in fp32 and rounds its result
    once to it. activations: what multiplies a quantised weight: "int8" (groups of 32, also
    "auto") or "float32", the activations themselves. threads: None takes the physical cores that
    this process may use. isa: a table of kernels, None for the fastest that runs here.
    packed_cache: the file that `lower` keeps tiles in and what they are made of (see PackedCache).
    No result depends on threads or on the cache; results of different isa differ in last bits.

    Errors: ValueError for a value that does not exist here.
    """

    name = "cpu"
    overlaps = False

    def __init__(
        self,
        *,
        activation_dtype: str = "float32",
        threads: int | None = None,
        activations: str = "auto",
        isa: str | None = None,
        packed_cache: tuple[Path, str] | None = None,
    ) -> None:
        if activation_dtype not in DTYPE_BYTES:
            raise ValueError(
                f"activation dtype {activation_dtype!r} is unknown; "
                f"supported: {', '.join(DTYPE_BYTES)}"
            )
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"activations={activations!r} is unknown; supported: {', '.join(ACTIVATIONS)}"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        tables = _native.kernel_tables()
        if isa is not None and isa not in tables:
            raise ValueError(f"isa {isa!r} does not run here; what does: {', '.join(tables)}")
        self.isa = isa or tables[0]
        self._dtype = activation_dtype
        self._int8 = activations != "float32"
        # AMX multiplies bf16 as it lies in memory; the other kernels unpack 12 bits in registers.
        self._compact = self.isa != "amx"
        self._packed_cache = packed_cache
        self._pool = _native.Pool(threads or _native.usable_cores())

    # --------------------------------------------------------------------------------- weights

    def pack(self, weight: RawWeight | WeightGroup) -> CpuWeight:
        """Take a weight in; tiles are made by `lower`, which knows how it is used.

        Errors: ValueError for a weight of more than two dimensions.
        """
        parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
        if len(weight.shape) not in (1, 2):
            name = "+".join(p.name for p in parts)
            raise ValueError(
                f"weight {name!r} has shape {list(weight.shape)}; the CPU backend packs weights of "
                "one dimension (norms, biases) or two (matrices)"
            )
        return CpuWeight(tuple(parts), tuple(weight.shape))

    def weights_bytes(
        self, program: Program, weights: Mapping[str, RawWeight | WeightGroup]
    ) -> int:
        """See tiles.weights_bytes."""
        return weights_bytes(program, weights)

    def packing_notes(self, weights: Mapping[str, RawWeight | WeightGroup]) -> tuple[str, ...]:
        """What int8 activations cost formats whose table is none of integers."""
        parts = [
            part
            for weight in weights.values()
            for part in (weight.parts if isinstance(weight, WeightGroup) else (weight,))
        ]
        counts = Counter(part.packed_format.name for part in parts) if self._int8 else Counter()
        return tuple(
            f"{counts[name]} {name} weights are multiplied with their table rounded to 8 bits: a "
            f"value moves by at most 1 part in {part} of its block's largest "
            "(activations='float32' takes the table as it is)"
            for name, part in TABLE_ROUNDING.items()
            if counts[name]
        )

    def input_form(self, weight: Weight) -> str:
        """How a linear layer's input is made ready for this weight: int8, bfloat16 or float32."""
        formats = [p.packed_format for p in _parts(weight)]
        if self._int8 and not any(f.is_float or f in BFLOAT16 for f in formats):
            return "int8"
        if self._dtype == "bfloat16" and all(f in BFLOAT16 for f in formats):
            return "bfloat16"
        return "float32"

    def _forms(self, program: Program, weights: Mapping[str, Weight]) -> Callable[[Weight], str]:
        """What input_form says, but of a bf16 head behind layers that multiply int8 activations:
        its input is rounded to bf16 too, for half of what fp32 takes of the time."""
        head = _head(program, weights)
        names = [program.handles[i].name for i in program.matrices()]
        if head is None or all(self.input_form(weights[name]) != "int8" for name in names):
            return self.input_form
        return lambda weight: "bfloat16" if weight is head else self.input_form(weight)

    # ----------------------------------------------------------------------------------- cache

    def allocate_kv(self, spec: KVSpec, num_blocks: int) -> CpuCache:
        """A zeroed cache of num_blocks; pages are taken as they are written."""
        native = _native.KVCache(
            *spec.parts,
            spec.num_layers,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            num_blocks,
        )
        return CpuCache(spec, native)

    def kv_dtype(self, activation_dtype: str, quantised: bool) -> str:
        """bfloat16 beside weights of 16 bits or fewer, else the activations' own."""
        return "bfloat16" if quantised else activation_dtype

    # --------------------------------------------------------------------------------- programs

    def workspace_bytes(
        self,
        program: Program,
        max_tokens: int,
        max_rows: int,
        max_context: int,
        *,
        weights: Mapping[str, RawWeight | WeightGroup] | None = None,
        kv: KVSpec | None = None,
    ) -> int:
        """The arenas, prepared activations and scratch of the largest such step, which no other
        exceeds; without the weights a bound for any."""
        form_of = self._forms(program, weights or {})
        lowered = lower(program, _input_of(weights, form_of) if weights else lambda name: 0)
        handles = lowered.program.handles
        inputs = []
        for step in (node.step for node in lowered.nodes if node.name == "linear"):
            assert step is not None
            x, weight = step.main[0].inputs[:2]
            rows, width = handles[x].shape  # type: ignore[index]
            name = handles[weight].name  # type: ignore[index]
            form = form_of(weights[name]) if weights else "float32"
            inputs.append((form, int(width), rows == R))
        attention = [op.attrs for op in program if op.name == "attention"]
        heads, kv_heads, head_dim = (
            max((int(attrs[name]) for attrs in attention), default=0)  # type: ignore[arg-type]
            for name in ("num_heads", "num_kv_heads", "head_dim")
        )
        experts = [
            (
                program.handles[op.inputs[1]].shape[1],  # type: ignore[index]
                program.handles[op.inputs[2]].shape[1],  # type: ignore[index]
                op.attrs["num_experts"],
            )
            for op in program
            if op.name == "expert_linear"
        ]
        expert_columns, top_k, num_experts = map(max, zip(*experts, (0, 0, 0), strict=True))
        return int(
            _native.workspace_bound(
                lowered.token_columns,
                lowered.row_columns,
                inputs,
                heads,
                kv_heads,
                head_dim,
                max_tokens,
                max_rows,
                max_context,
                self._pool.size,
                int(expert_columns),
                int(top_k),
                int(num_experts),
            )
        )

    def lower(
        self, program: Program, weights: Mapping[str, CpuWeight], kv: CpuCache | None
    ) -> CpuExecutable:
        """Bind a finished Program to its weights (by canonical name) and its cache.

        Errors: ValueError for a missing weight, a shape that differs, or a cache that does not fit;
        BackendUnavailable for ALiBi.
        """
        for op in program:
            if op.name == "attention" and op.attrs["alibi_slopes"]:
                raise BackendUnavailable(
                    f"attention of layer {op.attrs['layer']} has ALiBi slopes, which the CPU "
                    "backend does not compute; use device='cuda' or device='reference'"
                )
        check_program("CPU", program, weights, kv.spec if kv else None, OPERATIONS)
        form_of = self._forms(program, weights)
        lowered = lower(program, _input_of(weights, form_of))
        tables = [op.inputs[0] for op in program if op.name == "embedding"]
        vocab = min((program.handles[i].shape[0] for i in tables if i is not None), default=1)
        native = _native.StepProgram(
            self.isa,
            self._pool,
            None if kv is None else kv.native,
            int(vocab),
            lowered.token_columns,
            lowered.row_columns,
            lowered.result.slot,
        )
        cache = None
        if self._packed_cache is not None:
            path, key = self._packed_cache
            cache = PackedCache(path, key if self._compact else f"{key} bf16 in full")
        packer = Packer(self._pool, self._compact, cache)
        Binder(lowered, weights, native, packer, self._dtype, form_of).bind()
        if cache is not None:
            cache.save()
        return CpuExecutable(native)

    def sampler(self, vocab_size: int) -> CpuSampler:
        """The sampling program over logits of vocab_size."""
        return CpuSampler(vocab_size, self._pool)

    def available_memory(self) -> None:
        """The host's memory is meant."""

    def describe(self) -> dict[str, str]:
        """Facts for `doctor` and the step log."""
        quantised = (
            "int8 activations in groups of 32, two digits for groups with outliers"
            if self._int8
            else "activations as they are"
        )
        return {
            "backend": self.name,
            "kernels": f"{self.isa} ({_tables()})",
            "numerics": (
                f"fp32 inside each operation, results rounded to {self._dtype}; quantised weights "
                f"multiply {quantised}"
            ),
            "activations": self._dtype,
            "threads": _placed(self._pool),
        }


def _parts(weight: Weight) -> tuple[RawWeight, ...]:
    return (weight,) if isinstance(weight, RawWeight) else tuple(weight.parts)


def _head(program: Program, weights: Mapping[str, Weight]) -> Weight | None:
    """The weight that makes the logits, where it is of bf16 numbers."""
    by_output = {op.output: op for op in program}
    op = by_output[program.result.id] if program.result is not None else None
    while op is not None and op.name in ("softcap", "scale"):
        op = by_output.get(op.inputs[0])  # type: ignore[arg-type]
    if op is None or op.name != "linear" or op.inputs[1] is None:
        return None
    head = weights.get(program.handles[op.inputs[1]].name)
    if head is None or any(part.packed_format not in BFLOAT16 for part in _parts(head)):
        return None
    return head


def _input_of(
    weights: Mapping[str, Weight], form_of: Callable[[Weight], str]
) -> Callable[[str], tuple[str, bytes]]:
    """What linear layers that share their input must agree on: its form and its order."""

    def input_of(name: str) -> tuple[str, bytes]:
        order = _parts(weights[name])[0].columns
        return form_of(weights[name]), b"" if order is None else order.tobytes()

    return input_of


def _tables() -> str:
    """Which kernels run on this machine, and what it lacks for the others of this build."""
    names = [_called(name) for name in _native.kernel_tables()]
    absent = [f"{_called(name)} lacks {it}" for name, it in _native.absent_tables().items()]
    return "; ".join([f"this machine runs {', '.join(names)}", *absent])


def _placed(pool: _native.Pool) -> str:
    """How many threads there are and, where memory has several nodes, which node has which."""
    nodes = [node for node, _ in pool.places]
    if not nodes:
        return f"{pool.size}, not pinned (one memory node)" if pool.size > 1 else "1, not pinned"
    ranges = []
    for node in dict.fromkeys(nodes):
        first, count = nodes.index(node), nodes.count(node)
        ranges.append(f"{count} (from {first}) on node {node}")
    return f"{pool.size}, each pinned to a core: {', '.join(ranges)}"


def _called(name: str) -> str:
    return f"{name} [unverified on hardware]" if name in UNVERIFIED else name


class CpuExecutable:
    """A Program bound to its tiles and its cache."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._logits = CpuLogits(np.empty((0, 0), dtype=np.float32))  # the last step's

    @property
    def workspace_bytes(self) -> int:
        """Arenas, prepared activations and scratch taken so far."""
        return int(self._native.workspace_bytes)

    def run(self, step: StepInputs) -> CpuLogits:
        """Compute one step. Errors: ValueError for ids, slots or blocks that do not exist."""
        logits = self._native.run(
            step.token_ids,
            step.positions,
            step.query_start,
            step.seq_len,
            step.block_table,
            step.slot,
            step.logit_rows,
        )
        if logits is not None:
            self._logits = CpuLogits(logits)
        return self._logits
