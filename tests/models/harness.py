"""A recorded Program on the reference backend, for tests: pieces of sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engineroom.engine import models
from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.runtime.load import open_model, raw_weights
from engineroom.kernels.backend import KVSpec, StepInputs


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence in one step: its positions start .. start + len(tokens).

    `blocks` is the sequence's block table; give any order, to see that the table is what is read.
    """

    tokens: Sequence[int]
    blocks: Sequence[int]
    start: int = 0


def step_inputs(pieces: Sequence[Piece], block_size: int) -> StepInputs:
    """The packed step; every token wants logits, in the order of the pieces."""
    lengths = [len(p.tokens) for p in pieces]
    positions = [p.start + i for p in pieces for i in range(len(p.tokens))]
    slots = [
        p.blocks[i // block_size] * block_size + i % block_size
        for p in pieces
        for i in range(p.start, p.start + len(p.tokens))
    ]
    table = np.zeros((len(pieces), max(len(p.blocks) for p in pieces)), np.int32)
    for row, piece in zip(table, pieces, strict=True):
        row[: len(piece.blocks)] = piece.blocks

    def ints(values: Sequence[int]) -> np.ndarray:
        return np.asarray(values, np.int32)

    return StepInputs(
        token_ids=ints([t for p in pieces for t in p.tokens]),
        positions=ints(positions),
        query_start=ints([0, *np.cumsum(lengths)]),
        seq_len=ints([p.start + len(p.tokens) for p in pieces]),
        block_table=table,
        slot=ints(slots),
        logit_rows=ints(range(len(positions))),
    )


class Model:
    """A checkpoint, loaded as the engine does it, whose steps are run by hand."""

    def __init__(
        self,
        path: Path,
        *,
        max_position: int | None = None,
        block_size: int = 16,
        num_blocks: int = 48,
        dtype: str = "float32",
    ) -> None:
        from engineroom.kernels.reference import ReferenceBackend

        checkpoint = open_checkpoint(path)
        self.module, config = open_model(checkpoint)
        self.config = config.replace(max_position=max_position or config.max_position, dtype=dtype)
        self.program = models.record(self.module, self.config)
        self.block_size = block_size
        self.num_blocks = num_blocks
        backend = ReferenceBackend(activation_dtype=dtype, threads=1)
        raw = raw_weights(checkpoint, self.module, self.config)
        packed = {name: backend.pack(weight) for name, weight in raw.items()}
        c = self.config
        kv = backend.allocate_kv(
            KVSpec(c.num_layers, c.num_kv_heads, c.head_dim, block_size, dtype), num_blocks
        )
        self.executable = backend.lower(self.program, packed, kv)

    def step(self, *pieces: Piece) -> np.ndarray:
        """Logits [tokens of all pieces, V]; the cache keeps what earlier steps wrote."""
        return np.array(self.executable.run(step_inputs(pieces, self.block_size)).numpy())

    def prompt(self, tokens: Sequence[int], chunks: Sequence[int] | None = None) -> np.ndarray:
        """Logits [P, V] of one prompt, computed at once or in chunks of the given lengths."""
        needed = -(-len(tokens) // self.block_size)
        blocks = list(range(self.num_blocks))[::-1][:needed]  # descending: no table of identity
        rows, start = [], 0
        for length in chunks or [len(tokens)]:
            rows.append(self.step(Piece(tokens[start : start + length], blocks, start)))
            start += length
        assert start == len(tokens)
        return np.concatenate(rows)
