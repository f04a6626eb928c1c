"""Runs a lowered Program: uploads a step's metadata at once, then launches node after node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..backend import StepInputs, check_program
from ..program import Op, Program
from . import attention, elementwise, embedding, experts, linear, rms_norm, rope
from .cache import KVCache
from .device import event, loads_ahead
from .graphs import Graphs, Record, Work, buckets, cuda_record, padded
from .lower import ALIGN, OPERATIONS, Lowered, Node, Place, lower
from .quantised import Matrix, form, pack, vector
from .tuned import UNTUNED, Tuned
from .weights import TritonWeight

_Launch = Callable[["_Step"], None]
_ALIGNED = 32  # int32 of metadata: each array begins at a multiple of 128 bytes


class TritonLogits:
    """[R, V] fp32 logits in device memory; the next step overwrites them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._made = event(tensor.device)

    def numpy(self) -> np.ndarray:
        """[R, V] float32 copy on the host."""
        copy: np.ndarray = self.tensor.to("cpu", copy=True).numpy()
        return copy

    def wait(self) -> None:
        """Until the step that makes them is over; a step launched since may still be running."""
        if self._made is not None:
            self._made.synchronize()


class _Step:
    """What the launches of one step read: metadata in device memory."""

    def __init__(self) -> None:
        self.token_ids: Any = None
        self.logit_rows: Any = None
        self.slot: Any = None
        self.tables: dict[Any, torch.Tensor] = {}  # rope's key -> [T, 2, F]
        self.work: dict[attention.Shape, attention.DevicePlan] = {}


