"""The sampling program on the device: logits stay there, token ids and asked logprobs come back.

Which launches a step takes follows from what its rows ask for: two where all are greedy, three
where some draw from the whole vocabulary, three more where some filter, and those of logprobs and
of changed logits. A row takes part in its own alone, and its answer is kernels/sampling.py's to the
bit, whatever rows stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import triton

from .. import sampling
from ..backend import Logits, SampleResult, SamplingInputs
from ..cpu.sampler import CpuLogits, CpuSampler
from . import sampling_draw, sampling_edits, sampling_filters, sampling_logprobs
from .executor import TritonLogits
from .numerics import OPTIONS, next_power_of_two
from .sampling_rows import CHUNK, FIELDS, SLOTS, Packed, scoring
from .upload import Upload

BLOCK = 2048  # tokens that a program of one row takes at a time
ROW_OPTIONS = OPTIONS | {"num_warps": 8}  # as exact as with 4: sums are of integers
_ALIGNED = 32  # int32 of an answer: each of its arrays begins at a multiple of 128 bytes
_ANSWER = 3 * 4  # bytes of a row: token, logprob, rank
_SMALL = 16 * 4 * _ALIGNED  # what alignment adds


@dataclass(frozen=True)
class Pending:
    """Rows that are being sampled.

    tokens: int32 [R] on the device, for what is launched next; the sampler's next launch overwrites
    them. result() waits for the device; it may be called once a later launch is under way.
    """

    tokens: torch.Tensor
    _answers: torch.Tensor  # on the host, pinned
    _starts: tuple[int, ...]
    _width: int
    _copied: Any  # the event behind the copy; None where the device is the host

    def result(self) -> SampleResult:
        """Tokens, logprobs, ranks and most likely tokens, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        count = len(self.tokens)
        flat, places = self._answers.numpy(), count * self._width
        sizes = (count, count, count, places, places)
        tokens, logprobs, ranks, top_ids, top_logprobs = (
            flat[start : start + size].copy()
            for start, size in zip(self._starts, sizes, strict=True)
        )
        return SampleResult(
            tokens=tokens,
            logprobs=logprobs.view(np.float32),
            ranks=ranks,
            top_ids=top_ids.reshape(count, self._width),
            top_logprobs=top_logprobs.view(np.float32).reshape(count, self._width),
        )


@dataclass(frozen=True)
class Sampled:
    """As Pending, of logits that were sampled on the host."""

    tokens: torch.Tensor
    _answer: SampleResult

    def result(self) -> SampleResult:
        return self._answer


