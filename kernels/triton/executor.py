"""Runs a lowered Program: uploads a step's metadata at once, then launches node after node."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from ..backend import StepInputs, check_program
from ..program import Program
from . import attention, embedding, experts, rope
from .binder import Binder, Step, Surroundings
from .cache import KVCache
from .cublas import Products
from .device import event
from .facts import metadata_size, mixtures, shape_of, table_of, tables_width
from .graphs import Graphs, Record, Work, buckets, cuda_record, padded
from .lower import OPERATIONS, Place, aligned, lower
from .tuned import UNTUNED, Tuned
from .upload import Upload
from .weights import TritonWeight


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
        products: Products | None = None,
    ) -> None:
        check_program("Triton", program, weights, kv.spec if kv else None, OPERATIONS)
        self._lowered = lower(program, dtype.itemsize)
        self._kv = kv
        self._dtype = dtype
        self._device = device
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
        same = kv is not None and kv.serves(dtype)
        product = str(dtype).removeprefix("torch.") if same else "float32"
        layers = [op for op in program if op.name == "attention"]
        self._shapes = {shape_of(op, product, kv) for op in layers}
        tables = [op.inputs[0] for op in program if op.name == "embedding"]
        self._vocab = min(
            (int(program.handles[i].shape[0]) for i in tables if i is not None), default=0
        )
        around = Surroundings(
            kv=kv,
            dtype=dtype,
            device=device,
            activations=activations,
            tuned=tuned,
            product=product,
            scratch=self._scratch,
            view=self.view,
            sums=self.sums,
            products=products,
            route=self.route,
        )
        binder = Binder(around, self._lowered, weights)
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
        self._limits = {
            "tokens": max_tokens,
            "logit rows": max_rows,
            "tokens of a sequence": max_context,
            "sequences": max_rows,
        }
        self._make_room({False: max_tokens, True: max_rows})
        for shape in self._shapes:
            self._scratch.parts(shape, attention.scratch_pairs(max_context))
        tables, block_size = tables_width(self._lowered.program), self._block_size
        limits = (max_tokens, max_rows, max_context, block_size)
        self._upload.reserve(metadata_size(tables, len(self._shapes), *limits))
        record = record or (cuda_record if self._device.type == "cuda" else None)
        if record is None:
            return
        width = -(-max_context // block_size)
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

    def _launch(self, bound: Step) -> None:
        for launch in self._launches:
            launch(bound)

    def _fill_in(self, bound: Step, step: StepInputs) -> None:
        if step.sampled is not None:
            embedding.fill_in(bound.token_ids, step.sampled)

    @property
    def _block_size(self) -> int:
        return 1 if self._kv is None else self._kv.spec.block_size

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
                size = aligned(count) * self._row_bytes(per_row)
                self._memory[per_row] = torch.empty(0, dtype=torch.uint8, device=self._device)
                self._memory[per_row] = torch.empty(size, dtype=torch.uint8, device=self._device)
                grown = True
        if grown or counts != self._rows:
            self._views.clear()
            self._rows = dict(counts)
        most = aligned(max(counts.values()))
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

    def _bind(self, upload: Upload, step: StepInputs, last: np.ndarray, work: Work) -> Step:
        *rest, blocks = upload(self._arrays(step, last, work))
        there = iter(rest)
        bound = Step()
        bound.token_ids, bound.logit_rows, bound.slot = next(there), next(there), next(there)
        position = next(there)
        bound.tables = {key: next(there) for key in self._rotations}
        for shape in self._shapes:
            wide, narrow, split, pairs = (next(there) for _ in range(4))
            bound.work[shape] = attention.DevicePlan(wide, narrow, split, pairs, position, blocks)
        return bound

    def _check(self, step: StepInputs) -> None:
        longest, sequences = int(step.seq_len.max(initial=0)), len(step.seq_len)
        sizes = (len(step.token_ids), len(step.logit_rows), longest, sequences)
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