class Upload:
    """One copy of many small arrays to buffers that stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)
        self._copied: Any = event(device)

    @property
    def nbytes(self) -> int:
        return self._there.nbytes

    def size(self, arrays: list[np.ndarray]) -> int:
        """What `arrays` take, in elements."""
        return sum(-(-max(array.size, 1) // _ALIGNED) * _ALIGNED for array in arrays)

    def reserve(self, size: int) -> None:
        """Have room for so many elements: copies that fit lie where they lay before."""
        if size > self._host.numel():
            pinned = self._device.type == "cuda"
            self._host = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
            self._there = torch.empty(size, dtype=torch.int32, device=self._device)

    def __call__(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """Each array, of int32 or float32, as a tensor of its shape and dtype on the device."""
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += self.size([array])
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still read the host's buffer
        self.reserve(size)
        flat = self._host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            flat[start : start + array.size] = np.ascontiguousarray(array).view(np.int32).ravel()
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        out = []
        for array, start in zip(arrays, starts, strict=True):
            there = self._there[start : start + array.size]
            if array.dtype == np.float32:
                there = there.view(torch.float32)
            out.append(there.view(array.shape))
        return out


class TritonExecutable:
    """A Program bound to its weights in device memory and to its cache."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, TritonWeight],
        kv: KVCache | None,
        dtype: torch.dtype,
        device: torch.device,
        activations: str = "",
        tuned: Tuned = UNTUNED,
    ) -> None:
        check_program("Triton", program, weights, kv.spec if kv else None, OPERATIONS)
        self._lowered = lower(program, dtype.itemsize)
        self._kv = kv
        self._dtype = dtype
        self._device = device
        self._activations = activations  # of quantised weights; see quantised.pack
        self._tuned = tuned
        self._upload = Upload(device)
        self._recorded_upload = Upload(device)  # of the steps that were recorded
        self._graphs: Graphs | None = None
        self._limits: dict[str, int] = {}
        self._scratch = attention.Scratch(device)
        self._memory = {
            per_row: torch.empty(0, dtype=torch.uint8, device=device) for per_row in (False, True)
        }
        self._rows = {False: 0, True: 0}
        self._views: dict[int, torch.Tensor] = {}
        self._sums = torch.empty((0, 0), device=device)
        self._route = torch.empty(0, dtype=torch.int32, device=device)
        self._mixtures = mixtures(program)
        program = self._lowered.program
        ropes = [op for op in program if op.name == "rope"]
        self._rotations = {table_of(op): rope.Rotations(*table_of(op)) for op in ropes}
        # Queries and keys meet in the tensor cores where they have one 16-bit dtype, or codes that
        # it holds.
        same = kv is not None and (kv.data.dtype == dtype or kv.scales is not None)
        self.product = str(dtype).removeprefix("torch.") if same else "float32"
        layers = [op for op in program if op.name == "attention"]
        self._shapes = {shape_of(op, self.product) for op in layers}
        tables = [op.inputs[0] for op in program if op.name == "embedding"]
        self._vocab = min(
            (int(program.handles[i].shape[0]) for i in tables if i is not None), default=0
        )
        binder = _Binder(self, self._lowered, weights)
        self._launches = [launch for node in self._lowered.nodes for launch in binder.bind(node)]
        self._sums_width = binder.sums_width
        self._weights_bytes = binder.nbytes
        assert program.result is not None
        self._result = program.result.id

    def prepare(
        self, max_tokens: int, max_rows: int, max_context: int, record: Record | None = None
    ) -> None:
        """Take the memory of steps within these limits, and record the decoding ones where there is
        a card, or with `record`. What was recorded knows where things lie: no larger step is run.
        """
        record = record or (cuda_record if self._device.type == "cuda" else None)
        if record is None:
            return
        self._limits = {
            "tokens": max_tokens,
            "logit rows": max_rows,
            "tokens of a sequence": max_context,
        }
        self._make_room({False: max_tokens, True: max_rows})
        for shape in self._shapes:
            self._scratch.parts(shape, max(attention.MIN_PAIRS, -(-max_context // attention.SPLIT)))
        width = -(-max_context // self._kv.spec.block_size) if self._kv is not None else 1
        steps = {
            bucket: padded(*self._nothing(bucket.rows, width), bucket)
            for bucket in buckets(self._shapes, max_tokens, max_rows, max_context)
        }
        most = max(self._recorded_upload.size(self._arrays(*step)) for step in steps.values())
        self._recorded_upload.reserve(most)
        replays = {}
        for bucket, step in steps.items():
            bound = self._bind(self._recorded_upload, *step)
            self._make_room({False: bucket.rows, True: bucket.rows})
            replays[bucket] = record(partial(self._launch, bound))
        self._graphs = Graphs(replays)

    def _nothing(self, rows: int, table_width: int) -> tuple[StepInputs, np.ndarray, Work]:
        """A step of no tokens, with the block tables of `rows` sequences."""
        none = np.zeros(0, dtype=np.int32)
        table = np.zeros((rows, table_width), dtype=np.int32)
        start = np.zeros(1, dtype=np.int32)
        step = StepInputs(none, none, start, none, table, none, none)
        return step, none, {shape: attention.plan(step, shape, none) for shape in self._shapes}

    def run(self, step: StepInputs) -> TritonLogits:
        """Launch one step; its arguments' arrays are read before this returns.

        Errors: ValueError for ids, slots or blocks that do not exist.
        """
        self._check(step)
        last = np.where(step.slot >= 0, step.positions, -1).astype(np.int32)
        work = {shape: attention.plan(step, shape, last) for shape in self._shapes}
        bucket = self._graphs.bucket(step, work) if self._graphs is not None else None
        if bucket is not None:
            bound = self._bind(self._recorded_upload, *padded(step, last, work, bucket))
            self._fill_in(bound, step)
            self._graphs.replay(bucket)  # type: ignore[union-attr]
        else:
            self._make_room({False: len(step.token_ids), True: len(step.logit_rows)})
            bound = self._bind(self._upload, step, last, work)
            self._fill_in(bound, step)
            self._launch(bound)
        place = self._lowered.places[self._result]
        return TritonLogits(self._view(place, len(step.logit_rows)))

    def _launch(self, bound: _Step) -> None:
        for launch in self._launches:
            launch(bound)

    def _fill_in(self, bound: _Step, step: StepInputs) -> None:
        if step.sampled is not None:
            embedding.fill_in(bound.token_ids, step.sampled)

    @property
    def weights_bytes(self) -> int:
        """Device memory of the weights."""
        return self._weights_bytes

    @property
    def workspace_bytes(self) -> int:
        """Device memory of values, scratch and metadata taken so far."""
        tensors = sum(b.nbytes for b in [*self._memory.values(), self._sums, self._route])
        uploads = self._upload.nbytes + self._recorded_upload.nbytes
        return tensors + self._scratch.nbytes + uploads

    def view(self, value: int | None) -> torch.Tensor:
        """A value of this step, [rows, width]."""
        assert value is not None
        made = self._views.get(value)
        if made is None:
            place = self._lowered.places[value]
            made = self._views[value] = self._view(place, self._rows[place.per_logit_row])
        return made

    def sums(self) -> torch.Tensor:
        """Scratch of quantised layers' inputs: sums of groups, and themselves in 8 bits."""
        return self._sums

    def route(self, num_experts: int) -> experts.Route:
        """The pairs of the mixture of experts that is computed."""
        return experts.Route.of(self._route, num_experts)

    def _view(self, place: Place, rows: int) -> torch.Tensor:
        dtype = torch.float32 if place.fp32 else self._dtype
        room = self._room(place.per_logit_row)
        size = dtype.itemsize
        return torch.as_strided(
            self._memory[place.per_logit_row].view(dtype),
            (rows, place.width),
            (place.stride // size, 1),
            (place.column * room + place.offset) // size,
        )

    def _row_bytes(self, per_row: bool) -> int:
        return self._lowered.row_bytes if per_row else self._lowered.token_bytes

    def _room(self, per_row: bool) -> int:
        """Rows that the memory has room for."""
        return self._memory[per_row].numel() // max(1, self._row_bytes(per_row))

    def _make_room(self, counts: dict[bool, int]) -> None:
        grown = False
        for per_row, count in counts.items():
            if count > self._room(per_row) and self._row_bytes(per_row):
                size = -(-count // ALIGN) * ALIGN * self._row_bytes(per_row)
                self._memory[per_row] = torch.empty(0, dtype=torch.uint8, device=self._device)
                self._memory[per_row] = torch.empty(size, dtype=torch.uint8, device=self._device)
                grown = True
        if grown or counts != self._rows:
            self._views.clear()
            self._rows = dict(counts)
        most = max(counts.values())
        rows = most * max(1, self._mixtures.top_k)
        if self._sums_width and rows > self._sums.shape[0]:
            self._sums = torch.empty((rows, self._sums_width), device=self._device)
        size = self._mixtures.route_size(most)
        if size > self._route.numel():
            self._route = torch.empty(size, dtype=torch.int32, device=self._device)

    def _arrays(self, step: StepInputs, last: np.ndarray, work: Work) -> list[np.ndarray]:
        """What a step's launches read. The block tables are last: where the others lie follows from
        numbers of rows, items and pairs alone."""
        arrays = [step.token_ids, step.logit_rows, step.slot, last]
        arrays += [table.rows(step.positions) for table in self._rotations.values()]
        for shape in self._shapes:
            plan = work[shape]
            arrays += [plan.wide, plan.narrow, plan.split, plan.pairs]
        return [*arrays, np.ascontiguousarray(step.block_table, dtype=np.int32)]

    def _bind(self, upload: Upload, step: StepInputs, last: np.ndarray, work: Work) -> _Step:
        *rest, blocks = upload(self._arrays(step, last, work))
        there = iter(rest)
        bound = _Step()
        bound.token_ids, bound.logit_rows, bound.slot = next(there), next(there), next(there)
        position = next(there)
        bound.tables = {key: next(there) for key in self._rotations}
        for shape in self._shapes:
            wide, narrow, split, pairs = (next(there) for _ in range(4))
            bound.work[shape] = attention.DevicePlan(wide, narrow, split, pairs, position, blocks)
        return bound

    def _check(self, step: StepInputs) -> None:
        sizes = (len(step.token_ids), len(step.logit_rows), int(step.seq_len.max(initial=0)))
        for (what, most), size in zip(self._limits.items(), sizes, strict=False):
            if size > most:
                raise ValueError(f"a step of {size} {what}; it was prepared for {most}")
        ids = step.token_ids
        if step.sampled is not None:
            if ids.size and ids.min() < -len(step.sampled):
                raise ValueError(
                    f"token id {ids.min()} means row {-1 - ids.min()} of the step before, which "
                    f"sampled {len(step.sampled)}"
                )
            ids = np.maximum(ids, 0)
        if self._vocab and ids.size and not (ids.min() >= 0 and ids.max() < self._vocab):
            raise ValueError(
                f"token ids {ids.min()} .. {ids.max()} do not all lie in the vocabulary of "
                f"{self._vocab}"
            )
        rows = step.logit_rows
        if rows.size and not (rows.min() >= 0 and rows.max() < len(ids)):
            raise ValueError(
                f"logit rows {rows.min()} .. {rows.max()} do not all lie in a step of {len(ids)}"
            )
        if self._kv is None:
            return
        for name, values, end in (
            ("slots", step.slot, self._kv.num_blocks * self._kv.spec.block_size),
            ("blocks", step.block_table, self._kv.num_blocks),
        ):
            if values.size and not (values.min() >= -1 and values.max() < end):
                raise ValueError(
                    f"{name} {values.min()} .. {values.max()} do not all lie in a cache of {end}"
                )
        need = -(-int(step.seq_len.max(initial=0)) // self._kv.spec.block_size)
        if need > step.block_table.shape[1]:
            raise ValueError(
                f"a sequence of {step.seq_len.max()} tokens needs {need} blocks of "
                f"{self._kv.spec.block_size}; the block table has {step.block_table.shape[1]}"
            )


class _Binder:
    """Turns nodes into launches, packing weights on the way."""

    def __init__(
        self, owner: TritonExecutable, lowered: Lowered, weights: Mapping[str, TritonWeight]
    ) -> None:
        self._owner = owner
        self._program = lowered.program
        self._weights = weights
        self._matrices: dict[str, Matrix] = {}
        self.sums_width = 0  # of the weight that needs most
        self.nbytes = 0
        self._routed: int | None = None  # the choice of experts that was sorted last
        self._uses: dict[str, int] = {}
        for op in self._program:
            for i in op.inputs:
                if i is not None and self._program.handles[i].kind == "weight":
                    name = self._program.handles[i].name
                    self._uses[name] = self._uses.get(name, 0) + 1

    def bind(self, node: Node) -> list[_Launch]:
        return getattr(self, f"_{node.name}", self._map)(node)

    def _name(self, value: int | None) -> str:
        assert value is not None
        return self._program.handles[value].name

    def _matrix(self, value: int | None) -> Matrix:
        name = self._name(value)
        if name not in self._matrices:
            self._matrices[name] = self._pack([self._weights[name]])
        return self._matrices[name]

    def _pack(self, group: Sequence[TritonWeight]) -> Matrix:
        parts = [part for weight in group for part in weight.parts]
        names = tuple(part.name for part in parts)
        matrix = group[0].matrices.get(names)
        if matrix is None:
            matrix = pack(parts, self._owner._device, self._owner._activations)
            group[0].matrices[names] = matrix
        self.nbytes += matrix.nbytes
        self.sums_width = max(self.sums_width, linear.scratch_width(matrix))
        return matrix

    def _vector(self, value: int | None) -> torch.Tensor | None:
        if value is None:
            return None
        made = vector(self._weights[self._name(value)].parts, self._owner._device)
        self.nbytes += made.nbytes
        return made

    def _embedding(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        table = self._matrix(op.inputs[0])
        return [lambda step: embedding.embedding(table, step.token_ids, view(op.output))]

    def _select_rows(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        x = op.inputs[0]
        return [lambda step: embedding.select_rows(view(x), step.logit_rows, view(op.output))]

    def _rms_norm(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        x, eps, offset = op.inputs[0], float(op.attrs["eps"]), float(op.attrs["offset"])  # type: ignore[arg-type]
        weight = self._vector(op.inputs[1])
        assert weight is not None
        return [lambda step: rms_norm.launch(view(x), weight, view(op.output), eps, offset)]

    def _map(self, node: Node) -> list[_Launch]:
        """add, scale, softcap, sigmoid_scale, silu_mul, gelu_tanh_mul."""
        op, view = _op(node), self._owner.view
        a, b = op.inputs[0], op.inputs[-1]
        parameter = float(op.attrs.get("factor", op.attrs.get("cap", 0.0)))  # type: ignore[arg-type]
        return [
            lambda step: elementwise.launch(op.name, view(a), view(b), view(op.output), parameter)
        ]

    def _rope(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        x, key, head_dim = op.inputs[0], table_of(op), int(op.attrs["head_dim"])  # type: ignore[arg-type]
        interleaved = bool(op.attrs["interleaved"])

        def launch(step: _Step) -> None:
            rotation = rope.Rotation(step.tables[key], interleaved)
            rope.launch(head_dim, rotation, view(x), view(op.output))

        return [launch]

    def _kv_write(self, node: Node) -> list[_Launch]:
        of_q, of_k, op = node.ops
        assert op is not None
        view, cache, layer = self._owner.view, self._owner._kv, int(op.attrs["layer"])  # type: ignore[arg-type]
        k = op.inputs[0] if of_k is None else of_k.inputs[0]
        v, head_dim = op.inputs[1], int(op.attrs["head_dim"])  # type: ignore[arg-type]

        def launch(step: _Step) -> None:
            rotation = None
            if of_k is not None:
                table = step.tables[table_of(of_k)]
                rotation = rope.Rotation(table, bool(of_k.attrs["interleaved"]))
            rope.launch(
                head_dim,
                rotation,
                None if of_q is None else view(of_q.inputs[0]),
                None if of_q is None else view(of_q.output),
                (view(k), view(v)),
                rotate_k=of_k is not None,
                cache=cache,
                slot=step.slot,
                layer=layer,
            )

        return [launch]

    def _attention(self, node: Node) -> list[_Launch]:
        op, owner = _op(node), self._owner
        q, shape, cache = op.inputs[0], shape_of(op, owner.product), owner._kv
        assert cache is not None
        names = ("layer", "scale", "window", "softcap")
        attrs: dict[str, Any] = {name: op.attrs[name] for name in names}
        slopes: Any = op.attrs["alibi_slopes"]
        attrs["slopes"] = torch.tensor(slopes, device=owner._device) if slopes else None
        attrs["sinks"] = self._vector(op.inputs[2])

        def launch(step: _Step) -> None:
            work = step.work[shape]
            attention.launch(
                owner.view(q), owner.view(op.output), cache, work, owner._scratch, shape, **attrs
            )

        return [launch]

    def _linear(self, node: Node) -> list[_Launch]:
        ops = [op for op in node.ops if op is not None]
        view, x = self._owner.view, ops[0].inputs[0]
        if node.after is not None and node.residual is None:
            gate, up = ops
            return [
                self._layer(gate, x, gate.output),
                self._layer(up, x, node.after.output, node.after.name, gate.output),
            ]
        if node.after is not None:
            return [self._layer(ops[0], x, node.after.output, "add", node.residual)]
        weights = [self._weights[self._name(op.inputs[1])] for op in ops]
        parts = [part for weight in weights for part in weight.parts]
        alike = (
            len({form(part.packed_format) for part in parts}) == 1
            and len({op.inputs[2] is None for op in ops}) == 1
            and all(self._uses[self._name(op.inputs[1])] == 1 for op in ops)
            and len({op.output in self._program.fp32_values() for op in ops}) == 1
        )
        if len(ops) == 1 or not alike:
            return [self._layer(op, x, op.output) for op in ops]
        matrix = self._pack(weights)
        biases = [b for b in (self._vector(op.inputs[2]) for op in ops) if b is not None]
        bias = torch.cat(biases) if biases else None
        width = matrix.shape[0]

        def launch(step: _Step) -> None:
            first = view(ops[0].output)  # the others lie behind it
            out = first.as_strided((first.shape[0], width), first.stride())
            self._run(view(x), matrix, out, bias)

        return [launch]

    def _top_experts(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        return [lambda step: experts.top_experts(view(op.inputs[0]), view(op.output))]

    def _expert_weights(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        (logits, chosen), renormalise = op.inputs, bool(op.attrs["renormalise"])
        return [
            lambda step: experts.expert_weights(
                view(logits), view(chosen), view(op.output), renormalise
            )
        ]

    def _expert_sum(self, node: Node) -> list[_Launch]:
        op, view = _op(node), self._owner.view
        x, weights = op.inputs
        return [lambda step: experts.expert_sum(view(x), view(weights), view(op.output))]

    def _expert_linear(self, node: Node) -> list[_Launch]:
        op, owner = _op(node), self._owner
        chosen, num_experts = op.inputs[2], int(op.attrs["num_experts"])  # type: ignore[arg-type]
        launches: list[_Launch] = []
        if chosen != self._routed:
            self._routed = chosen
            launches.append(lambda step: experts.sort(owner.view(chosen), owner.route(num_experts)))
        if node.after is None:
            return [*launches, self._expert_layer(op, op.output)]
        gate, up = (layer for layer in node.ops if layer is not None)
        return [
            *launches,
            self._expert_layer(gate, gate.output),
            self._expert_layer(up, node.after.output, node.after.name, gate.output),
        ]

    def _expert_layer(self, op: Op, out: int, after: str = "", other: int | None = None) -> _Launch:
        owner, matrix, x = self._owner, self._matrix(op.inputs[1]), op.inputs[0]
        num_experts = int(op.attrs["num_experts"])  # type: ignore[arg-type]
        num_rows, K = matrix.shape[0] // num_experts, matrix.shape[1]

        def launch(step: _Step) -> None:
            rows = owner.view(x)
            experts.expert_linear(
                rows if rows.shape[1] == K else rows.view(-1, K),
                matrix,
                owner.route(num_experts),
                owner.view(out).view(-1, num_rows),
                round_to=owner._dtype,
                after=after,
                other=None if other is None else owner.view(other).view(-1, num_rows),
                scratch=owner.sums(),
            )

        return launch

    def _layer(
        self, op: Op, x: int | None, out: int, after: str = "", other: int | None = None
    ) -> _Launch:
        view, matrix, bias = (
            self._owner.view,
            self._matrix(op.inputs[1]),
            self._vector(op.inputs[2]),
        )

        def launch(step: _Step) -> None:
            beside = None if other is None else view(other)
            self._run(view(x), matrix, view(out), bias, after, beside)

        return launch

    def _run(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        after: str = "",
        other: torch.Tensor | None = None,
    ) -> None:
        owner = self._owner
        linear.launch(
            x,
            matrix,
            out,
            round_to=owner._dtype,
            bias=bias,
            after=after,
            other=other,
            scratch=owner.sums(),
            tuned=owner._tuned,
        )


def _op(node: Node) -> Op:
    op = node.ops[0]
    assert op is not None
    return op


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
