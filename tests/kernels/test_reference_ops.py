"""The reference's elementwise and linear operations: against float64 numpy, and law 2 as bits."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference backend needs torch")

from engineroom.kernels import ops  # noqa: E402
from engineroom.kernels.program import Program  # noqa: E402
from engineroom.kernels.reference import ReferenceBackend, elementwise  # noqa: E402
from engineroom.kernels.reference.linear import tile_rows  # noqa: E402
from engineroom.kernels.weights import (  # noqa: E402
    BF16,
    F16,
    F32,
    FORMATS,
    Q4_K,
    Q8_0,
    RawWeight,
    WeightGroup,
)
from engineroom.quant.values import dequantise  # noqa: E402
from tests.counts import count  # noqa: E402
from tests.kernels.packed_steps import (  # noqa: E402
    DTYPES,
    ROWS,
    assert_close,
    one_op,
    plain_step,
    random_rows,
    raw,
    rounded,
    run,
)

RNG = np.random.default_rng(20240)


def table(width: int, spread: float = 3.0) -> np.ndarray:
    return (RNG.standard_normal((ROWS, width)) * spread).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rotate(x, positions, head_dim, inv_freq, factor, interleaved):  # type: ignore[no-untyped-def]
    """Rope pair by pair, in float64 but for the angle, whose fp32 product is the contract."""
    out = x.astype(np.float64).copy()
    f = len(inv_freq)
    for t, p in enumerate(positions):
        for head in range(x.shape[1] // head_dim):
            for j in range(f):
                a = head * head_dim + (2 * j if interleaved else j)
                b = head * head_dim + (2 * j + 1 if interleaved else j + f)
                angle = float(np.float32(p) * np.float32(inv_freq[j]))
                c, s = math.cos(angle) * factor, math.sin(angle) * factor
                out[t, a], out[t, b] = x[t, a] * c - x[t, b] * s, x[t, b] * c + x[t, a] * s
    return out


# Name -> (operand widths, what records it, the float64 oracle). Widths are odd on purpose.
WEIGHT_7 = RNG.standard_normal(7).astype(np.float32)
INV_FREQ = tuple(10000.0 ** (-i / 5) for i in range(5))
CASES = {
    "add": (
        {"a": 13, "b": 13},
        lambda p, s, a, b: ops.add(a, b),
        lambda a, b: a + b,
    ),
    "scale": (
        {"a": 13},
        lambda p, s, a: ops.scale(a, 0.37),
        lambda a: a * float(np.float32(0.37)),
    ),
    "softcap": (
        {"a": 13},
        lambda p, s, a: ops.softcap(a, 2.5),
        lambda a: 2.5 * np.tanh(a / 2.5),
    ),
    "silu_mul": (
        {"a": 13, "b": 13},
        lambda p, s, a, b: ops.silu_mul(a, b),
        lambda a, b: a * sigmoid(a) * b,
    ),
    "gelu_tanh_mul": (
        {"a": 13, "b": 13},
        lambda p, s, a, b: ops.gelu_tanh_mul(a, b),
        lambda a, b: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) * b,
    ),
    "clamped_silu_mul": (
        {"a": 13, "b": 13},
        lambda p, s, a, b: ops.clamped_silu_mul(ops.scale(a, 4.0), ops.scale(b, 4.0)),
        lambda a, b: (
            np.minimum(4 * a, 7)
            * sigmoid(1.702 * np.minimum(4 * a, 7))
            * (np.clip(4 * b, -7, 7) + 1)
        ),
    ),
    "rms_norm": (
        {"a": 7},
        lambda p, s, a: ops.rms_norm(a, p.weight("w", (7,)), eps=1e-5),
        lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5) * WEIGHT_7,
    ),
    "rms_norm per head, offset 1": (
        {"a": 21},
        lambda p, s, a: ops.rms_norm(a, p.weight("w", (7,)), eps=1e-6, offset=1.0),
        lambda a: (
            a.reshape(-1, 3, 7)
            / np.sqrt((a.reshape(-1, 3, 7) ** 2).mean(-1, keepdims=True) + 1e-6)
            * (1.0 + WEIGHT_7)
        ).reshape(a.shape),
    ),
    "rope": (
        {"a": 30},
        lambda p, s, a: ops.rope(a, s.positions, head_dim=10, inv_freq=INV_FREQ),
        lambda a: rotate(a, range(len(a)), 10, INV_FREQ, 1.0, False),
    ),
    "rope interleaved, partial, scaled": (
        {"a": 28},
        lambda p, s, a: ops.rope(
            a, s.positions, head_dim=14, inv_freq=INV_FREQ, attention_factor=1.3, interleaved=True
        ),
        lambda a: rotate(a, range(len(a)), 14, INV_FREQ, 1.3, True),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_op_is_its_formula(name: str, dtype: str) -> None:
    widths, build, formula = CASES[name]
    program = one_op(build, **widths)
    for num_tokens in (1, 5, 17, ROWS):
        tables = {key: table(width) for key, width in widths.items()}
        weights = dict(tables, **({"w": WEIGHT_7} if "w" in program.weights else {}))
        got = run(program, weights, plain_step(num_tokens), dtype=dtype)
        operands = {key: rounded(t[:num_tokens], dtype) for key, t in tables.items()}
        want = formula(*operands.values())
        assert got.shape == want.shape
        assert_close(got, want, dtype)
        assert np.array_equal(rounded(got, dtype), got)  # rounded to the activation dtype


@pytest.mark.parametrize("name", CASES)
def test_op_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    widths, build, _ = CASES[name]
    program = one_op(build, **widths)
    weights = {key: table(width, 5.0) for key, width in widths.items()}
    if "w" in program.weights:
        weights["w"] = WEIGHT_7
    positions = RNG.permutation(5000)[:ROWS].tolist()
    whole = run(program, weights, plain_step(ROWS, positions))
    for _ in range(count(reduced=12, full=200)):
        picked = RNG.permutation(ROWS)[: RNG.integers(1, ROWS)]
        step = plain_step(len(picked), [positions[i] for i in picked])
        step.token_ids[:] = picked
        some = run(program, weights, step, threads=int(RNG.integers(1, 3)))
        assert some.tobytes() == whole[picked].tobytes()


def test_rope_far_from_the_start() -> None:
    """There the fp32 product of position and frequency is what decides the angle."""
    x, positions = table(30), [131071, 99991, 65537, 1_000_003]
    build = CASES["rope"][1]
    got = run(one_op(build, a=30), {"a": x}, plain_step(4, positions))
    assert_close(got, rotate(x[:4], positions, 10, INV_FREQ, 1.0, False), "float32")


@pytest.mark.parametrize("function", [torch.exp, torch.tanh], ids=["exp", "tanh"])
def test_in_whole_vectors(function) -> None:  # type: ignore[no-untyped-def]
    """An element's value does not depend on its place, and the edges are exact."""
    x = torch.randn(4099) * 20
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = elementwise.in_whole_vectors(function, x)
        for _ in range(200):
            start, size = int(RNG.integers(0, 4000)), int(RNG.integers(1, 99))
            some = elementwise.in_whole_vectors(function, x[start : start + size])
            assert torch.equal(some, whole[start : start + size])
        edge = torch.tensor([0.0, -0.0, -torch.inf])
        want = [1.0, 1.0, 0.0] if function is torch.exp else [0.0, 0.0, -1.0]
        assert elementwise.in_whole_vectors(function, edge).tolist() == want
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 80, 576, 1001])
def test_row_sum(n: int) -> None:
    x = RNG.standard_normal((9, n)).astype(np.float32)
    got = elementwise.row_sum(torch.from_numpy(x.copy())).numpy()
    want = x.astype(np.float64).sum(-1, keepdims=True)
    # log2(n) roundings of partial sums, none above the sum of magnitudes
    bound = 2.0**-24 * (math.ceil(math.log2(n)) if n > 1 else 0) * np.abs(x).sum(-1, keepdims=True)
    assert (np.abs(got - want) <= bound).all()


