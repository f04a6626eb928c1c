"""The Triton backend's elementwise and linear operations on the interpreter, beside the reference.

fp32 and fp16: the interpreter's bf16 is wrong. Law 2 as bits, as far as numpy's products show it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.backend import BackendUnavailable, KVSpec
from engineroom.kernels.program import Program
from engineroom.kernels.triton.quantised import LAYOUTS
from engineroom.kernels.weights import (
    CODEBOOKS,
    F16,
    F32,
    FORMATS,
    Q4_K,
    RawWeight,
    WeightGroup,
    WeightTooLarge,
)
from engineroom.quant.values import dequantise
from tests.counts import FULL, count
from tests.kernels import programs
from tests.kernels.packed_steps import (
    ROWS,
    Paged,
    assert_close,
    one_op,
    plain_step,
    random_blocks,
    random_rows,
    raw,
)
from tests.kernels.packed_steps import run as run_reference
from tests.kernels.triton_device import DTYPES, TritonBackend, run, torch

from engineroom.kernels.triton import linear  # isort: skip

RNG = np.random.default_rng(41)
INV_FREQ = tuple(10000.0 ** (-i / 5) for i in range(5))


def table(width: int, spread: float = 3.0, rows: int = ROWS) -> np.ndarray:
    return (RNG.standard_normal((rows, width)) * spread).astype(np.float32)


# Name -> (operand widths, what records it). Widths are odd, one past a block, and one element.
CASES = {
    "add": ({"a": 13, "b": 13}, lambda p, s, a, b: ops.add(a, b)),
    "scale": ({"a": 1025}, lambda p, s, a: ops.scale(a, 0.37)),
    "softcap": ({"a": 13}, lambda p, s, a: ops.softcap(a, 2.5)),
    "silu_mul": ({"a": 13, "b": 13}, lambda p, s, a, b: ops.silu_mul(a, b)),
    "gelu_tanh_mul": ({"a": 13, "b": 13}, lambda p, s, a, b: ops.gelu_tanh_mul(a, b)),
    "clamped_silu_mul": (
        {"a": 13, "b": 13},
        lambda p, s, a, b: ops.clamped_silu_mul(ops.scale(a, 4.0), ops.scale(b, 4.0)),
    ),
    "rms_norm": (
        {"a": 7},
        lambda p, s, a: ops.rms_norm(a, p.weight("w", (7,)), eps=1e-5),
    ),
    "rms_norm of heads, offset 1": (
        {"a": 21},
        lambda p, s, a: ops.rms_norm(a, p.weight("w", (7,)), eps=1e-6, offset=1.0),
    ),
    "rms_norm, then add": (
        {"a": 7, "b": 7},
        lambda p, s, a, b: ops.add(b, ops.rms_norm(a, p.weight("w", (7,)), eps=1e-5)),
    ),
    "rope": (
        {"a": 30},
        lambda p, s, a: ops.rope(a, s.positions, head_dim=10, inv_freq=INV_FREQ),
    ),
    "rope interleaved, partial, scaled": (
        {"a": 28},
        lambda p, s, a: ops.rope(
            a, s.positions, head_dim=14, inv_freq=INV_FREQ, attention_factor=1.3, interleaved=True
        ),
    ),
}
WEIGHT_7 = RNG.standard_normal(7).astype(np.float32)


def with_weights(program: Program, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**tables, "w": WEIGHT_7} if "w" in program.weights else dict(tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_op_is_the_references(name: str, dtype: str) -> None:
    widths, build = CASES[name]
    program = one_op(build, **widths)
    for num_tokens in (1, 17):
        tables = {key: table(width) for key, width in widths.items()}
        weights = with_weights(program, tables)
        step = plain_step(num_tokens, RNG.permutation(3000)[:num_tokens].tolist())
        want = run_reference(program, weights, step, dtype=dtype)
        assert_close(run(program, weights, step, dtype=dtype), want.astype(np.float64), dtype)


@pytest.mark.parametrize("name", ["add", "rope", "rope interleaved, partial, scaled"])
def test_what_is_ieee_alone_has_the_references_bits(name: str) -> None:
    widths, build = CASES[name]
    program = one_op(build, **widths)
    weights = {key: table(width) for key, width in widths.items()}
    step = plain_step(9, [0, 1, 2, 255, 256, 4095, 70000, 131071, 99991])
    want = run_reference(program, weights, step)
    assert run(program, weights, step).tobytes() == want.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_op_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    widths, build = CASES[name]
    program = one_op(build, **widths)
    weights = with_weights(program, {key: table(width, 5.0) for key, width in widths.items()})
    positions = RNG.permutation(5000)[:ROWS].tolist()
    whole = run(program, weights, plain_step(ROWS, positions))
    for _ in range(count(reduced=2, full=20)):
        picked = RNG.permutation(ROWS)[: RNG.integers(1, ROWS)]
        step = plain_step(len(picked), [positions[i] for i in picked])
        step.token_ids[:] = picked
        assert run(program, weights, step).tobytes() == whole[picked].tobytes()


# ------------------------------------------------------------------------------------- linear


def quantised(name: str, rows: int, columns: int) -> RawWeight:
    data = random_rows(RNG, FORMATS[name], rows, columns)
    return RawWeight(name, FORMATS[name], (rows, columns), {"data": data})


def linear_program(rows: int, columns: int, bias: bool = False) -> Program:
    def build(p: Program, step: ops.StepHandles, x: ops.Handle) -> ops.Handle:
        b = p.weight("b", (rows,)) if bias else None
        return ops.linear(x, p.weight("w", (rows, columns)), b)

    return one_op(build, x=columns)


# Rows and columns: one row, one past a tile, odd everything.
SHAPES = ((1, 32), (65, 100), (130, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [F32, F16], ids=lambda f: f.name)
def test_linear_of_floats(fmt, dtype: str) -> None:  # type: ignore[no-untyped-def]
    for rows, columns in SHAPES:
        program = linear_program(rows, columns, bias=True)
        weights = {
            "x": table(columns, 1.0),
            "w": raw(table(columns, 1.0, rows), fmt),
            "b": table(rows, 1.0)[0],
        }
        for num_tokens in (1, 33):
            step = plain_step(num_tokens)
            want = run_reference(program, weights, step, dtype=dtype).astype(np.float64)
            assert_close(run(program, weights, step, dtype=dtype), want, dtype, 4e-6)


QUANTISED = [name for name, fmt in FORMATS.items() if not fmt.is_float]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_linear_of_quantised_weights(name: str, dtype: str) -> None:
    """Against float64 over the specification's values, in whole steps and in part of one."""
    per_block = FORMATS[name].block_elements
    for rows, blocks in ((1, 256 // per_block), (65, max(1, 96 // per_block))):
        columns = blocks * per_block
        w = quantised(name, rows, columns)
        values = dequantise(w).astype(np.float64)
        x = table(columns, 1.0)
        got = run(linear_program(rows, columns), {"x": x, "w": w}, plain_step(18), dtype=dtype)
        want = x[:18].astype(dtype).astype(np.float64) @ values.T
        size = np.abs(x[:18]).astype(np.float64) @ np.abs(values).T
        half_ulp = {"float32": 0.0, "float16": 2.0**-11}[dtype]
        # A table is rounded to the dtype that is multiplied.
        near = 1e-6 + (half_ulp if name in CODEBOOKS else 0.0)
        assert (np.abs(got - want) <= near * size + half_ulp * np.abs(want) + 1e-6).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_embedding_has_the_specifications_bits(name: str) -> None:
    columns = FORMATS[name].block_elements * 3
    w = quantised(name, 20, columns)
    p = Program()
    step = ops.StepHandles.of(p)
    p.finish(
        ops.select_rows(
            ops.embedding(p.weight("w", (20, columns)), step.token_ids), step.logit_rows
        )
    )
    ids = plain_step(20)
    assert np.array_equal(run(p, {"w": w}, ids), dequantise(w))


# Where a layer's input is taken in 8 bits: formats, and what multiplies them.
IN_8_BITS = [
    *((n, "int8") for n in ("Q4_0", "Q5_0", "Q8_0", "INT8")),
    *((n, "int8") for n in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "INT4", "I4G32", "I4G128", "I8G32")),
    ("FP8", "fp8"),
    ("FP8_128", "fp8"),
]


def in_8_bits(x: np.ndarray, activations: str) -> np.ndarray:
    """Rows of x as they are multiplied, float64: torch's rounding to 8-bit floats, numpy's to
    integers."""
    most = np.float32({"int8": 127.0, "fp8": 448.0}[activations])
    largest = np.abs(x).max(axis=1, keepdims=True)
    up = np.where(largest > 0, most / np.where(largest > 0, largest, 1), 0).astype(np.float32)
    if activations == "int8":
        codes = np.rint(x * up).clip(-127, 127)
    else:
        codes = torch.from_numpy(x * up).clip(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    return codes.astype(np.float64) * (largest / most)


def hostile_rows(columns: int) -> np.ndarray:
    """Rows of x: ordinary ones, one of zeros, of a single value, with an outlier, of ties."""
    x = table(columns, 1.0)
    x[1] = 0.0
    x[2] = -3.0
    x[3, columns // 2] = 1e4
    x[4] = np.arange(columns) % 128 - 63.5
    x[4, 0] = 127.0
    x[5] *= np.float32(2.0**-90)
    x[6] = np.float32(2.0**-9) * (np.arange(columns) % 34 - 17) / 2  # ties of the smallest fp8
    x[6, 0] = 448.0
    return x


@pytest.mark.parametrize("name,activations", IN_8_BITS)
def test_linear_of_activations_in_8_bits(name: str, activations: str) -> None:
    """Against float64 over the specification's values, of weights and of rows."""
    per_block = FORMATS[name].block_elements
    for rows, blocks, dtype in ((65, max(1, 96 // per_block), "float32"), (1, 5, "float16")):
        columns = blocks * per_block
        w = quantised(name, rows, columns)
        x = hostile_rows(columns)
        if dtype == "float16":
            x[5] = 0.0  # it has nothing as small
        program = linear_program(rows, columns)
        weights = {"x": x, "w": w}
        got = run(program, weights, plain_step(18), dtype=dtype, activations=activations)
        x8 = in_8_bits(x[:18].astype(dtype).astype(np.float32), activations)
        values = dequantise(w).astype(np.float64)
        want, size = x8 @ values.T, np.abs(x8) @ np.abs(values).T
        if LAYOUTS[name].minimum:  # the parts of a value may cancel
            size += np.abs(x8) @ (np.abs(values) + 2 * np.abs(values).max()).T
        half_ulp = {"float32": 0.0, "float16": 2.0**-11}[dtype]
        near = np.abs(got - want) <= 1e-6 * size + half_ulp * np.abs(want)
        assert near[np.abs(want) < 65504].all()


def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other() -> None:
    columns = 96
    x = table(columns, 1.0)
    weights = {"x": x, "w": quantised("Q4_0", 5, columns)}
    program = linear_program(5, columns)
    good = run(program, weights, plain_step(9), activations="int8")
    x[3, 7], x[6, 95] = np.nan, -np.inf
    bad = run(program, weights, plain_step(9), activations="int8")
    assert np.isnan(bad[[3, 6]]).all()
    others = [0, 1, 2, 4, 5, 7, 8]
    assert bad[others].tobytes() == good[others].tobytes()


@pytest.mark.parametrize("name,activations", [("Q4_1", "int8"), ("FP8_128", "fp8")])
def test_codes_made_by_a_layer_are_those_of_a_launch_before(
    name: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of columns in another order; and the layer does make them."""
    columns = {"Q4_1": 160, "FP8_128": 256}[name]
    order = RNG.permutation(columns).astype(np.int32)
    weights = {
        "x": hostile_rows(columns),
        "w": replace(quantised(name, 20, columns), columns=order),
    }
    launched = []
    prepared = linear.prepare

    def prepare(*args: Any) -> Any:
        launched.append(args)
        return prepared(*args)

    monkeypatch.setattr(linear, "prepare", prepare)
    program = linear_program(20, columns)
    here = run(program, weights, plain_step(9), activations=activations)
    assert not launched
    monkeypatch.setattr(linear, "CODED_ELEMENTS", 8 * columns)
    before = run(program, weights, plain_step(9), activations=activations)
    assert here.tobytes() == before.tobytes() and len(launched) == 1


@pytest.mark.parametrize(
    "name,activations",
    [
        *((n, "auto") for n in ("F32", "Q4_0", "Q4_1", "Q8_0", "INT8", "FP8_128", "NF4")),
        ("Q4_0", "int8"),
        ("Q4_1", "int8"),
        ("INT8", "int8"),
        ("FP8", "fp8"),
        ("Q4_1", "auto in 16 bits"),
        ("I4G128", "auto in 16 bits"),
    ],
)
def test_linear_rows_do_not_depend_on_how_many_there_are(name: str, activations: str) -> None:
    activations, _, in_16_bits = activations.partition(" ")
    more = {"activations": activations, "dtype": "float16" if in_16_bits else "float32"}
    columns, rows = {"FP8_128": 128, "I4G128": 128, "NF4": 64}.get(name, 96), 70
    w = raw(table(columns, 1.0, rows)) if name == "F32" else quantised(name, rows, columns)
    weights = {"x": table(columns, 1.0), "w": w}
    program = linear_program(rows, columns)
    most = ROWS if FULL or activations == "auto" else 40  # a launch before takes each token alone
    whole = run(program, weights, plain_step(most), **more)
    for num_tokens in (1, 2, 15, 17, 33, 70) if FULL else (1, 15, 17, 33):
        some = run(program, weights, plain_step(num_tokens), **more)
        assert some.tobytes() == whole[:num_tokens].tobytes(), num_tokens


@pytest.mark.parametrize(
    ("name", "activations"),
    [("I4G128", "auto"), ("I4G32", "int8")]
    + FULL * [("I4G32", "auto"), ("Q4_0", "auto"), ("Q8_0", "int8")],
)
def test_act_order_multiplies_the_columns_that_a_weight_names(name: str, activations: str) -> None:
    """The bits of the same weight by an input whose columns were put in that order before."""
    columns = max(128, FORMATS[name].block_elements)
    order = RNG.permutation(columns).astype(np.int32)
    w, x = quantised(name, 20, columns), table(columns, 1.0)
    for p in (linear_program(20, columns), normed_program(20, columns, gated=False)):
        turned = {"x": x, "w": replace(w, columns=order), "norm": WEIGHT_256[:columns]}
        plain = {"x": x[:, order], "w": w, "norm": WEIGHT_256[:columns][order]}
        got, want = (
            run(p, {n: t[n] for n in p.weights}, plain_step(18), activations=activations)
            for t in (turned, plain)
        )
        if p.weights.keys() == {"x", "w"}:
            assert got.tobytes() == want.tobytes()
        else:  # the norm's sum is in the order of its input
            assert_close(got, want.astype(np.float64), "float32", 1e-2 if activations else 2e-6)


WEIGHT_256 = 1 + RNG.standard_normal(256).astype(np.float32) / 8


def normed_program(rows: int, columns: int, *, gated: bool) -> Program:
    def build(p: Program, step: ops.StepHandles, x: ops.Handle) -> ops.Handle:
        h = ops.rms_norm(x, p.weight("norm", (columns,)), eps=1e-5, offset=0.5)
        y = ops.linear(h, p.weight("w", (rows, columns)))
        if gated:
            y = ops.silu_mul(y, ops.linear(h, p.weight("up", (rows, columns))))
        return y

    return one_op(build, x=columns)


NORMED = [
    ("F32", "auto", False),
    ("Q4_K", "auto", True),
    ("Q4_1", "auto in 16 bits", False),
    ("Q4_K", "int8", True),
    ("FP8", "fp8", False),
]
if FULL:
    NORMED += [(name, "auto", gated) for name in ("Q4_0", "INT8", "NF4") for gated in (False, True)]
    NORMED += [("INT8", "int8", False), ("INT8", "int8", True)]
    NORMED += [
        (name, by, not gated) for name, by, gated in NORMED[:5] if by in ("auto", "int8", "fp8")
    ]


@pytest.mark.parametrize(("name", "activations", "gated"), NORMED)
def test_a_norm_before_layers_has_the_bits_of_its_own_launch(
    name: str, activations: str, gated: bool
) -> None:
    """Few tokens are normed by the layer's programs, many by a launch before; a gate and the layer
    beside it are one matrix."""
    activations, _, in_16_bits = activations.partition(" ")
    more = {"activations": activations, "dtype": "float16" if in_16_bits else "float32"}
    columns, rows, most = 256, 24, ROWS if FULL else 20
    program = normed_program(rows, columns, gated=gated)
    weights = {"x": table(columns), "norm": WEIGHT_256}
    for each in ("w", "up")[: 1 + gated]:
        some = raw(table(columns, 1.0, rows)) if name == "F32" else quantised(name, rows, columns)
        weights[each] = some
    whole = run(program, weights, plain_step(most), **more)
    for num_tokens in (1, 16, 17, 40) if FULL else (3, 17):
        some = run(program, weights, plain_step(num_tokens), **more)
        assert some.tobytes() == whole[:num_tokens].tobytes(), num_tokens
    if activations == "auto" and not in_16_bits:
        want = run_reference(program, weights, plain_step(most)).astype(np.float64)
        assert_close(whole, want, "float32", 1e-5)
    h = one_op(normed_rows, x=columns)
    normed = run(h, {"x": weights["x"], "norm": WEIGHT_256}, plain_step(most), **more)
    alone = [
        run(
            linear_program(rows, columns),
            {"x": padded(normed), "w": weights[n]},
            plain_step(most),
            **more,
        )
        for n in ("w", "up")[: 1 + gated]
    ]
    if gated:
        p = one_op(lambda p, s, a, b: ops.silu_mul(a, b), a=rows, b=rows)
        both = {name: padded(rows) for name, rows in zip("ab", alone, strict=True)}
        want = run(p, both, plain_step(most)).astype(np.float64)
        assert_close(whole, want, "float32")  # numpy's products differ with a row's place
    else:
        assert whole.tobytes() == alone[0].tobytes()


def padded(rows: np.ndarray) -> np.ndarray:
    """As an operand's table."""
    return np.concatenate([rows, np.zeros((ROWS - len(rows), rows.shape[1]), np.float32)])


def normed_rows(p: Program, step: ops.StepHandles, x: ops.Handle) -> ops.Handle:
    return ops.rms_norm(x, p.weight("norm", (256,)), eps=1e-5, offset=0.5)


@pytest.mark.parametrize("name", QUANTISED)
def test_hostile_weights(name: str) -> None:
    """Rows of zero bytes, of one bit, of every bit but a float's exponents."""
    fmt = FORMATS[name]
    columns = fmt.block_elements
    data = np.zeros((4, fmt.row_bytes(columns)), np.uint8)
    data[1, -1] = 1
    data[2] = 0x1B  # no field of a format is infinite or NaN by it
    data[3] = 0x9B
    if name == "NVFP4":
        data[:2, 4:8] = np.ones(1, "<f4").view(np.uint8)  # what a row is divided by
    w = RawWeight(name, fmt, (4, columns), {"data": data.reshape(-1)})
    x = table(columns, 1.0)
    got = run(linear_program(4, columns), {"x": x, "w": w}, plain_step(3))
    values = dequantise(w).astype(np.float64)
    size = np.abs(x[:3]).astype(np.float64) @ np.abs(values).T
    assert (np.abs(got - x[:3].astype(np.float64) @ values.T) <= 1e-6 * size + 1e-37).all()


@pytest.mark.parametrize("target", ["INT8", "INT4"])
def test_quantising_on_load_has_the_references_weights(target: str) -> None:
    """Of a table that is also a layer, and of a layer of its own."""
    w = RawWeight("w", F32, (70, 96), raw(table(96, 1.0, 70)).buffers, FORMATS[target])
    program = linear_program(70, 96)
    weights = {"x": table(96, 1.0), "w": w}
    want = run_reference(program, weights, plain_step(18)).astype(np.float64)
    assert_close(run(program, weights, plain_step(18)), want, "float32", 4e-6)
    backend = TritonBackend(activation_dtype="float32", threads=1)
    raws = {"x": raw(table(96, 1.0)), "w": w}
    executable = backend.lower(program, {n: backend.pack(r) for n, r in raws.items()}, None)
    assert executable.weights_bytes == backend.weights_bytes(program, raws)
    values = table(96, 1.0, 70)
    values[3, 5] = np.nan
    bad = RawWeight("w", F32, (70, 96), raw(values).buffers, FORMATS[target])
    with pytest.raises(WeightTooLarge, match="row 3 holds a NaN"):
        run(program, {"x": table(96, 1.0), "w": bad}, plain_step(1))


def test_activations_that_cannot_multiply_a_weight_are_refused() -> None:
    x = table(256, 1.0)
    for name, activations in (
        ("Q6_K", "int8"),
        ("NF4", "int8"),
        ("FP8", "int8"),
        ("Q8_0", "fp8"),
    ):
        weights = {"x": x, "w": quantised(name, 3, 256)}
        with pytest.raises(BackendUnavailable, match=f"{activations}.*is {name}, which"):
            run(linear_program(3, 256), weights, plain_step(1), activations=activations)
    with pytest.raises(ValueError, match="activations='int4' is unknown"):
        TritonBackend(threads=1, activations="int4")


def test_a_nan_among_fp8_codes_is_refused() -> None:
    w = quantised("FP8", 3, 64)
    w.data[-1] = 0xFF
    with pytest.raises(ValueError, match="weight 'FP8' holds a NaN"):
        run(linear_program(3, 64), {"x": table(64), "w": w}, plain_step(1))


def test_what_has_no_kernel_is_refused() -> None:
    backend = TritonBackend(threads=1)
    mixed = WeightGroup((raw(table(256, 1.0)), quantised("Q8_0", 4, 256)))
    with pytest.raises(ValueError, match="mixes F32, Q8_0"):
        backend.pack(mixed)
    turned = replace(quantised("Q8_0", 4, 256), columns=np.arange(255, -1, -1, dtype=np.int32))
    p = Program()
    ids = ops.StepHandles.of(p).token_ids
    p.finish(ops.embedding(p.weight("w", (4, 256)), ids))
    with pytest.raises(ValueError, match="another order .act-order."):
        run(p, {"w": turned}, plain_step(1))
    strange = replace(quantised("Q8_0", 4, 256), format=replace(FORMATS["Q8_0"], name="Q9"))
    with pytest.raises(ValueError, match="format Q9 has no kernel in the Triton backend"):
        backend.pack(WeightGroup((strange, quantised("Q8_0", 4, 256))))
    norm = RawWeight("n", Q4_K, (256,), {"data": random_blocks(RNG, Q4_K, 1)})
    with pytest.raises(ValueError, match="norms are floats"):
        backend.pack(norm)
    with pytest.raises(ValueError, match="one dimension .norms, biases. or two"):
        backend.pack(RawWeight("x", F32, (1, 1, 1), {"data": np.zeros(4, np.uint8)}))


# ------------------------------------------------------------------------------ whole programs


def normed_heads(kv_heads: int, dim: int, pairs: int) -> Program:
    """Two query heads to a kv head; the head's first 2 * pairs elements are rotated."""

    def build(p: Program, step: ops.StepHandles, x: ops.Handle) -> ops.Handle:
        frequencies = [100.0 ** (-i / pairs) for i in range(pairs)]

        def heads(name: str, count: int, offset: float) -> ops.Handle:
            y = ops.linear(x, p.weight(name, (count * dim, 24)))
            y = ops.rms_norm(y, p.weight(f"{name} norm", (dim,)), eps=1e-6, offset=offset)
            return ops.rope(y, step.positions, head_dim=dim, inv_freq=frequencies)

        k, v = heads("k", kv_heads, 1.0), ops.linear(x, p.weight("v", (kv_heads * dim, 24)))
        cache = ops.kv_write(k, v, layer=0, num_kv_heads=kv_heads, head_dim=dim)
        q, more = heads("q", 2 * kv_heads, 0.0), {"num_kv_heads": kv_heads, "head_dim": dim}
        return ops.attention(q, cache, layer=0, num_heads=2 * kv_heads, scale=0.3, **more)

    return one_op(build, x=24)


@pytest.mark.parametrize(
    ("dim", "pairs", "kv_dtype"),
    [(16, 8, "float32"), (12, 3, "int8")] + FULL * [(16, 8, "int8"), (12, 3, "float32")],
)
def test_norms_of_heads_in_one_launch_with_rope_and_the_cache(
    dim: int, pairs: int, kv_dtype: str
) -> None:
    program = normed_heads(3, dim, pairs)
    rng = np.random.default_rng(5)
    weights = {
        name: rng.standard_normal(handle.shape).astype(np.float32)
        for name, handle in program.weights.items()
    }
    kv = KVSpec(1, 3, dim, 8, kv_dtype)

    def logits(run_on, count: int) -> np.ndarray:  # type: ignore[no-untyped-def]
        pages = Paged(8, 64, np.random.default_rng(1))
        return run_on(program, weights, pages.step({pages.add(): list(range(count))}), kv=kv)

    whole = logits(run, 19)
    # A code of a key may fall on the other side of a tie.
    assert_close(whole, logits(run_reference, 19), "float32", 1e-5 if kv_dtype != "int8" else 1e-2)
    assert logits(run, 7).tobytes() == whole[:7].tobytes()


def two_layer_step(dtype: str, block_size: int = 4):  # type: ignore[no-untyped-def]
    program = programs.two_layers()
    weights = programs.random_weights(program)
    kv = KVSpec(2, 2, 8, block_size, dtype)
    return program, weights, kv


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers(dtype: str) -> None:
    program, weights, kv = two_layer_step(dtype)
    pages = Paged(4, 64, np.random.default_rng(1))
    a, b = pages.add(), pages.add()
    step = pages.step({a: RNG.integers(0, 200, 13).tolist(), b: [5]}, padding=2)
    got = run(program, weights, step, dtype=dtype, kv=kv)
    want = run_reference(program, weights, step, dtype=dtype, kv=kv)
    assert got.shape == want.shape
    loose = {"float32": 1e-5, "float16": 2e-2}[dtype]
    assert np.abs(got - want).max() <= loose * np.abs(want).max()


def test_two_layers_do_not_depend_on_chunks_or_neighbours() -> None:
    program, weights, _ = two_layer_step("float32")
    tokens = np.random.default_rng(7).integers(0, 200, 21).tolist()

    def logits(block_size: int, cuts: list[int], neighbour: bool) -> bytes:
        backend = TritonBackend(activation_dtype="float32", threads=1)
        packed = {name: backend.pack(raw(w, name=name)) for name, w in weights.items()}
        cache = backend.allocate_kv(KVSpec(2, 2, 8, block_size, "float32"), 64)
        for half in (cache.keys, cache.values):
            half.data.fill_(float("nan"))
        executable = backend.lower(program, packed, cache)
        pages = Paged(block_size, 64, np.random.default_rng(2))
        ours, other = pages.add(), pages.add()
        out, start = [], 0
        for stop in cuts:
            chunks = {ours: tokens[start:stop]}
            if neighbour:
                chunks = {other: [9, 8, 7]} | chunks
            first = 3 if neighbour else 0
            rows = list(range(first, first + stop - start))
            step = pages.step(chunks, padding=2 * neighbour, logit_rows=rows)
            out.append(executable.run(step).numpy())
            start = stop
        return np.concatenate(out).tobytes()

    whole = logits(16, [21], False)
    assert logits(4, [5, 6, 21], False) == whole
    assert logits(8, [1, 20, 21], True) == whole


def test_lowering_is_within_the_planned_workspace() -> None:
    program, weights, kv = two_layer_step("float32")
    backend = TritonBackend(activation_dtype="float32", threads=1)
    raws = {name: raw(w, name=name) for name, w in weights.items()}
    packed = {name: backend.pack(w) for name, w in raws.items()}
    executable = backend.lower(program, packed, backend.allocate_kv(kv, 64))
    pages = Paged(4, 64, np.random.default_rng(1))
    executable.run(pages.step({pages.add(): list(range(23))}))
    assert 0 < executable.workspace_bytes <= backend.workspace_bytes(program, 23, 23, 256)
    assert executable.weights_bytes == backend.weights_bytes(program, raws)


def test_steps_that_do_not_exist_are_refused() -> None:
    program, weights, kv = two_layer_step("float32")
    backend = TritonBackend(activation_dtype="float32", threads=1)
    packed = {name: backend.pack(raw(w, name=name)) for name, w in weights.items()}
    executable = backend.lower(program, packed, backend.allocate_kv(kv, 2))
    pages = Paged(4, 2, np.random.default_rng(1))
    good = pages.step({pages.add(): [1, 2, 3]})
    for name, index, value, message in (
        ("token_ids", 0, 200, "token ids .* vocabulary of 200"),
        ("slot", 0, 8, "slots .* cache of 8"),
        ("block_table", (0, 0), 2, "blocks .* cache of 2"),
        ("logit_rows", 0, 3, "logit rows .* step of 3"),
        ("seq_len", 0, 5, "sequence of 5 tokens needs 2 blocks"),
    ):
        array = getattr(good, name)
        before = array[index]
        array[index] = value
        with pytest.raises(ValueError, match=message):
            executable.run(good)
        array[index] = before
    assert torch.isfinite(torch.from_numpy(executable.run(good).numpy())).all()
