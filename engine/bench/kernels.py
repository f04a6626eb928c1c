"""`engineroom bench kernels`: each operation on the CPU beside what this machine allows at most.

An operation runs inside of a recorded program, as a model's step runs it; the same program without
it is timed too and subtracted. Linear layers go round copies that the caches cannot hold together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from ...kernels import ops
from ...kernels.backend import StepInputs
from ...kernels.cpu import _native
from ...kernels.cpu.backend import CpuBackend
from ...kernels.ops import Handle, StepHandles
from ...kernels.program import Program
from ...kernels.weights import BF16, F32, FORMATS, RawWeight
from .facts import facts
from .tables import Column, Report, Table, write
from .timing import Budget, Times, measure, wall

FORMATS_TIMED = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
TOKENS = (1, 8, 32, 512)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # K, N
_COLD = 96 << 20  # bytes of the copies of a layer, at least: above a last-level cache
_MOST_COPIES = 64
_COLUMNS = (
    Column("operation", "operation"),
    Column("format", "format"),
    Column("M", "M"),
    Column("K", "K"),
    Column("N", "N"),
    Column("warmup", "warm-up"),
    Column("repetitions", "reps"),
    Column("median_us", "median us", 1),
    Column("p99_us", "p99 us", 1),
    Column("gbs", "GB/s", 1),
    Column("gops", "GOP/s", 1),
    Column("share", "% of limit", 1),
    Column("limit", "limit"),
)


@dataclass(frozen=True)
class Limits:
    """Of this machine at this moment; operations/s are 0 where the processor has no such
    instruction that the probe knows."""

    read: float  # bytes/s
    int8: float
    bf16: float
    f32: float

    @classmethod
    def measured(cls, threads: int, num_bytes: int = 192 << 20) -> Limits:
        pool = _native.Pool(threads)
        dots = {kind: _native.probe_dots(pool, kind) for kind in ("int8", "bf16", "f32")}
        return cls(read=_native.probe_read(pool, num_bytes), **dots)

    def table(self) -> Table:
        columns = (Column("limit", "limit"), Column("value", "measured", 1), Column("unit", "unit"))
        rows: list[Mapping[str, Any]] = [
            {"limit": "read", "value": self.read / 1e9, "unit": "GB/s"}
        ]
        for kind in ("int8", "bf16", "f32"):
            value = getattr(self, kind)
            rows.append({"limit": kind, "value": value / 1e9 if value else None, "unit": "GOP/s"})
        return Table("Limits of this machine", columns, rows)


@dataclass(frozen=True)
class Work:
    """A row: `build` records the operation `count` times, `least` is what bounds it."""

    operation: str
    format: str
    shape: tuple[int, int | None, int | None]  # M, K, N
    num_bytes: int
    operations: int
    dots: str  # a field of Limits
    times: Callable[[float], Times]


def works(
    threads: int, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], formats: Sequence[str]
) -> Iterator[Work]:
    """Every row: linear layers of each format, shape and M, then norms and gates."""
    backend = CpuBackend(activation_dtype="float32", threads=threads)
    for name in formats:
        for width, out_width in shapes:
            if width % FORMATS[name].block_elements:
                continue
            for count in tokens:
                yield _linear(backend, name, width, out_width, count)
    for width in dict.fromkeys(width for width, _ in shapes):
        for count in tokens:
            yield _row_op(backend, "rms_norm", width, count)
            yield _row_op(backend, "silu_mul", width, count)


def random_weight(name: str, rows: int, columns: int) -> RawWeight:
    """Small random values of a float format; of a quantised one random blocks, scales 1/1024."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    blocks = rows * columns // fmt.block_elements
    parts = []
    for _, kind, count in fmt.layout:
        size = count * (2 if kind == "bf16" else np.dtype(kind).itemsize)
        if kind in ("f2", "f4"):
            part = np.full((blocks, count), 2.0**-10, kind).view(np.uint8)
        elif kind == "bf16":
            values = rng.standard_normal((blocks, count), np.float32)
            part = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            part = rng.integers(0, 256, (blocks, size), np.uint8)
        parts.append(part)
    return RawWeight(name, fmt, (rows, columns), {"data": np.concatenate(parts, 1).reshape(-1)})


def _floats(name: str, *shape: int) -> RawWeight:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return RawWeight(name, F32, shape, {"data": values.reshape(-1).view(np.uint8)})


