"""`engineroom bench kernels`: each operation on the CPU beside what this machine allows at most.

An operation runs inside of a recorded program, as a model's step runs it; the same program without
it is timed too and subtracted. Weights and KV caches are read in turn from four times what the last
cache holds; rows of activations stay in the caches, as in a step, so operations on them alone are
held to no limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import numpy as np

from ...kernels import ops
from ...kernels.backend import KVSpec, StepInputs
from ...kernels.cpu import _native
from ...kernels.cpu.backend import CpuBackend, CpuExecutable
from ...kernels.ops import Handle, StepHandles
from ...kernels.program import Program
from ...kernels.weights import BF16, F32, FORMATS, RawWeight
from .facts import facts
from .files import write
from .limits import Limits, cold_bytes
from .tables import Column, Report, Table
from .timing import Budget, Times, measure, wall

FORMATS_TIMED = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
TOKENS = (1, 8, 32, 512)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # K, N
CONTEXTS = (1024, 16384)  # of the attention rows
HEADS = (32, 8, 128)  # query heads, kv heads, their dim
_TRUE = 105.0  # percent of a limit: above that the limit, not the kernel, is in question
_BLOCK = 16  # tokens of a block of the KV cache
_ROWS = 256  # of a weight, packed to see what a row takes
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
    Column("read_gbs", "read GB/s", 1),
    Column("gops", "GOP/s", 1),
    Column("share", "% of limit", 1),
    Column("limit", "limit"),
    Column("note", "note"),
)


@dataclass(frozen=True)
class Work:
    """A row: what one operation reads from memory and computes; `times` measures it."""

    operation: str
    format: str
    shape: tuple[int, int | None, int | None]  # M, K, N
    num_bytes: int  # of weights or a KV cache; 0 where everything is in the caches
    operations: int
    dots: str  # a field of Limits
    times: Callable[[float], Times]


def works(
    threads: int,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    contexts: Sequence[int],
    cold: int,
) -> Iterator[Work]:
    """Every row: linear layers of each format, shape and M, attention, then norms and gates.

    `cold`: bytes that go round; see cold_bytes.
    """
    backend = CpuBackend(activation_dtype="float32", threads=threads)
    for name in formats:
        for width, out_width in shapes:
            if width % FORMATS[name].block_elements:
                continue
            for count in tokens:
                yield _linear(backend, name, width, out_width, count, cold)
    for context in contexts:
        yield _attention(backend, "decode attention", context, 1, cold)
        yield _attention(backend, "causal prefill", context, min(context, tokens[-1]), cold)
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


def packed_row_bytes(weight: RawWeight, compact: bool) -> float:
    """What a row takes as the kernels read it, from the first ones."""
    rows = weight.rows(0, min(_ROWS, weight.shape[0]))
    count, columns = rows.shape
    data = rows.data.view(np.ndarray)
    return _native.pack(rows.format.name, data, count, columns, 1, compact).nbytes / count


def _linear(
    backend: CpuBackend, name: str, width: int, out_width: int, tokens: int, cold: int
) -> Work:
    raw = random_weight(name, out_width, width)
    num_bytes = int(out_width * packed_row_bytes(raw, compact=backend.isa != "amx"))
    copies = -(-cold // num_bytes)

    def record(program: Program, x: Handle, i: int) -> None:
        ops.linear(x, program.weight(f"w{i}", (out_width, width)))

    weights = {f"w{i}": raw for i in range(copies)}
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
        0,
        0,
        "f32",
        lambda allowance: _timed(backend, width, tokens, repeats, record, weights, allowance),
    )


def _attention(backend: CpuBackend, operation: str, context: int, tokens: int, cold: int) -> Work:
    """The last `tokens` of one sequence of `context` attend to all of it, in a bf16 cache."""
    heads, kv_heads, head_dim = HEADS
    spec = KVSpec(1, kv_heads, head_dim, _BLOCK, "bfloat16")
    num_bytes = -(-context // _BLOCK) * spec.bytes_per_block
    layers = -(-cold // num_bytes)
    seen = tokens * (context - tokens) + tokens * (tokens + 1) // 2
    return Work(
        operation,
        "BF16",
        (tokens, context, None),
        num_bytes,
        4 * seen * heads * head_dim,
        "bf16",
        lambda allowance: _timed_attention(backend, context, tokens, layers, allowance),
    )


def _timed_attention(
    backend: CpuBackend, context: int, tokens: int, layers: int, allowance: float
) -> Times:
    """Of one of `layers` layers, each with a cache of its own; their writes are subtracted."""
    heads, kv_heads, head_dim = HEADS
    spec = KVSpec(layers, kv_heads, head_dim, _BLOCK, "bfloat16")
    cache = backend.allocate_kv(spec, -(-context // _BLOCK))
    width, kv_width = heads * head_dim, kv_heads * head_dim
    tables = {"q": _floats("q", tokens, width), "k": _floats("k", tokens, kv_width)}

    def executable(with_it: bool) -> CpuExecutable:
        program = Program()
        handles = StepHandles.of(program)
        q = ops.embedding(program.weight("q", (tokens, width)), handles.token_ids)
        k = ops.embedding(program.weight("k", (tokens, kv_width)), handles.token_ids)
        out = q
        for layer in range(layers):
            written = ops.kv_write(k, k, layer=layer, num_kv_heads=kv_heads, head_dim=head_dim)
            if with_it:
                out = ops.attention(
                    q,
                    written,
                    layer=layer,
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    head_dim=head_dim,
                    scale=head_dim**-0.5,
                )
        program.finish(ops.select_rows(out, handles.logit_rows))
        packed = {name: backend.pack(weight) for name, weight in tables.items()}
        return backend.lower(program, packed, cache)

    writes, whole = executable(False), executable(True)
    for end in range(tokens, context + 1, tokens):  # pages that nobody wrote are not in memory
        writes.run(_step(tokens, end))
    step = _step(tokens, context)
    without = measure(wall(lambda: writes.run(step)), allowance / 4)
    times = measure(wall(lambda: whole.run(step)), allowance)
    return times.less(without.median).over(layers)


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


def _step(tokens: int, context: int | None = None) -> StepInputs:
    """The last `tokens` of one sequence, whose blocks lie in order."""
    at = np.arange(tokens, dtype=np.int32)
    end = context or tokens
    return StepInputs(
        token_ids=at,
        positions=at + (end - tokens),
        query_start=np.array([0, tokens], np.int32),
        seq_len=np.array([end], np.int32),
        block_table=np.arange(-(-end // _BLOCK), dtype=np.int32)[None],
        slot=at + (end - tokens),
        logit_rows=at,  # all: rows that nobody wants would be left out of the program
    )


def figures(work: Work, times: Times, limits: Limits) -> dict[str, Any]:
    """A row's cells. The limit is whichever of reading and multiplying takes longer at its peak;
    what took no time beside the rest of its program has no figures, and what cannot be, no share.
    """
    m, k, n = work.shape
    cells: dict[str, Any] = {
        "operation": work.operation,
        "format": work.format,
        "M": m,
        "K": k,
        "N": n,
        "warmup": times.warmup,
        "repetitions": len(times.seconds),
    }
    seconds = times.median
    if seconds <= 0:
        return cells | {"note": "lost in the noise of what is subtracted"}
    cells |= {"median_us": seconds * 1e6, "p99_us": times.p99 * 1e6}
    least = {}
    if work.num_bytes:
        cells |= {"gbs": work.num_bytes / seconds / 1e9, "read_gbs": limits.read / 1e9}
        least["read"] = work.num_bytes / limits.read
    if work.operations:
        cells["gops"] = work.operations / seconds / 1e9
        peak = getattr(limits, work.dots)
        if peak:
            least[work.dots] = work.operations / peak
    if not least:
        return cells
    limit = max(least, key=lambda name: least[name])
    share = 100 * least[limit] / seconds
    cells["limit"] = limit
    if share > _TRUE:
        return cells | {"note": f"{share:.0f}% of {limit}, measured in a worse moment"}
    return cells | {"share": share}


def run(
    *,
    minutes: float,
    threads: int | None,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    paths: Mapping[str, str | None],
    contexts: Sequence[int] = CONTEXTS,
    cold: int | None = None,
    say: TextIO = sys.stderr,
) -> int:
    """Measure, print the table, write what has a path."""
    used = threads or _native.usable_cores()
    cold = cold or cold_bytes()
    limits = Limits.measured(used, cold)
    before = limits.read  # memory's speed changes within seconds on a shared machine
    todo = list(works(used, shapes, tokens, formats, contexts, cold))
    budget = Budget(60 * minutes)
    rows = []
    for index, work in enumerate(todo):
        print(f"\r{index + 1}/{len(todo)} {work.operation} {work.format:<6}", end="", file=say)
        allowance = min(2.0, budget.share(len(todo) - index) / 2)
        times = work.times(allowance)
        after = _native.probe_read(_native.Pool(used), cold)  # its threads end with it
        rows.append(figures(work, times, replace(limits, read=max(before, after))))
        before = after
    print(file=say)
    table = Table("Kernels", _COLUMNS, rows)
    print(f"{limits.table().markdown()}\n\n{table.markdown()}")
    report = Report("kernels", {**facts(), "threads": used}, [limits.table(), table])
    for path in write(report, paths):
        print(f"written: {path}", file=say)
    return 0