class TritonSampler:
    """Implements kernels.backend.Sampler. Logits that a host-side processor has changed are on the
    host, and are sampled there, by `host`: to the same bits.

    Errors: ValueError for a vocabulary that the program does not take.
    """

    def __init__(self, vocab_size: int, device: torch.device, host: CpuSampler) -> None:
        sampling.check_vocab_size(vocab_size)
        self.vocab_size = vocab_size
        self._device = device
        self._host = host
        self._upload = Upload(device)
        self._chunks = triton.cdiv(vocab_size, CHUNK)
        self._memory: dict[str, torch.Tensor] = {}

    def run(self, logits: Logits, rows: SamplingInputs) -> SampleResult:
        """Tokens and logprobs of R rows; see SampleResult. Errors: as launch()."""
        return self.launch(logits, rows).result()

    def launch(self, logits: Logits, rows: SamplingInputs) -> Pending | Sampled:
        """Have R rows sampled, without waiting for logits that are still being computed.

        Errors: ValueError where the shapes of logits and rows disagree or an id or index lies
        outside what it points into.
        """
        if not isinstance(logits, TritonLogits):
            answer = self._host.run(logits, rows)
            return Sampled(torch.from_numpy(answer.tokens).to(self._device), answer)
        x = logits.tensor
        sampling.check_logits(x, self.vocab_size)
        sampling.check_rows(rows, *x.shape)
        return self._answer(x, rows)

    def from_numpy(self, logits: np.ndarray) -> CpuLogits:
        """Logits on the host, [R, V] float32, as this sampler takes them; no copy."""
        return self._host.from_numpy(logits)

    def log_softmax(self, logits: Logits) -> np.ndarray:
        """[R, V] float32 natural logprobs, bit for bit those of run(); NaN in rows that fail."""
        if not isinstance(logits, TritonLogits):
            return self._host.log_softmax(logits)
        x = logits.tensor
        sampling.check_logits(x, self.vocab_size)
        out = torch.empty(x.shape, dtype=torch.float32, device=self._device)
        if len(x):
            (table,) = self._upload([scoring(len(x))])
            launches = self._launches(x, table, x)
            launches.largest()
            launches.weigh()
            launches.log_softmax(out)
        copy: np.ndarray = out.cpu().numpy()
        return copy

    @property
    def workspace_bytes(self) -> int:
        """Device memory taken so far."""
        return sum(m.nbytes for m in self._memory.values()) + self._upload.nbytes

    def _take(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that stays, of at least so many elements; what it held is lost where it grows."""
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            self._memory.pop(name, None)
            memory = self._memory[name] = torch.empty(size, dtype=dtype, device=self._device)
        return memory

    def _launches(self, x: torch.Tensor, table: torch.Tensor, work: torch.Tensor) -> _Launches:
        found = self._take("found", len(x) * SLOTS.value * self._chunks, torch.int64)
        return _Launches(x, table, work, found, self._chunks)

    def _answer(self, x: torch.Tensor, rows: SamplingInputs) -> Pending:
        packed, vocab, count = Packed(rows), self.vocab_size, len(x)
        sizes = [count] * 3 + [count * packed.width] * 2
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes]).tolist()
        starts = (0, *ends[:-1])
        out = self._take("answers", ends[-1], torch.int32)[: ends[-1]]
        tokens, logprobs, ranks, top_ids, top_logprobs = (
            out[start : start + size] for start, size in zip(starts, sizes, strict=True)
        )
        if count:
            work = self._take("work", packed.edited * vocab, torch.float32)
            launches = self._launches(x, self._edit(x, rows, packed, work), work)
            launches.largest()
            if packed.drawn:
                launches.draw()
            if packed.filtered:
                ids = self._take("ids", packed.filtered * vocab, torch.int32)
                z = self._take("z", packed.filtered * vocab, torch.float32)
                launches.filter(ids, z, tokens, packed.spread)
            launches.finish(tokens, logprobs, ranks)
            if packed.scored:
                launches.weigh()
                tops = self._take("tops", count * self._chunks * packed.width, torch.int64)
                launches.logprobs(
                    tops, (tokens, logprobs, ranks, top_ids, top_logprobs), packed.width
                )
        cuda = self._device.type == "cuda"
        there = torch.empty(ends[-1], dtype=torch.int32, pin_memory=cuda)
        there.copy_(out, non_blocking=cuda)
        copied: Any = None
        if cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return Pending(tokens, there, starts, packed.width, copied)

    def _edit(
        self, x: torch.Tensor, rows: SamplingInputs, packed: Packed, work: torch.Tensor
    ) -> torch.Tensor:
        """Bring the step's rows to the device, and stages 1 to 3 about; returns the rows' table."""
        values = {"bias": rows.bias_values, "ban": rows.ban_ids, "history": rows.history_count}
        lists = [
            (name, getattr(rows, f"{name}_ids"), values[name])
            for name, entries in packed.entries.items()
            if entries
        ]
        arrays = [packed.table, rows.mask_table if packed.masked else np.zeros((1, 1), np.uint32)]
        table, mask, *parts = self._upload(arrays + [a for _, *pair in lists for a in pair])
        if packed.edited:
            there = {name: (parts[2 * i], parts[2 * i + 1]) for i, (name, _, _) in enumerate(lists)}
            sampling_edits.launch(x, packed, table, there, mask, work)
        return table


@dataclass(frozen=True)
class _Launches:
    """The kernels over rows x [R, V], their table, their changed copies and what is found."""

    x: torch.Tensor
    table: torch.Tensor
    work: torch.Tensor
    found: torch.Tensor
    chunks: int

    @property
    def _grid(self) -> tuple[int, int]:
        return len(self.x), self.chunks

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.x.stride(0), self.x.shape[1], self.chunks

    @property
    def _constants(self) -> dict[str, Any]:
        return {"CHUNK": CHUNK, "CHUNKS": next_power_of_two(self.chunks), **OPTIONS}

    @property
    def _row_constants(self) -> dict[str, Any]:
        return {"BLOCK": BLOCK, "CHUNKS": next_power_of_two(self.chunks), **ROW_OPTIONS}

    def largest(self) -> None:
        sampling_draw.largest_kernel[self._grid](
            self.x, self.table, self.work, self.found, *self._sizes, CHUNK=CHUNK, **OPTIONS
        )

    def draw(self) -> None:
        sampling_draw.draw_kernel[self._grid](
            self.x, self.table, self.work, self.found, *self._sizes, **self._constants
        )

    def filter(
        self, ids: torch.Tensor, z: torch.Tensor, tokens: torch.Tensor, spread: bool
    ) -> None:
        """Tokens of the rows that filter. ids, z: [filtered rows, V] each, flat; spread: some row
        asks for top-n-sigma."""
        operands = (self.x, self.table, self.work, self.found)
        count = (len(self.x),)
        if spread:
            sampling_filters.sigma_kernel[count](*operands, *self._sizes, **self._row_constants)
        sampling_filters.count_kernel[self._grid](*operands, *self._sizes, **self._constants)
        sampling_filters.list_kernel[self._grid](*operands, ids, z, *self._sizes, **self._constants)
        sampling_filters.filter_kernel[count](
            self.table, self.found, ids, z, tokens, *self._sizes[1:], **self._row_constants
        )

    def finish(self, tokens: torch.Tensor, logprobs: torch.Tensor, ranks: torch.Tensor) -> None:
        sampling_draw.finish_kernel[(len(self.x),)](
            self.table,
            self.found,
            tokens,
            logprobs,
            ranks,
            self.chunks,
            CHUNKS=next_power_of_two(self.chunks),
            **OPTIONS,
        )

    def weigh(self) -> None:
        sampling_logprobs.weigh_kernel[self._grid](
            self.x, self.table, self.found, *self._sizes, **self._constants
        )

    def logprobs(self, tops: torch.Tensor, answers: tuple[torch.Tensor, ...], width: int) -> None:
        """tops: [R, chunks, width], flat; answers: the parts of a SampleResult."""
        if width:
            sampling_logprobs.top_kernel[self._grid](
                self.x, self.table, tops, *self._sizes, width, CHUNK=CHUNK, **OPTIONS
            )
        sampling_logprobs.logprobs_kernel[(len(self.x),)](
            self.x,
            self.table,
            self.found,
            tops,
            *answers,
            *self._sizes,
            width,
            **self._row_constants,
        )

    def log_softmax(self, out: torch.Tensor) -> None:
        sampling_logprobs.log_softmax_kernel[self._grid](
            self.x, self.found, out, *self._sizes, **self._constants
        )


def workspace_bytes(rows: int, vocab_size: int) -> int:
    """Upper bound of the memory of a step of so many rows: what is found of each chunk, changed
    logits, ids and z of the tokens listed, parameters and masks. The lists that requests bring
    (history, biases, bans) and the logprobs that they ask for come on top."""
    found = 8 * int(SLOTS.value) * -(-vocab_size // CHUNK)
    of_row = found + 12 * vocab_size + 4 * int(FIELDS.value) + 4 * -(-vocab_size // 32)
    return rows * (of_row + _ANSWER) + _SMALL