def _linear(backend: CpuBackend, name: str, width: int, out_width: int, tokens: int) -> Work:
    raw = random_weight(name, out_width, width)
    copies = max(1, min(_MOST_COPIES, -(-_COLD // raw.nbytes)))

    def record(program: Program, x: Handle, i: int) -> None:
        ops.linear(x, program.weight(f"w{i}", (out_width, width)))

    weights = {f"w{i}": raw for i in range(copies)}
    num_bytes = raw.nbytes + 4 * tokens * (width + out_width)
    return Work(
        "linear",
        name,
        (tokens, width, out_width),
        num_bytes,
        2 * tokens * width * out_width,
        "bf16" if FORMATS[name] is BF16 else "int8",
        lambda allowance: _timed(backend, width, tokens, copies, record, weights, allowance),
    )


def _row_op(backend: CpuBackend, name: str, width: int, tokens: int) -> Work:
    repeats = 8

    def record(program: Program, x: Handle, i: int) -> None:
        if name == "rms_norm":
            ops.rms_norm(x, program.weight(f"n{i}", (width,)), eps=1e-5)
        else:
            ops.silu_mul(x, x)

    norms = {f"n{i}": _floats(f"n{i}", width) for i in range(repeats)}
    weights = norms if name == "rms_norm" else {}
    return Work(
        name,
        "F32",
        (tokens, width, None),
        8 * tokens * width,
        0,
        "f32",
        lambda allowance: _timed(backend, width, tokens, repeats, record, weights, allowance),
    )


def _timed(
    backend: CpuBackend,
    width: int,
    tokens: int,
    count: int,
    record: Callable[[Program, Handle, int], None],
    weights: Mapping[str, RawWeight],
    allowance: float,
) -> Times:
    """Of one of `count` operations that stand in a program beside an embedding each."""
    step = _step(tokens)

    def executable(with_it: bool) -> Callable[[], object]:
        program = Program()
        handles = StepHandles.of(program)
        table = program.weight("table", (tokens, width))
        for i in range(count):
            x = ops.embedding(table, handles.token_ids)
            if with_it:
                record(program, x, i)
        program.finish(ops.select_rows(x, handles.logit_rows))
        given = {"table": _floats("table", tokens, width), **(weights if with_it else {})}
        packed = {name: backend.pack(weight) for name, weight in given.items()}
        made = backend.lower(program, packed, None)
        return lambda: made.run(step)

    without = measure(wall(executable(False)), allowance / 4)
    return measure(wall(executable(True)), allowance).less(without.median).over(count)


def _step(tokens: int) -> StepInputs:
    at = np.arange(tokens, dtype=np.int32)
    return StepInputs(
        token_ids=at,
        positions=at,
        query_start=np.array([0, tokens], np.int32),
        seq_len=np.array([tokens], np.int32),
        block_table=np.zeros((1, 1), np.int32),
        slot=at,
        logit_rows=at,  # all: rows that nobody wants would be left out of the program
    )


def figures(work: Work, times: Times, limits: Limits) -> dict[str, Any]:
    """A row's cells. The limit is whichever of reading and multiplying takes longer at its peak."""
    m, k, n = work.shape
    seconds = max(times.median, 1e-12)
    peak = getattr(limits, work.dots)
    least = {"read": work.num_bytes / limits.read}
    if work.operations and peak:
        least[work.dots] = work.operations / peak
    limit = max(least, key=lambda name: least[name])
    return {
        "operation": work.operation,
        "format": work.format,
        "M": m,
        "K": k,
        "N": n,
        "warmup": times.warmup,
        "repetitions": len(times.seconds),
        "median_us": times.median * 1e6,
        "p99_us": times.p99 * 1e6,
        "gbs": work.num_bytes / seconds / 1e9,
        "gops": work.operations / seconds / 1e9 if work.operations else None,
        "share": 100 * least[limit] / seconds,
        "limit": limit,
    }


def run(
    *,
    minutes: float,
    threads: int | None,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    paths: Mapping[str, str | None],
    say: TextIO = sys.stderr,
) -> int:
    """Measure, print the table, write what has a path."""
    used = threads or _native.usable_cores()
    limits = Limits.measured(used)
    todo = list(works(used, shapes, tokens, formats))
    budget = Budget(60 * minutes)
    rows = []
    for index, work in enumerate(todo):
        print(f"\r{index + 1}/{len(todo)} {work.operation} {work.format:<6}", end="", file=say)
        allowance = min(2.0, budget.share(len(todo) - index) / 2)
        rows.append(figures(work, work.times(allowance), limits))
    print(file=say)
    table = Table("Kernels", _COLUMNS, rows)
    print(f"{limits.table().markdown()}\n\n{table.markdown()}")
    report = Report("kernels", {**facts(), "threads": used}, [limits.table(), table])
    for path in write(report, paths):
        print(f"written: {path}", file=say)
    return 0