def quantised(fmt, rows: int, columns: int) -> RawWeight:  # type: ignore[no-untyped-def]
    data = random_rows(RNG, fmt, rows, columns)
    return RawWeight("w", fmt, (rows, columns), {"data": data})


def linear_program(n: int, k: int, bias: bool = False) -> Program:
    def build(p, s, a):  # type: ignore[no-untyped-def]
        return ops.linear(a, p.weight("w", (n, k)), p.weight("b", (n,)) if bias else None)

    return one_op(build, a=k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (130, 172), (3, 4100)], ids=str)
def test_linear_with_bias(shape, fmt, dtype) -> None:  # type: ignore[no-untyped-def]
    n, k = shape
    weight = raw(RNG.standard_normal(shape), fmt)
    bias = RNG.standard_normal(n).astype(np.float32)
    x = table(k, 1.0)
    program = linear_program(n, k, bias=True)
    for num_tokens in (1, 16, 17):
        step = plain_step(num_tokens)
        got = run(program, {"a": x, "w": weight, "b": bias}, step, dtype=dtype)
        want = rounded(x[:num_tokens], dtype) @ dequantise(weight).astype(np.float64).T + bias
        assert_close(got, want, dtype, fp32_error=4e-6 * math.sqrt(k))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_linear_multiplies_the_dequantised_values(fmt) -> None:  # type: ignore[no-untyped-def]
    """Bit for bit: a weight and its own float32 values give the same product."""
    n, k = tile_rows(512) * 2 + 5, 512  # two whole tiles and a short one of odd height
    weight = quantised(fmt, n, k)
    x, program = table(k), linear_program(n, k)
    got = run(program, {"a": x, "w": weight}, plain_step(19))
    assert (
        got.tobytes() == run(program, {"a": x, "w": dequantise(weight)}, plain_step(19)).tobytes()
    )
    want = x[:19].astype(np.float64) @ dequantise(weight).astype(np.float64).T
    assert_close(got, want, "float32", fp32_error=2e-5)


