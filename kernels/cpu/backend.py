"""The native CPU backend: packs weights into tiles, holds the cache, runs a step in one call."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..backend import DTYPE_BYTES, BackendUnavailable, KVSpec, StepInputs, check_program
from ..program import Op, Program
from ..weights import BF16, FP8, FP8_128, NF4, RawWeight, WeightGroup
from . import _native
from .lower import OPERATIONS, Lowered, Node, lower
from .packed_cache import PackedCache, mapping_of
from .quantise import as_packed
from .sampler import CpuLogits, CpuSampler

ACTIVATIONS = ("auto", "int8", "float32")
BFLOAT16 = (BF16, FP8, FP8_128)  # whose elements are bfloat16 numbers, before any scale
UNVERIFIED = ("amx",)  # kernels that were proved over a model of the instructions only


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
        """Memory that the weights take once lowered: tiles, and tables that rows are read of.

        bf16 tiles count in full here, before a weight is read; packed they take 12 bits an element
        of a trained weight's 16 (`compact` of _native.pack), but not for AMX.
        """
        total = 0
        uses, mixtures = _uses(program), _mixtures(program)
        for name, weight in weights.items():
            parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
            if len(weight.shape) == 1:
                total += 4 * weight.shape[0]
                continue
            if "linear" in uses.get(name, ()):
                total += sum(_native.packed_bytes(p.packed_format.name, *p.shape) for p in parts)
            if name in mixtures:
                each = _by_expert(CpuWeight(parts, weight.shape), mixtures[name]).parts
                total += sum(_native.packed_bytes(p.packed_format.name, *p.shape) for p in each)
            if "embedding" in uses.get(name, ()):
                total += sum(p.nbytes for p in parts if p.is_as_stored)
        return total

    def packing_notes(self, weights: Mapping[str, RawWeight | WeightGroup]) -> tuple[str, ...]:
        """What int8 activations cost NF4, whose table is no table of integers."""
        parts = [
            part
            for weight in weights.values()
            for part in (weight.parts if isinstance(weight, WeightGroup) else (weight,))
        ]
        count = sum(part.packed_format is NF4 for part in parts) if self._int8 else 0
        return (
            (
                f"{count} NF4 weights are multiplied with their table rounded to 8 bits: a value "
                "moves by at most 1 part in 353 of its block's largest (activations='float32' "
                "takes the table as it is)",
            )
            if count
            else ()
        )

    def input_form(self, weight: RawWeight | WeightGroup | CpuWeight) -> str:
        """How a linear layer's input is made ready for this weight: int8, bfloat16 or float32."""
        parts = (weight,) if isinstance(weight, RawWeight) else weight.parts
        formats = [p.packed_format for p in parts]
        if self._int8 and not any(f.is_float or f in BFLOAT16 for f in formats):
            return "int8"
        if self._dtype == "bfloat16" and all(f in BFLOAT16 for f in formats):
            return "bfloat16"
        return "float32"

    def _input(self, weight: CpuWeight) -> tuple[str, bytes]:
        """What linear layers that share their input must agree on: its form and its order."""
        order = weight.parts[0].columns
        return self.input_form(weight), b"" if order is None else order.tobytes()

    # ----------------------------------------------------------------------------------- cache

    def allocate_kv(self, spec: KVSpec, num_blocks: int) -> CpuCache:
        """A zeroed cache of num_blocks; pages are taken as they are written.

        Errors: BackendUnavailable for an fp8 cache.
        """
        if spec.dtype == "fp8":
            raise BackendUnavailable(
                "kv_cache_dtype='fp8': the CPU backend has no fp8 KV cache; use 'int8', which "
                f"takes the same {spec.bytes_per_token:,} bytes a token and is more accurate, or "
                "device='cuda'"
            )
        native = _native.KVCache(
            spec.dtype,
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
        """Upper bound of the arenas, prepared activations and scratch of such a step, whatever
        weights and cache."""
        lowered = lower(program, lambda name: 0)
        widest = max((h.shape[1] for h in program.weights.values() if len(h.shape) == 2), default=0)
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
                int(widest),
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
        BackendUnavailable for ALiBi or attention sinks.
        """
        for op in program:
            if op.name == "attention" and (op.attrs["alibi_slopes"] or op.inputs[2] is not None):
                raise BackendUnavailable(
                    f"attention of layer {op.attrs['layer']} has ALiBi slopes or sinks, which the "
                    "CPU backend does not compute; use device='cuda' or device='reference'"
                )
        check_program("CPU", program, weights, kv.spec if kv else None, OPERATIONS)
        lowered = lower(program, lambda name: self._input(weights[name]))
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
        _Binder(self, lowered, weights, native, cache).bind()
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

    @property
    def workspace_bytes(self) -> int:
        """Arenas, prepared activations and scratch taken so far."""
        return int(self._native.workspace_bytes)

    def run(self, step: StepInputs) -> CpuLogits:
        """Compute one step. Errors: ValueError for ids, slots or blocks that do not exist."""
        return CpuLogits(
            self._native.run(
                step.token_ids,
                step.positions,
                step.query_start,
                step.seq_len,
                step.block_table,
                step.slot,
                step.logit_rows,
            )
        )


class _Binder:
    """Turns the nodes of a Lowered into operations of a native StepProgram."""

    def __init__(
        self,
        backend: CpuBackend,
        lowered: Lowered,
        weights: Mapping[str, CpuWeight],
        native: Any,
        cache: PackedCache | None,
    ) -> None:
        self._backend = backend
        self._lowered = lowered
        self._program = lowered.program
        self._weights = dict(weights)
        for name, num_experts in _mixtures(lowered.program).items():
            self._weights[name] = _by_expert(weights[name], num_experts)
        self._native = native
        self._cache = cache
        self._dtype = backend._dtype
        self._fp32 = lowered.program.fp32_values()

    def bind(self) -> None:
        for node in self._lowered.nodes:
            getattr(self, f"_{node.name}", self._map)(node)

    def _weight(self, value: int | None) -> CpuWeight:
        assert value is not None
        return self._weights[self._program.handles[value].name]

    def _vector(self, value: int | None) -> np.ndarray:
        return np.concatenate([_values(part) for part in self._weight(value).parts])

    def _rounding(self, value: int) -> str:
        return "float32" if value in self._fp32 else self._dtype

    def _rotations(self, node: Node) -> None:
        assert node.rotations is not None and node.rope is not None
        attrs = node.rope.attrs
        self._native.rotations(
            node.barrier,
            node.rotations.slot,
            list(attrs["inv_freq"]),  # type: ignore[arg-type]
            attrs["attention_factor"],
        )

    def _embedding(self, node: Node) -> None:
        op = _op(node)
        table = self._weight(op.inputs[0])
        if table.parts[0].columns is not None:
            raise ValueError(f"table {table.name!r} has its columns in another order")
        parts: list[Any]
        if not all(part.is_as_stored for part in table.parts):
            # Made here, also for a head that shares it: its tiles are all there is of it.
            name = self._program.handles[op.inputs[0]].name  # type: ignore[index]
            self._pack([name], paired=False)
            parts = list(self._weights[name].tiles)
        else:
            parts = [(p.format.name, p.data.view(np.ndarray), p.shape[0]) for p in table.parts]
        out = node.places[op.output].slot
        self._native.embedding(node.barrier, out, parts, self._rounding(op.output))

    def _rms_norm(self, node: Node) -> None:
        op = _op(node)
        x, weight = op.inputs
        self._native.rms_norm(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            node.places[op.output].slot,
            self._vector(weight),
            op.attrs["eps"],
            op.attrs["offset"],
            self._rounding(op.output),
        )

    def _map(self, node: Node) -> None:
        """add, scale, softcap, silu_mul, gelu_tanh_mul."""
        op = _op(node)
        a, b = op.inputs[0], op.inputs[-1]
        parameter = op.attrs.get("factor", op.attrs.get("cap", 0.0))
        self._native.map(
            node.barrier,
            op.name,
            node.places[a].slot,  # type: ignore[index]
            node.places[b].slot,  # type: ignore[index]
            node.places[op.output].slot,
            parameter,
            self._rounding(op.output),
        )

    def _select_rows(self, node: Node) -> None:
        op = _op(node)
        x = node.places[op.inputs[0]].slot  # type: ignore[index]
        self._native.select_rows(node.barrier, x, node.places[op.output].slot)

    def _rope(self, node: Node) -> None:
        op = _op(node)
        assert node.rotations is not None
        self._native.rope(
            node.barrier,
            node.places[op.inputs[0]].slot,  # type: ignore[index]
            node.rotations.slot,
            node.places[op.output].slot,
            op.attrs["head_dim"],
            op.attrs["interleaved"],
            self._rounding(op.output),
        )

    def _kv_write(self, node: Node) -> None:
        op = _op(node)
        k, v = op.inputs
        self._native.kv_write(
            node.barrier,
            node.places[k].slot,  # type: ignore[index]
            node.places[v].slot,  # type: ignore[index]
            op.attrs["layer"],
        )

    def _attention(self, node: Node) -> None:
        op = _op(node)
        self._native.attention(
            node.barrier,
            node.places[op.inputs[0]].slot,  # type: ignore[index]
            node.places[op.output].slot,
            op.attrs["layer"],
            op.attrs["num_heads"],
            op.attrs["scale"],
            op.attrs["window"],
            op.attrs["softcap"],
            self._rounding(op.output),
        )

    def _linear(self, node: Node) -> None:
        step = node.step
        assert step is not None
        norm = step.norm
        x = norm.inputs[0] if norm is not None else step.main[0].inputs[0]
        form = self._backend.input_form(self._weight(step.main[0].inputs[1]))
        if step.after is None:
            outs = [node.places[op.output] for op in step.main]
            epilogue, residual = "store", None
        else:
            outs = [node.places[step.after.output]] * len(step.main)
            epilogue = "add" if step.residual is not None else step.after.name
            residual = None if step.residual is None else node.places[step.residual].slot
        paired = len(step.main) == 2 and step.after is not None  # gate and up, of equal rows
        names = [self._program.handles[op.inputs[1]].name for op in step.main]  # type: ignore[index]
        self._pack(names, paired)
        entries = []
        for op, out in zip(step.main, outs, strict=True):
            bias = None if op.inputs[2] is None else self._vector(op.inputs[2])
            entries.append(self._entries(op, bias, out.slot))
        flat = _in_order(entries, paired)
        self._native.linear(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            form,
            None if norm is None else self._vector(norm.inputs[1]),
            0.0 if norm is None else norm.attrs["eps"],
            0.0 if norm is None else norm.attrs["offset"],
            flat,
            epilogue,
            residual,
            self._dtype,
            self._rounding(step.outputs[0]),
            self._weight(step.main[0].inputs[1]).parts[0].columns,
        )

    def _top_experts(self, node: Node) -> None:
        op = _op(node)
        logits = node.places[op.inputs[0]].slot  # type: ignore[index]
        self._native.top_experts(node.barrier, logits, node.places[op.output].slot)

    def _expert_weights(self, node: Node) -> None:
        op = _op(node)
        logits, experts = (node.places[i].slot for i in op.inputs)  # type: ignore[index]
        self._native.expert_weights(
            node.barrier,
            logits,
            experts,
            node.places[op.output].slot,
            op.attrs["renormalise"],
            self._rounding(op.output),
        )

    def _expert_linear(self, node: Node) -> None:
        step = node.step
        assert step is not None
        x, _, experts = step.main[0].inputs
        names = [self._program.handles[op.inputs[1]].name for op in step.main]  # type: ignore[index]
        paired = step.after is not None
        self._pack(names, paired)
        self._native.expert_linear(
            node.barrier,
            node.places[x].slot,  # type: ignore[index]
            node.places[experts].slot,  # type: ignore[index]
            node.places[step.outputs[0]].slot,
            self._backend.input_form(self._weight(step.main[0].inputs[1])),
            _in_order([self._weights[name].tiles for name in names], paired),
            "store" if step.after is None else step.after.name,
            self._rounding(step.outputs[0]),
        )

    def _by_row(self, node: Node) -> None:
        """expert_sum, sigmoid_scale: an operand and a number or several for each of its rows."""
        op = _op(node)
        x, numbers = (node.places[i].slot for i in op.inputs)  # type: ignore[index]
        add = getattr(self._native, op.name)
        add(node.barrier, x, numbers, node.places[op.output].slot, self._rounding(op.output))

    _expert_sum = _sigmoid_scale = _by_row

    def _entries(
        self, op: Op, bias: np.ndarray | None, out: tuple[int, int, bool]
    ) -> list[tuple[Any, np.ndarray | None, tuple[int, int, bool], int]]:
        """(tiles, bias, result, first column) of each row range of one linear layer's weight."""
        name = self._program.handles[op.inputs[1]].name  # type: ignore[index]
        weight = self._weights[name]
        entries, at = [], 0
        for part, tiles in zip(weight.parts, weight.tiles, strict=True):
            stop = at + part.shape[0]
            entries.append((tiles, None if bias is None else bias[at:stop].copy(), out, at))
            at = stop
        return entries

    def _pack(self, names: Sequence[str], paired: bool) -> None:
        """Make the tiles of a linear layer's weights, of those that have none yet."""
        new = [name for name in dict.fromkeys(names) if not self._weights[name].tiles]
        paired = paired and len(new) == 2
        parts = _in_order([self._weights[name].parts for name in new], paired)

        def pack(parts: Sequence[RawWeight]) -> list[_native.PackedMatrix]:
            return self._packed(parts, paired)

        tiles = iter(pack(parts) if self._cache is None else self._cache.tiles(parts, pack))
        made = {id(part): next(tiles) for part in parts}
        for name in new:
            self._weights[name].tiles[:] = [made[id(part)] for part in self._weights[name].parts]

    def _packed(self, parts: Sequence[RawWeight], paired: bool) -> list[_native.PackedMatrix]:
        pool = self._backend._pool
        rows = [as_packed(part, pool.size) for part in parts]
        matrices = [(r.format.name, r.data.view(np.ndarray), r.shape[0], r.shape[1]) for r in rows]
        tiles = _native.pack_layer(pool, matrices, paired, self._backend._compact)
        for part in parts:
            for data in part.buffers.values():
                _release_pages(data.view(np.ndarray))
        return tiles


def _in_order(groups: Sequence[Sequence[_T]], paired: bool) -> list[_T]:
    """The parts of a layer's weights one after another or, of two, in pairs."""
    return [part for group in (zip(*groups, strict=True) if paired else groups) for part in group]


def _op(node: Node) -> Op:
    assert node.step is not None
    return node.step.main[0]


def _values(part: RawWeight) -> np.ndarray:
    out = np.empty(part.shape, np.float32)
    _native.dequantise(part.format.name, part.data.view(np.ndarray), out.reshape(-1))
    return out.reshape(-1)


def _uses(program: Program) -> dict[str, set[str]]:
    """Weight name -> the operations that read it."""
    uses: dict[str, set[str]] = {}
    for op in program:
        for i in op.inputs:
            if i is not None and program.handles[i].kind == "weight":
                uses.setdefault(program.handles[i].name, set()).add(op.name)
    return uses


def _mixtures(program: Program) -> dict[str, int]:
    """Weight name -> how many experts' rows it holds."""
    return {
        program.handles[op.inputs[1]].name: int(op.attrs["num_experts"])  # type: ignore[index,arg-type]
        for op in program
        if op.name == "expert_linear"
    }


def _by_expert(weight: CpuWeight, num_experts: int) -> CpuWeight:
    """The weight with one part an expert. Errors: ValueError for an expert of several formats."""
    groups = WeightGroup(weight.parts).split(num_experts)
    for e, group in enumerate(groups):
        if len(group.parts) > 1:
            raise ValueError(
                f"weight {weight.name!r}: expert {e} is {len(group.parts)} tensors or formats; "
                "the CPU backend takes one an expert"
            )
    return CpuWeight(tuple(group.parts[0] for group in groups), weight.shape, weight.tiles)


def _release_pages(data: np.ndarray) -> None:
    """Let go of the mapped pages that lie wholly within `data`; they are read again if need be."""
    mapping = mapping_of(data)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    mapped, start = mapping
    page = mmap.PAGESIZE
    begin = -(-start // page) * page
    end = (start + data.nbytes) // page * page
    if end > begin:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
