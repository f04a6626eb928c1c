"""The CPU backend as a whole: equal to the reference, pure bit for bit, fusion invisible.

TOLERANCE in fp32: both backends round in fp32 and sum in different orders; two layers of sums of at
most 256 terms around 1 differ by a few 1e-6 (measured up to 6e-6). With bf16 results the two may
round a value to neighbouring numbers, 2^-8 apart relative to it, and logits are up to 20.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.backend import KV_DTYPES, BackendUnavailable, KVSpec, StepInputs
from engineroom.kernels.cpu import _native, lower
from engineroom.kernels.cpu.backend import CpuBackend
from engineroom.kernels.cpu.packed_cache import PackedCache
from engineroom.kernels.cpu.quantise import as_packed
from engineroom.kernels.fuse import Step
from engineroom.kernels.program import Program
from engineroom.kernels.weights import (
    BF16,
    CODEBOOKS,
    F16,
    F32,
    FORMATS,
    INT4,
    INT8,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    SMALL_FLOATS,
    Format,
    RawWeight,
    WeightTooLarge,
)
from engineroom.quant.values import dequantise, row_dtype
from tests.kernels.packed_steps import Paged, random_rows, raw
from tests.kernels.programs import random_weights, two_layers

pytestmark = pytest.mark.cores

TABLES = _native.kernel_tables()
VOCAB = 200
Weights = Mapping[str, Any]


def spec(program: Program, dtype: str, block_size: int = 16) -> KVSpec:
    attention = next(op for op in program if op.name == "attention")
    heads, dim = attention.attrs["num_kv_heads"], attention.attrs["head_dim"]
    return KVSpec(2, int(heads), int(dim), block_size, dtype)  # type: ignore[arg-type]


def executable(
    program: Program,
    weights: Weights,
    backend: Any,
    kv_dtype: str = "float32",
    block_size: int = 16,
) -> Any:
    packed = {
        name: backend.pack(raw(w, name=name) if isinstance(w, np.ndarray) else w)
        for name, w in weights.items()
    }
    return backend.lower(
        program, packed, backend.allocate_kv(spec(program, kv_dtype, block_size), 64)
    )


def steps(
    chunks: Sequence[Mapping[int, Sequence[int]]], block_size: int = 16, padding: int = 0
) -> list[StepInputs]:
    paged = Paged(block_size, 64, np.random.default_rng(4))
    for _ in range(1 + max(s for chunk in chunks for s in chunk)):
        paged.add()
    return [paged.step(chunk, padding=padding) for chunk in chunks]


def logits(run: Any, inputs: Sequence[StepInputs]) -> list[np.ndarray]:
    return [run.run(step).numpy() for step in inputs]


def blocks(rng: np.random.Generator, fmt: Format, name: str, shape: tuple[int, ...]) -> RawWeight:
    """Random blocks of a quantised format whose values have the size 1/sqrt(K), centred on zero."""
    rows, columns = shape
    count = rows * columns // fmt.block_elements
    if fmt.name in SMALL_FLOATS:
        weight = RawWeight(name, fmt, shape, {"data": random_rows(rng, fmt, rows, columns).copy()})
        fields = weight.data.view(row_dtype(fmt, columns))
        scales = (fields if fmt.header else fields["blocks"])[
            "absmax" if fmt.name in CODEBOOKS else "scale"
        ]
        scales /= float(dequantise(weight).std()) * columns**0.5
        return weight
    if fmt.header:
        made_of = RawWeight(name, fmt, shape, {"data": random_rows(rng, fmt, rows, columns).copy()})
        size = columns**0.5 * float(dequantise(made_of).std() if fmt.name == "NVFP4" else 1)
        for field in ("d", "dmin", "factor"):
            header = made_of.data.view(row_dtype(fmt, columns))
            if field in (header.dtype.names or ()):
                header[field] /= size
        return made_of

    if "exponent" in (field for field, _, _ in fmt.layout):  # codes are 2.7 on the mean
        data = rng.integers(0, 256, (count, fmt.block_bytes), np.uint8)
        data[:, 0] = rng.integers(126, 128, count) - round(np.log2(2.7 * columns**0.5))
        return RawWeight(name, fmt, shape, {"data": data.reshape(-1)})

    def made(d: float, m: float) -> RawWeight:
        state = np.random.default_rng(seed)
        fields = []
        for field, dtype, n in fmt.layout:
            if dtype in ("f2", "f4"):
                size = d if field == "d" else m
                scale = size * state.uniform(0.8, 1.2, (count, n))
                fields.append(scale.astype(f"<{dtype}").view(np.uint8))
            else:
                width = {"u1": 1, "i1": 1, "u4": 4}[dtype] * n
                fields.append(state.integers(0, 256, (count, width), dtype=np.uint8))
        return RawWeight(name, fmt, shape, {"data": np.concatenate(fields, axis=1).reshape(-1)})

    seed = int(rng.integers(1 << 30))
    middle = float(dequantise(made(1 / 64, 0)).mean())  # of what has no minimum
    lowest = float(dequantise(made(0, 1 / 64)).mean())  # of the minimum alone
    m = -middle / lowest / 64 if lowest else 0.0
    spread = float(dequantise(made(1 / 64, m)).std())
    factor = 1 / columns**0.5 / spread
    return made(factor / 64, factor * m)


def quantised(program: Program, fmt: Format, head: Format = Q8_0) -> dict[str, Any]:
    rng = np.random.default_rng(8)
    out: dict[str, Any] = {}
    for name, values in random_weights(program).items():
        if values.ndim == 1:
            out[name] = values
        else:
            chosen = head if name == "embed" else fmt
            out[name] = blocks(rng, chosen, name, values.shape)
    return out


def packed_as(program: Program, fmt: Format, head: Format) -> dict[str, Any]:
    """Random float weights that the backend shall quantise; the table and the head are one."""
    out: dict[str, Any] = dict(random_weights(program))
    for name, values in out.items():
        if values.ndim == 2:
            chosen = head if name == "embed" else fmt
            out[name] = dataclasses.replace(raw(values, name=name), pack_as=chosen)
    return out


PROMPTS = {0: list(range(3, 40)), 1: [7], 2: [9, 11] * 12}


@pytest.fixture(params=TABLES)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_logits_equal_the_references(isa: str, kv_dtype: str) -> None:
    from engineroom.kernels.reference import ReferenceBackend

    program = two_layers()
    weights = random_weights(program)
    inputs = steps([PROMPTS, {0: [5], 2: [6, 7], 1: [8]}], padding=3)
    want = logits(executable(program, weights, ReferenceBackend(), kv_dtype), inputs)
    got = logits(executable(program, weights, CpuBackend(isa=isa), kv_dtype), inputs)
    # A 16-bit cache rounds q and the softmax weights to bf16 as well on this backend.
    # A last bit of k or v that differs may round to the next of 127 steps of an int8 cache, of 15
    # of an int4 cache and of 8 between powers of two of an fp8 cache, which rounding q and the
    # weights to bf16 in the first layer does to some of the second's: a few logits move by much,
    # the others as beside a bf16 cache.
    tolerance = {"float32": 2e-5, "float16": 5e-3, "int4": 0.3, "k8v4": 0.2, "fp8": 0.2}
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance.get(kv_dtype, 0.1))
        assert np.sqrt(np.mean(np.square(a - b))) < 0.05


def test_a_bf16_head_behind_int8_activations_takes_bf16(isa: str) -> None:
    """As the layers before it round more; with activations as they are it rounds nothing."""
    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = quantised(program, Q8_0)
    head = raw(random_weights(program)["embed"], BF16, "embed")
    as_fp32 = raw(dequantise(head), F32, "embed")
    inputs = steps([PROMPTS])

    def run(activations: str, head: RawWeight) -> np.ndarray:
        backend = CpuBackend(isa=isa, activations=activations)
        return logits(executable(program, weights | {"embed": head}, backend), inputs)[0]

    rounded, whole = run("auto", head), run("auto", as_fp32)
    error = np.abs(rounded - whole).max() / np.abs(whole).max()
    assert 0 < error < 2.0**-7
    np.testing.assert_allclose(run("float32", head), run("float32", as_fp32), rtol=0, atol=1e-5)


def test_alibi_is_refused() -> None:
    program = Program()
    step = ops.StepHandles.of(program)
    x = ops.embedding(program.weight("x", (4, 16)), step.token_ids)
    heads = {"layer": 0, "num_kv_heads": 2, "head_dim": 8}
    cache = ops.kv_write(x, x, **heads)
    slopes = (0.5, 0.25)
    out = ops.attention(x, cache, num_heads=2, scale=1.0, alibi_slopes=slopes, **heads)
    program.finish(out)
    backend = CpuBackend()
    kv = backend.allocate_kv(KVSpec(1, 2, 8, 16, "float32"), 1)
    with pytest.raises(BackendUnavailable, match="layer 0 has ALiBi slopes.*device='cuda'"):
        backend.lower(program, {}, kv)


@cache
def sunk(kv_dtype: str, window: int) -> tuple[Any, list[int], np.ndarray]:
    """A layer with sinks, tokens of three splits of 256 keys, and what float64 makes of them."""
    from tests.kernels.test_reference_attention import VOCAB as TOKENS
    from tests.kernels.test_reference_attention import Shape, oracle

    shape = Shape(num_heads=6, num_kv_heads=2, head_dim=16, sinks=True, window=window)
    tokens = np.random.default_rng(2).integers(0, TOKENS, 530).tolist()
    return shape, tokens, oracle(shape, tokens, "float32", kv_dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_sinks_are_their_formula_and_added_once(isa: str, kv_dtype: str, window: int) -> None:
    """Over splits that threads share: in one step, and in chunks."""
    shape, tokens, want = sunk(kv_dtype, window)
    # Of bf16, 4 bits and fp8 q and weights are rounded too: scores to 20 are off by hundredths.
    loose = {"bfloat16": 1e-1, "int8": 1e-2, "int4": 1e-1, "k8v4": 1e-1, "fp8": 1e-1}.get(
        kv_dtype, 2e-5
    )
    made = []
    for threads, chunks in ((1, [530]), (2, [530]), (3, [255, 3, 270, 1, 1])):
        backend = CpuBackend(isa=isa, threads=threads)
        packed = {n: backend.pack(raw(t, name=n)) for n, t in shape.tables().items()}
        kv = backend.allocate_kv(KVSpec(2, 2, 16, 16, kv_dtype), 64)
        run = backend.lower(shape.program(), packed, kv)
        starts = np.cumsum([0, *chunks])
        spans = [{0: tokens[a:b]} for a, b in pairwise(starts)]
        made.append(np.concatenate(logits(run, steps(spans))))
        np.testing.assert_allclose(made[-1], want, rtol=0, atol=loose)
        assert made[-1].tobytes() == made[0].tobytes()


def test_sinks_far_from_the_scores(isa: str) -> None:
    """One far above them takes all the weight, one far below none; padding gives zeros."""
    from tests.kernels.test_reference_attention import Shape

    shape = Shape(num_heads=3, num_kv_heads=3, head_dim=8, sinks=True)
    results = []
    for sinks in ([1e30, -1e30, -np.inf], [np.inf, -200.0, -1e4]):
        backend = CpuBackend(isa=isa)
        tables = shape.tables() | {"sinks": np.array(sinks, np.float32)}
        packed = {n: backend.pack(raw(t, name=n)) for n, t in tables.items()}
        kv = backend.allocate_kv(KVSpec(2, 3, 8, 16, "float32"), 64)
        run = backend.lower(shape.program(), packed, kv)
        [got] = logits(run, steps([{0: [5, 9, 3]}], padding=2))
        assert not got[:, :8].any() and not got[3:].any()
        assert np.isfinite(got).all() and got[:3, 8:].all()
        results.append(got)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size, dim", [(16, 8), (3, 6)])
def test_the_cache_takes_the_bytes_that_its_spec_says(
    kv_dtype: str, block_size: int, dim: int
) -> None:
    wanted = KVSpec(3, 2, dim, block_size, kv_dtype)
    cache = CpuBackend().allocate_kv(wanted, 7)
    assert cache.native.nbytes == 7 * wanted.bytes_per_block


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fmt", [BF16, F16])
def test_16_bit_results_are_the_references_roundings(isa: str, dtype: str, fmt: Any) -> None:
    from engineroom.kernels.reference import ReferenceBackend

    program = two_layers()
    weights = {n: raw(w, fmt, n) for n, w in random_weights(program).items()}
    inputs = steps([PROMPTS, {0: [5]}])
    reference = ReferenceBackend(activation_dtype=dtype)
    want = logits(executable(program, weights, reference, dtype), inputs)
    backend = CpuBackend(isa=isa, activation_dtype=dtype)
    got = logits(executable(program, weights, backend, dtype), inputs)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).mean() < 0.05 and np.abs(a - b).max() < 0.5


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.is_float])
def test_quantised_weights_with_fp32_activations_equal_the_reference(isa: str, fmt: Any) -> None:
    from engineroom.kernels.reference import ReferenceBackend

    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = quantised(program, fmt)
    inputs = steps([PROMPTS])
    want = logits(executable(program, weights, ReferenceBackend()), inputs)
    exact = CpuBackend(isa=isa, activations="float32")
    got = logits(executable(program, weights, exact), inputs)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-4)
    rounded = logits(executable(program, weights, CpuBackend(isa=isa)), inputs)[0]
    error = np.abs(rounded - want[0]).mean() / np.abs(want[0]).mean()
    assert 0 < error < 0.05, "int8 activations in groups of 32 are within a few percent"


CASES: dict[str, tuple[Callable[[Program], dict[str, Any]], dict[str, Any], str]] = {
    "fp32": (random_weights, {}, "float32"),
    "bf16": (
        lambda p: {n: raw(w, BF16, n) for n, w in random_weights(p).items()},
        {"activation_dtype": "bfloat16"},
        "bfloat16",
    ),
    "Q4_0": (lambda p: quantised(p, Q4_0), {}, "bfloat16"),
    "Q4_1": (lambda p: quantised(p, Q4_1), {}, "bfloat16"),
    "Q4_K": (lambda p: quantised(p, Q4_K), {}, "float16"),
    "Q8_0": (lambda p: quantised(p, Q8_0), {"activations": "float32"}, "bfloat16"),
    "INT8": (lambda p: packed_as(p, INT8, INT8), {}, "bfloat16"),
    "INT4": (lambda p: packed_as(p, INT4, INT8), {}, "bfloat16"),
    "Q4_1, int8 cache": (lambda p: quantised(p, Q4_1), {}, "int8"),
    "Q4_1, int4 cache": (lambda p: quantised(p, Q4_1), {}, "int4"),
    "Q4_1, k8v4 cache": (lambda p: quantised(p, Q4_1), {}, "k8v4"),
    "Q4_1, fp8 cache": (lambda p: quantised(p, Q4_1), {}, "fp8"),
}


def long_prompts() -> dict[int, list[int]]:
    """One beyond a split of 256 keys, and neighbours of many lengths."""
    rng = np.random.default_rng(1)
    lengths = [300, 1, 17, 64, 5, 33]
    return {s: rng.integers(0, VOCAB, n).tolist() for s, n in enumerate(lengths)}


@pytest.mark.parametrize("case", CASES)
def test_law_2_bit_for_bit(isa: str, case: str) -> None:
    """A row's logits: alone = in a batch = chunked = token by token = any threads, block sizes."""
    make, options, kv_dtype = CASES[case]
    program = (
        two_layers(hidden=256, heads=6 if case == "fp32" else 4, kv_heads=2, ffn=512)
        if (case != "fp32")
        else two_layers(hidden=96, heads=6, kv_heads=2, ffn=80)
    )
    weights = make(program)
    prompts = long_prompts()
    backend = CpuBackend(isa=isa, threads=2, **options)
    alone = {}
    for s, tokens in prompts.items():
        [whole] = steps([{0: tokens}])
        alone[s] = executable(program, weights, backend, kv_dtype).run(whole).numpy()

    def same(rows: np.ndarray, s: int, start: int, what: str) -> None:
        want = alone[s][start : start + len(rows)]
        assert rows.tobytes() == want.tobytes(), f"sequence {s} from {start}, {what}"

    for threads, block_size in ((1, 16), (2, 7), (3, 32), (2, 128)):
        other = CpuBackend(isa=isa, threads=threads, **options)
        [together] = steps([prompts], block_size)
        got = executable(program, weights, other, kv_dtype, block_size).run(together).numpy()
        at = 0
        for s, tokens in prompts.items():
            same(got[at : at + len(tokens)], s, 0, f"{threads} threads, blocks of {block_size}")
            at += len(tokens)

    chunked = executable(program, weights, backend, kv_dtype)
    plan, cuts = [], {s: [0] for s in prompts}
    rng = np.random.default_rng(2)
    while any(cuts[s][-1] < len(prompts[s]) for s in prompts):
        chunk = {}
        for s, tokens in prompts.items():
            size = int(rng.integers(0, 40))
            start = cuts[s][-1]
            if size and start < len(tokens):
                chunk[s] = tokens[start : start + size]
                cuts[s].append(start + len(chunk[s]))
        if chunk:
            plan.append(chunk)
    done = dict.fromkeys(prompts, 0)
    for chunk, step in zip(plan, steps(plan), strict=True):
        got, at = chunked.run(step).numpy(), 0
        for s, tokens in chunk.items():
            same(got[at : at + len(tokens)], s, done[s], "chunked")
            done[s] += len(tokens)
            at += len(tokens)

    single = executable(program, weights, backend, kv_dtype)
    for i, step in enumerate(steps([{0: [t]} for t in prompts[3]])):
        same(single.run(step).numpy(), 3, i, "token by token")