def test_linear_over_a_group_of_formats_is_its_parts() -> None:
    parts = [quantised(Q8_0, 40, 256), quantised(Q4_K, 3, 256), raw(table(256)[:9])]
    x = table(256)
    grouped = run(linear_program(52, 256), {"a": x, "w": WeightGroup(tuple(parts))}, plain_step(3))
    alone = [run(linear_program(p.shape[0], 256), {"a": x, "w": p}, plain_step(3)) for p in parts]
    assert grouped.tobytes() == np.concatenate(alone, axis=1).tobytes()


@pytest.mark.parametrize("shape", [(5, 8), (48, 64), (300, 172), (64, 576), (160, 1536)], ids=str)
def test_linear_rows_do_not_depend_on_their_neighbours(shape) -> None:  # type: ignore[no-untyped-def]
    n, k = shape
    weights = {"a": table(k), "w": RNG.standard_normal(shape).astype(np.float32)}
    program = linear_program(n, k)
    whole = run(program, weights, plain_step(ROWS))
    for trial in range(count(reduced=10, full=100)):
        picked = RNG.permutation(ROWS)[: RNG.integers(1, 65)]
        step = plain_step(len(picked))
        step.token_ids[:] = picked
        some = run(program, weights, step, threads=1 + trial % 3)
        assert some.tobytes() == whole[picked].tobytes()


