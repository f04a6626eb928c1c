"""Helpers of the kernel tests: one-op programs, packed steps over paged sequences, raw weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference backend needs torch")

from engineroom.kernels import ops  # noqa: E402
from engineroom.kernels.backend import KVSpec, StepInputs  # noqa: E402
from engineroom.kernels.program import Handle, Program  # noqa: E402
from engineroom.kernels.reference import ReferenceBackend  # noqa: E402
from engineroom.kernels.weights import (  # noqa: E402
    BF16,
    F16,
    F32,
    FP8,
    FP8_128,
    MXFP4,
    NVFP4,
    Format,
    RawWeight,
    WeightGroup,
)
from engineroom.quant.gguf import row_dtype  # noqa: E402
from engineroom.quant.integers import quantise_int4, quantise_int8  # noqa: E402

ROWS = 96  # of the operand tables that `one_op` reads
DTYPES = ("float32", "bfloat16", "float16")


def raw(values: np.ndarray, fmt: Format = F32, name: str = "w") -> RawWeight:
    """A float weight in the given format; bf16 by cutting the lower half off."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if fmt is F16:
        data = values.astype(np.float16)
    elif fmt is BF16:
        data = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = values
    return RawWeight(name, fmt, values.shape, {"data": data.reshape(-1).view(np.uint8)})


