"""Decoding steps recorded once and replayed: what would be hundreds of launches is then one.

A step in which every sequence has one token and wants its logits is padded to a bucket: a number of
rows, and of pairs of attention (attention.plan), which the grids of its launches follow from. All
else that changes from step to step lies in device memory, in places that a bucket fixes: token ids,
slots, positions, rotations, lists of items and pairs, and the block tables, one row behind the
other at the end. Padding rows have slot -1 and no item: they store nothing in the cache, and their
logits are not part of the answer. No bit of the others depends on the bucket (law 2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..backend import StepInputs
from . import attention
from .lower import Lowered

MOST_ROWS = 512  # of a recorded step; a larger one keeps the card busy while it is launched
NODE_BYTES = 8192  # of one recorded launch, for the memory plan: an upper bound, not measured
_PAIRS = 64  # the first number of pairs; the next ones are eight times the one before

Work = dict[attention.Shape, attention.Plan]
# Records what the argument launches, having run it before, and returns what replays it.
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Bucket(NamedTuple):
    """What the grids of a recorded step follow from."""

    rows: int  # tokens, sequences and logit rows
    pairs: int  # of each attention.Shape


def row_counts(most: int) -> list[int]:
    """1, 2, 4, 8, 12, 16, 24, 32, 48 and so on: a step is padded by less than half."""
    counts = [1, 2, 4]
    while counts[-1] < most:
        power = 1 << (counts[-1].bit_length() - 1)
        counts.append(power * 3 // 2 if counts[-1] == power > 4 else power * 2)
    return sorted({min(count, most) for count in counts})


def buckets(
    shapes: Collection[attention.Shape], max_tokens: int, max_rows: int, max_context: int
) -> Iterator[Bucket]:
    """The buckets of an engine whose steps keep within these limits, smallest first."""
    before = 0
    for rows in row_counts(min(max_tokens, max_rows, MOST_ROWS)):
        most = max(
            (attention.most_pairs(shape, before + 1, rows, max_context) for shape in shapes),
            default=0,
        )
        yield Bucket(rows, 0)
        pairs = _PAIRS
        while pairs < most:
            yield Bucket(rows, pairs)
            pairs *= 8
        if most:
            yield Bucket(rows, most)
        before = rows


def decodes(step: StepInputs) -> bool:
    """Whether every sequence has one token and wants its logits."""
    count = np.arange(len(step.seq_len) + 1)
    return np.array_equal(step.query_start, count) and np.array_equal(step.logit_rows, count[:-1])


def padded(
    step: StepInputs, last: np.ndarray, work: Work, bucket: Bucket
) -> tuple[StepInputs, np.ndarray, Work]:
    """A step that decodes, its positions (-1 for padding) and its work, in the bucket's sizes."""
    spare = bucket.rows - len(step.token_ids)

    def pad(x: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate([x, np.full(spare, value, dtype=np.int32)])

    whole = replace(
        step,
        token_ids=pad(step.token_ids, 0),
        positions=pad(step.positions, 0),
        slot=pad(step.slot, -1),
        logit_rows=np.arange(bucket.rows, dtype=np.int32),
        block_table=step.block_table.ravel(),
    )
    width = step.block_table.shape[1]
    return whole, pad(last, -1), {s: p.padded(*bucket, width) for s, p in work.items()}


def launches(lowered: Lowered) -> int:
    """Launches of a step at most: three of attention, two of a linear layer, two more where its
    experts are sorted."""
    most = {"attention": 3, "expert_linear": 2}
    return sum(
        most.get(node.name, 0) + (node.name != "attention") * 2 * len(node.ops)
        for node in lowered.nodes
    )


class Graphs:
    """Recorded steps by bucket."""

    def __init__(self, replays: Mapping[Bucket, Callable[[], None]]) -> None:
        self._replays = dict(replays)
        self._order = sorted(self._replays)

    def bucket(self, step: StepInputs, work: Work) -> Bucket | None:
        """The smallest that the step fits, if any."""
        if not decodes(step):
            return None
        pairs = max((len(plan.pairs) for plan in work.values()), default=0)
        at = bisect_left(self._order, (len(step.token_ids), pairs))
        rows = self._order[at].rows if at < len(self._order) else 0
        return next((b for b in self._order[at:] if b.rows == rows and b.pairs >= pairs), None)

    def replay(self, bucket: Bucket) -> None:
        """Launch it; what it reads has been uploaded before."""
        self._replays[bucket]()


def cuda_record(launch: Callable[[], None]) -> Callable[[], None]:
    """Record with CUDA's (or HIP's) graphs."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()  # kernels are compiled and loaded, neither of which may happen in a recording
        graph.capture_begin(capture_error_mode="thread_local")
        launch()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