def test_linear_does_not_depend_on_where_the_weight_lies() -> None:
    values = RNG.standard_normal((70, 96)).astype(np.float32)
    program, x = linear_program(70, 96), table(96)
    results = set()
    for offset in (0, 1, 4, 20, 32):
        room = np.zeros(values.nbytes + 128, dtype=np.uint8)
        start = -room.ctypes.data % 64 + offset
        room[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
        weight = RawWeight("w", F32, (70, 96), {"data": room[start : start + values.nbytes]})
        results.add(run(program, {"a": x, "w": weight}, plain_step(5)).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("fmt", [F32, BF16, Q8_0], ids=lambda f: f.name)
def test_embedding_reads_rows(fmt) -> None:  # type: ignore[no-untyped-def]
    weight = quantised(fmt, 50, 64)
    program = Program()
    step = ops.StepHandles.of(program)
    program.finish(ops.embedding(program.weight("table", (50, 64)), step.token_ids))
    inputs = plain_step(7)
    inputs.token_ids[:] = [49, 0, 3, 3, 48, 1, 49]
    got = run(program, {"table": weight}, inputs)
    assert got.tobytes() == dequantise(weight)[inputs.token_ids].tobytes()
    group = WeightGroup((weight.rows(0, 3), weight.rows(3, 50)))
    assert run(program, {"table": group}, inputs).tobytes() == got.tobytes()
    for bad in (-1, 50):
        inputs.token_ids[2] = bad
        with pytest.raises(ValueError, match="do not all lie in the 50 rows of 'w'"):
            run(program, {"table": weight}, inputs)


def test_select_rows_takes_any_rows_and_none() -> None:
    program = one_op(lambda p, s, a: a, a=5)
    x, step = table(5), plain_step(6)
    for rows in ([5, 0, 0], []):
        object.__setattr__(step, "logit_rows", np.array(rows, dtype=np.int32))
        got = run(program, {"a": x}, step)
        assert got.tobytes() == x[rows].tobytes() and got.shape == (len(rows), 5)


def test_logits_stay_fp32_and_hidden_values_do_not() -> None:
    """Back from the result through softcap and scale to the head's product."""
    x, w = table(32), table(32)[:20]
    program = Program()
    step = ops.StepHandles.of(program)
    hidden = ops.embedding(program.weight("a", (ROWS, 32)), step.token_ids)
    hidden = ops.add(hidden, hidden)
    logits = ops.linear(ops.select_rows(hidden, step.logit_rows), program.weight("w", (20, 32)))
    program.finish(ops.softcap(ops.scale(logits, 0.1), 30.0))
    got = run(program, {"a": x, "w": w}, plain_step(9), dtype="bfloat16")
    kept = rounded(2 * rounded(x[:9], "bfloat16"), "bfloat16") @ w.astype(np.float64).T * 0.1
    assert_close(got, 30 * np.tanh(kept / 30), "float32")
    assert not np.array_equal(rounded(got, "bfloat16"), got)


def test_lower_says_what_does_not_fit() -> None:
    backend = ReferenceBackend(threads=1)
    program = linear_program(4, 8)
    a, w = backend.pack(raw(table(8))), backend.pack(raw(table(8)[:4]))
    with pytest.raises(ValueError, match="not finished"):
        backend.lower(Program(), {}, None)
    with pytest.raises(ValueError, match=r"not given: w$"):
        backend.lower(program, {"a": a}, None)
    with pytest.raises(ValueError, match=r"'w' is \[96, 8\], the program reads it as \[4, 8\]"):
        backend.lower(program, {"a": a, "w": a}, None)
    odd = Program()
    rows = odd.append("gather", (odd.input("token_ids", ("T",)),), {}, ("T", 1))
    with pytest.raises(ValueError, match="no operation 'gather'; it has add, attention"):
        backend.lower(odd.finish(rows), {"w": w}, None)
    with pytest.raises(ValueError, match="one dimension"):
        backend.pack(raw(np.zeros((2, 2, 2))))


def test_backend_refuses_unknown_options() -> None:
    with pytest.raises(ValueError, match="supported: float32, bfloat16, float16"):
        ReferenceBackend(activation_dtype="float64")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        ReferenceBackend(threads=0)


def test_running_leaves_torch_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        program = one_op(lambda p, s, a: a, a=5)
        run(program, {"a": table(5)}, plain_step(2))
        step = plain_step(2)
        step.token_ids[:] = ROWS
        with pytest.raises(ValueError):
            run(program, {"a": table(5)}, step)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_engines_of_one_process_do_not_disturb_each_other() -> None:
    program, weights = linear_program(300, 172), {"a": table(172), "w": table(172)[:75]}
    weights["w"] = np.concatenate([weights["w"]] * 4)
    want = run(program, weights, plain_step(40)).tobytes()
    before = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(run, program, weights, plain_step(40), threads=1 + i % 3) for i in range(24)
        ]
        assert {job.result().tobytes() for job in jobs} == {want}
    assert torch.get_num_threads() == before


def test_packed_bytes_counts_copies_only() -> None:
    backend = ReferenceBackend(threads=1)
    weights = {"m": raw(np.zeros((3, 8)), F16), "v": raw(np.zeros(8), F16)}
    assert backend.weights_bytes(Program(), weights) == 48 + (16 + 32)
    assert backend.pack(raw(np.arange(8.0), F16)).tolist() == list(range(8))