def random_rows(rng: np.random.Generator, fmt: Format, rows: int, columns: int) -> np.ndarray:
    """Bytes of random rows whose scales are finite; of formats with headers, normal values'."""
    if fmt in (FP8, FP8_128):
        made = np.zeros(rows, row_dtype(fmt, columns))
        scales = made if fmt.header else made["blocks"]
        scales["scale"] = rng.standard_normal(scales["scale"].shape)
        values = rng.integers(0, 256, made["blocks"]["values"].shape, np.uint8)
        made["blocks"]["values"] = np.where((values & 0x7F) == 0x7F, 0, values)  # which are NaN
        return made.view(np.uint8)
    if fmt is MXFP4:
        blocks = random_blocks(rng, fmt, rows * columns // fmt.block_elements)
        blocks.reshape(-1, fmt.block_bytes)[:, 0] = rng.integers(120, 130, blocks.size // 17)
        return blocks
    if fmt is NVFP4:
        made = np.zeros(rows, row_dtype(fmt, columns))
        made["blocks"] = (
            random_blocks(rng, fmt, rows * columns // fmt.block_elements)
            .view(made["blocks"].dtype)
            .reshape(made["blocks"].shape)
        )
        made["factor"], made["divisor"] = rng.uniform(0.5, 2, (2, rows, 1))
        return made.view(np.uint8)
    if fmt.header:
        quantise = {"INT8": quantise_int8, "INT4": quantise_int4}[fmt.name]
        return np.frombuffer(quantise(rng.standard_normal((rows, columns), np.float32)), np.uint8)
    return random_blocks(rng, fmt, rows * columns // fmt.block_elements)


def random_blocks(rng: np.random.Generator, fmt: Format, blocks: int) -> np.ndarray:
    """Bytes of random blocks whose half-precision fields are finite."""
    columns = []
    for _, dtype, count in fmt.layout:
        if dtype == "f2":
            part = rng.standard_normal((blocks, count)).astype(np.float16).view(np.uint8)
        elif dtype == "f4":
            part = rng.standard_normal((blocks, count)).astype(np.float32).view(np.uint8)
        elif dtype == "bf16":
            wide = rng.standard_normal((blocks, count)).astype(np.float32)
            part = (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            size = {"u1": 1, "i1": 1, "u4": 4}[dtype] * count
            part = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
        columns.append(part)
    return np.concatenate(columns, axis=1).reshape(-1)


def one_op(build: Callable[..., Handle], **widths: int) -> Program:
    """A Program of what `build(program, step, **operands)` records, its rows selected at the end.

    Each operand is a table [ROWS, width] embedded at the token ids, so that a test feeds any rows
    through the public seam; the last select_rows makes the rounding of `build`'s result visible
    (a Program's own result stays fp32).
    """
    program = Program()
    step = ops.StepHandles.of(program)
    operands = {
        name: ops.embedding(program.weight(name, (ROWS, width)), step.token_ids)
        for name, width in widths.items()
    }
    return program.finish(ops.select_rows(build(program, step, **operands), step.logit_rows))


def run(
    program: Program,
    weights: Mapping[str, np.ndarray | RawWeight | WeightGroup],
    step: StepInputs,
    *,
    dtype: str = "float32",
    threads: int = 1,
    kv: KVSpec | None = None,
) -> np.ndarray:
    """Pack, lower and run once on the reference backend; returns the result, fp32."""
    backend = ReferenceBackend(activation_dtype=dtype, threads=threads)
    packed = {
        name: backend.pack(raw(w, name=name) if isinstance(w, np.ndarray) else w)
        for name, w in weights.items()
    }
    cache = backend.allocate_kv(kv, 64) if kv is not None else None
    return backend.lower(program, packed, cache).run(step).numpy()


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as the activation dtype holds it, widened to float64."""
    t = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return t.to(getattr(torch, dtype)).double().numpy()


def assert_close(got: np.ndarray, want: np.ndarray, dtype: str, fp32_error: float = 2e-6) -> None:
    """`fp32_error` (of the largest value) is for the fp32 arithmetic, and half a unit in the last
    place of `dtype` for the one rounding."""
    half_ulp = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-12}[dtype]
    bound = fp32_error * np.abs(want).max() + 2 * half_ulp * np.abs(want) + 1e-7
    worst = np.abs(got - want) - bound
    assert (worst <= 0).all(), f"{worst.max()} beyond the tolerance at {np.argmax(worst)}"


@dataclass
class Paged:
    """Sequences with scattered blocks of one pool; builds the packed steps that extend them."""

    block_size: int
    num_blocks: int
    rng: np.random.Generator
    tables: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = self.rng.permutation(self.num_blocks).tolist()

    def add(self) -> int:
        self.tables.append([])
        self.lengths.append(0)
        return len(self.tables) - 1

    def step(
        self,
        chunks: Mapping[int, Sequence[int]],
        *,
        padding: int = 0,
        logit_rows: Sequence[int] | None = None,
    ) -> StepInputs:
        """Append chunks[s] (token ids) to sequence s; `padding` rows of slot -1 at the end."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        start = [0]
        for s, tokens in chunks.items():
            for token in tokens:
                at = self.lengths[s]
                if at % self.block_size == 0:
                    self.tables[s].append(self._free.pop())
                ids.append(token)
                positions.append(at)
                slots.append(
                    self.tables[s][at // self.block_size] * self.block_size + at % self.block_size
                )
                self.lengths[s] += 1
            start.append(len(ids))
        widest = max(len(self.tables[s]) for s in chunks)
        table = np.zeros((len(chunks), widest), dtype=np.int32)
        for row, s in enumerate(chunks):
            table[row, : len(self.tables[s])] = self.tables[s]

        def i32(x: Sequence[int]) -> np.ndarray:
            return np.array(x, dtype=np.int32)

        rows = range(len(ids)) if logit_rows is None else logit_rows
        return StepInputs(
            token_ids=i32([*ids, *[0] * padding]),
            positions=i32([*positions, *[0] * padding]),
            query_start=i32(start),
            seq_len=i32([self.lengths[s] for s in chunks]),
            block_table=table,
            slot=i32([*slots, *[-1] * padding]),
            logit_rows=i32(list(rows)),
        )


def plain_step(num_tokens: int, positions: Sequence[int] | None = None) -> StepInputs:
    """Tokens 0 .. T-1 of one sequence, every row wanted."""
    at = np.arange(num_tokens, dtype=np.int32)
    return StepInputs(
        token_ids=at.copy(),
        positions=at if positions is None else np.array(positions, dtype=np.int32),
        query_start=np.array([0, num_tokens], dtype=np.int32),
        seq_len=np.array([num_tokens], dtype=np.int32),
        block_table=np.zeros((1, 1), dtype=np.int32),
        slot=at.copy(),
        logit_rows=at.copy(),
    )