@pytest.mark.parametrize("case", CASES)
def test_fusion_changes_no_bit(isa: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, kv_dtype = CASES[case]
    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = make(program)
    inputs = steps([PROMPTS, {0: [5], 2: [6, 7]}])
    backend = CpuBackend(isa=isa, **options)
    fused = logits(executable(program, weights, backend, kv_dtype), inputs)
    monkeypatch.setattr(lower, "early_rows", lambda p: p)
    monkeypatch.setattr(lower, "fuse", lambda p, form: [Step(op.name, (op,)) for op in p])
    apart = logits(executable(program, weights, backend, kv_dtype), inputs)
    for a, b in zip(fused, apart, strict=True):
        assert a.tobytes() == b.tobytes()


def test_only_the_asked_rows_are_computed_and_equal() -> None:
    program = two_layers()
    weights = random_weights(program)
    paged = Paged(16, 64, np.random.default_rng(4))
    for _ in PROMPTS:
        paged.add()
    everything = paged.step(PROMPTS)
    some = [5, 36, 37, 61]
    run = executable(program, weights, CpuBackend())
    want = run.run(everything).numpy()
    partly = StepInputs(**{**vars(everything), "logit_rows": np.array(some, np.int32)})
    assert run.run(partly).numpy().tobytes() == want[some].tobytes()
    none = StepInputs(**{**vars(everything), "logit_rows": np.array([], np.int32)})
    assert run.run(none).numpy().shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [VOCAB]}, "token id 200 is outside of 0..199"),
        ({"token_ids": [-1]}, "token id -1"),
        ({"slot": [64 * 16]}, "slot 1024 is outside of 0..1023"),
        ({"slot": [-2]}, "slot -2"),
        ({"block_table": [[64]]}, "block 64 is outside of 0..63"),
        ({"seq_len": [17]}, "seq_len 17"),
        ({"positions": [1]}, "position 1 is outside of 0..0"),
        ({"logit_rows": [1]}, "logit row 1"),
        ({"query_start": [0, 2]}, "query_start"),
        ({"positions": [0, 1]}, "disagree"),
    ],
)
def test_metadata_that_points_outside_is_refused(change: dict[str, Any], message: str) -> None:
    program = two_layers()
    [step] = steps([{0: [3]}])
    bad = {**vars(step), **{k: np.array(v, np.int32) for k, v in change.items()}}
    run = executable(program, random_weights(program), CpuBackend())
    with pytest.raises(ValueError, match=message):
        run.run(StepInputs(**bad))
    assert np.isfinite(run.run(step).numpy()).all()


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activation dtype 'int3' is unknown; supported: float32"):
        CpuBackend(activation_dtype="int3")
    with pytest.raises(ValueError, match="isa 'sse9' does not run here; what does: "):
        CpuBackend(isa="sse9")
    with pytest.raises(ValueError, match="activations='int4' is unknown"):
        CpuBackend(activations="int4")
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        CpuBackend(threads=0)


def test_a_missing_weight_and_a_wrong_cache_are_named() -> None:
    program = two_layers()
    backend = CpuBackend()
    packed = {n: backend.pack(raw(w, name=n)) for n, w in random_weights(program).items()}
    cache = backend.allocate_kv(spec(program, "float32"), 4)
    with pytest.raises(ValueError, match="were not given: 0.q$"):
        backend.lower(program, {n: w for n, w in packed.items() if n != "0.q"}, cache)
    with pytest.raises(ValueError, match=r"weight '0.q' is \[3, 32\], the program reads it as"):
        backend.lower(program, {**packed, "0.q": backend.pack(raw(np.zeros((3, 32))))}, cache)
    with pytest.raises(ValueError, match="no KV cache was given"):
        backend.lower(program, packed, None)
    other = backend.allocate_kv(KVSpec(1, 2, 8, 16, "float32"), 4)
    with pytest.raises(ValueError, match="layer 1 has 2 kv heads of 8; the KV cache has 1 layers"):
        backend.lower(program, packed, other)


@pytest.mark.parametrize("amx", [True, False])
def test_amx_gets_bf16_in_full(amx: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its products read plain bf16 only; files of tiles of the two kinds are told apart."""
    table, pack_layer, bind = TABLES[-1], _native.pack_layer, _native.StepProgram
    sizes, keys = [], []

    def spied(pool: Any, matrices: Any, *options: bool) -> Any:
        packed = pack_layer(pool, matrices, *options)
        for matrix, (fmt, _, rows, columns) in zip(packed, matrices, strict=True):
            sizes.append((matrix.nbytes, _native.packed_bytes(fmt, rows, columns)))
        return packed

    def kept(path: Path, key: str) -> PackedCache:
        keys.append(key)
        return PackedCache(path, key)

    if amx:  # this machine may lack it: lowered as such, bound to kernels that run anywhere
        monkeypatch.setattr(_native, "kernel_tables", lambda: ["amx", table])
        monkeypatch.setattr(_native, "StepProgram", lambda isa, *rest: bind(table, *rest))
    monkeypatch.setattr(_native, "pack_layer", spied)
    monkeypatch.setattr("engineroom.kernels.cpu.backend.PackedCache", kept)
    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = {n: raw(w, BF16, n) for n, w in random_weights(program).items()}
    cache = (tmp_path / "tiles", "key")
    executable(program, weights, CpuBackend(isa="amx" if amx else table, packed_cache=cache))
    assert sizes and all((packed == plain) == amx for packed, plain in sizes)
    assert keys == ["key bf16 in full" if amx else "key"]


def test_planned_memory_is_what_is_taken() -> None:
    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = quantised(program, Q4_0)
    backend = CpuBackend(threads=2)
    matrices = {n: w for n, w in weights.items() if isinstance(w, RawWeight)}
    vectors = {n: raw(w, name=n) for n, w in weights.items() if isinstance(w, np.ndarray)}
    planned = backend.weights_bytes(program, {**matrices, **vectors})
    tiles = sum(_native.packed_bytes(w.format.name, *w.shape) for w in matrices.values())
    assert planned == tiles + 4 * sum(  # rows of the table are read of its tiles
        w.size for w in weights.values() if not isinstance(w, RawWeight)
    )
    small = packed_as(program, INT4, INT8)
    small = {n: raw(w, name=n) if isinstance(w, np.ndarray) else w for n, w in small.items()}
    tiles = sum(
        _native.packed_bytes(w.packed_format.name, *w.shape)
        for w in small.values()
        if len(w.shape) == 2
    )  # rows of the table are read of its tiles
    vector_bytes = sum(4 * w.shape[0] for w in small.values() if len(w.shape) == 1)
    assert backend.weights_bytes(program, small) == tiles + vector_bytes
    [step] = steps([{0: list(range(120))}])
    run = executable(program, weights, backend)
    run.run(step)
    assert run.workspace_bytes <= backend.workspace_bytes(program, 120, 120, 1024)


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda f: f.name)
def test_weights_quantised_on_packing_are_their_dequantised_values(isa: str, fmt: Format) -> None:
    """Both backends quantise alike; the embedding reads what the head multiplies."""
    from engineroom.kernels.reference import ReferenceBackend

    program = two_layers(hidden=96, heads=6, kv_heads=2, ffn=160)
    weights = packed_as(program, fmt, fmt)
    values = {
        name: w if isinstance(w, np.ndarray) else dequantise(as_packed(w, 2))
        for name, w in weights.items()
    }
    inputs = steps([PROMPTS])
    want = logits(executable(program, values, ReferenceBackend()), inputs)[0]
    reference = logits(executable(program, weights, ReferenceBackend()), inputs)[0]
    assert reference.tobytes() == want.tobytes()
    got = logits(executable(program, weights, CpuBackend(isa=isa, activations="float32")), inputs)
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-4)
    rounded = logits(executable(program, weights, CpuBackend(isa=isa)), inputs)[0]
    assert 0 < np.abs(rounded - want).mean() / np.abs(want).mean() < 0.05


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**120])
def test_what_cannot_be_quantised_names_its_tensor(value: float) -> None:
    from engineroom.kernels.reference import ReferenceBackend

    program = two_layers()
    weights = packed_as(program, INT8, INT8)
    values = random_weights(program)["0.q"].copy()
    values[2, 5] = value
    weights["0.q"] = dataclasses.replace(raw(values, name="blk.0.q"), pack_as=INT4)
    for backend in (CpuBackend(), ReferenceBackend()):
        with pytest.raises(WeightTooLarge, match=r"'blk.0.q': row 2 holds .* which INT4 cannot"):
            executable(program, weights, backend)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_table_that_is_the_head_too_is_held_once_with_the_files_values(fmt: Format) -> None:
    """Beside the same rows as two weights, of which the table is read from the checkpoint."""
    shape = (100, 2 * max(fmt.block_elements, 48))
    table = raw(random_weights(one_table("table", shape))["table"])
    table = blocks(np.random.default_rng(1), fmt, "table", shape) if not fmt.is_float else table
    if fmt in (F16, BF16):
        bits = table.data.view(np.float32)
        half = bits.astype("<f2") if fmt is F16 else (bits.view(np.uint32) >> 16).astype("<u2")
        table = RawWeight("table", fmt, shape, {"data": half.view(np.uint8)})
    [step] = steps([{0: list(range(100))}])
    got = []
    for head in ("table", "head"):
        program, backend = one_table(head, shape), CpuBackend(threads=2)
        weights = dict.fromkeys(("table", head), table)
        packed = {name: backend.pack(w) for name, w in weights.items()}
        got.append(backend.lower(program, packed, None).run(step).numpy().view(np.uint32))
        tiles = _native.packed_bytes(fmt.name, *shape)
        beside = 0 if head == "table" else table.nbytes
        assert backend.weights_bytes(program, weights) == tiles + beside
    np.testing.assert_array_equal(got[0], got[1])


def one_table(head: str, shape: tuple[int, int]) -> Program:
    """The logits of `head` for the rows of a table."""
    p = Program()
    step = ops.StepHandles.of(p)
    x = ops.embedding(p.weight("table", shape), step.token_ids)
    return p.finish(ops.linear(ops.select_rows(x, step.logit_rows), p.weight(head, shape)))


def test_a_program_without_the_head_reads_the_heads_tiles() -> None:
    shape = (100, 64)
    table = blocks(np.random.default_rng(2), Q8_0, "table", shape)
    backend = CpuBackend(threads=2)
    packed = {"table": backend.pack(table)}
    [step] = steps([{0: list(range(100))}])
    want = dequantise(table)[step.token_ids[step.logit_rows]].copy()
    for tied in (False, True):
        p = Program()
        handles = ops.StepHandles.of(p)
        rows = ops.embedding(p.weight("table", shape), handles.token_ids)
        p.finish(ops.select_rows(rows, handles.logit_rows))
        got = backend.lower(p, packed, None).run(step).numpy()
        np.testing.assert_array_equal(got, want)
        if not tied:
            assert not packed["table"].tiles  # nothing multiplies by it yet
            backend.lower(one_table("table", shape), packed, None)
            table.data[:] = table.data[::-1].copy()  # the file is not read again


def test_values_of_embeddings_are_the_formats_own() -> None:
    program = two_layers(hidden=256, heads=4, kv_heads=2, ffn=512)
    weights = quantised(program, Q4_0, head=Q4_K)
    values = dequantise(weights["embed"])
    assert np.isfinite(values).all() and np.abs(values).max() < 10
