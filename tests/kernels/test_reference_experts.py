"""The reference of a mixture of experts: against float64 numpy, and law 2 as bits."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference backend needs torch")

from engineroom.kernels import ops  # noqa: E402
from engineroom.kernels.program import Program  # noqa: E402
from engineroom.kernels.reference import experts as mix  # noqa: E402
from engineroom.kernels.weights import BF16, F16, F32, Q8_0, RawWeight, WeightGroup  # noqa: E402
from engineroom.quant.values import dequantise  # noqa: E402
from tests.counts import count  # noqa: E402
from tests.kernels.packed_steps import (  # noqa: E402
    DTYPES,
    ROWS,
    assert_close,
    one_op,
    plain_step,
    random_rows,
    rounded,
    run,
)

RNG = np.random.default_rng(77)
EXPERTS, TOP_K = 5, 3


def table(width: int, spread: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal((ROWS, width)) * spread).astype(np.float32)


def chosen(logits: np.ndarray, top_k: int = TOP_K) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def routed(build, **widths: int) -> Program:  # type: ignore[no-untyped-def]
    """A program over operands and the experts that its operand `logits` chooses."""

    def all_of(p, s, logits, **operands):  # type: ignore[no-untyped-def]
        return build(p, logits, ops.top_experts(logits, TOP_K), **operands)

    return one_op(all_of, logits=EXPERTS, **widths)


def test_the_best_come_first_and_ties_go_to_the_lower_id() -> None:
    inf, nan = np.inf, np.nan
    logits = np.array(
        [
            [1, 3, 2, 3, 0],
            [0, 0, 0, 0, 0],
            [nan, 1, nan, -inf, 2],
            [nan, nan, nan, nan, nan],
            [-inf, inf, nan, -inf, inf],
        ],
        np.float32,
    )
    want = [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4], [4, 1, 3, 0, 2], [0, 1, 2, 3, 4], [1, 4, 0, 3, 2]]
    for top_k in range(1, 6):
        ids = mix.top_experts(torch.from_numpy(logits), top_k)
        assert ids.int().tolist() == [row[:top_k] for row in want]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_are_not_rounded(dtype: str) -> None:
    """Of 3,000 experts the ids are no numbers of 16 bits."""
    program = one_op(lambda p, s, a: ops.top_experts(a, 2), a=3000)
    logits = np.zeros((ROWS, 3000), np.float32)
    logits[:, [2049, 2999]] = [1, 2]
    got = run(program, {"a": logits}, plain_step(2), dtype=dtype)
    assert got.tolist() == [[2999, 2049]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_the_softmax(renormalise: bool, dtype: str) -> None:
    program = routed(lambda p, logits, e: ops.expert_weights(logits, e, renormalise=renormalise))
    logits = table(EXPERTS, 3.0)
    got = run(program, {"logits": logits}, plain_step(ROWS), dtype=dtype)
    wide = rounded(logits, dtype)
    powers = np.exp(wide - wide.max(1, keepdims=True))
    picked = np.take_along_axis(powers, chosen(wide), 1)
    want = picked / (picked if renormalise else powers).sum(1, keepdims=True)
    assert_close(got, want, dtype)
    assert np.array_equal(rounded(got, dtype), got)


def by_expert(x: np.ndarray, w: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """expert_linear in float64, place by place; x [T, K] or [T, k*K]."""
    matrices = w.reshape(EXPERTS, -1, w.shape[1]).astype(np.float64)
    places = np.broadcast_to(x.reshape(len(x), -1, w.shape[1]), (*experts.shape, w.shape[1]))
    return np.einsum("tjk,tjnk->tjn", places, matrices[experts]).reshape(len(x), -1)


def linear_program(rows: int, width: int, own: bool, bias: bool = False) -> Program:
    def build(p, logits, experts, x):  # type: ignore[no-untyped-def]
        weight = p.weight("w", (EXPERTS * rows, width))
        added = p.weight("b", (EXPERTS * rows,)) if bias else None
        return ops.expert_linear(x, weight, experts, added, num_experts=EXPERTS)

    return routed(build, x=width * (TOP_K if own else 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True], ids=["one row", "a row for each"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (130, 172)], ids=str)
def test_expert_linear_is_its_formula(shape, own: bool, dtype: str) -> None:  # type: ignore[no-untyped-def]
    rows, width = shape
    logits, x = table(EXPERTS), table(width * (TOP_K if own else 1))
    w = RNG.standard_normal((EXPERTS * rows, width)).astype(np.float32)
    for num_tokens in (1, 17, 40):
        weights = {"logits": logits, "x": x, "w": w}
        got = run(linear_program(rows, width, own), weights, plain_step(num_tokens), dtype=dtype)
        experts = chosen(rounded(logits[:num_tokens], dtype))
        want = by_expert(rounded(x[:num_tokens], dtype), w, experts)
        assert_close(got, want, dtype, fp32_error=4e-6 * width**0.5)


def test_each_expert_adds_its_own_bias() -> None:
    logits, x = table(EXPERTS), table(31)
    w = RNG.standard_normal((EXPERTS * 17, 31)).astype(np.float32)
    b = RNG.standard_normal(EXPERTS * 17).astype(np.float32)
    program = linear_program(17, 31, False, bias=True)
    got = run(program, {"logits": logits, "x": x, "w": w, "b": b}, plain_step(40))
    experts = chosen(logits[:40])
    want = by_expert(x[:40], w, experts) + b.reshape(EXPERTS, 17)[experts].reshape(40, -1)
    assert_close(got, want, "float32", fp32_error=3e-5)


def test_experts_may_be_parts_of_several_formats() -> None:
    """Parts may hold several experts or end within one; each keeps its own values."""
    formats = [(F32, 30), (Q8_0, 20), (BF16, 7), (F16, 43)]  # 100 rows: 20 an expert
    parts = tuple(
        RawWeight(f.name, f, (n, 64), {"data": random_rows(RNG, f, n, 64)}) for f, n in formats
    )
    values = np.concatenate([dequantise(part) for part in parts])
    operands = {"logits": table(EXPERTS), "x": table(64)}
    program = linear_program(20, 64, False)
    mixed = run(program, {**operands, "w": WeightGroup(parts)}, plain_step(30))
    assert mixed.tobytes() == run(program, {**operands, "w": values}, plain_step(30)).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_sum_and_sigmoid_scale(dtype: str) -> None:
    for name, widths, formula in (
        ("expert_sum", {"x": 21, "w": 3}, lambda x, w: (x.reshape(-1, 3, 7) * w[..., None]).sum(1)),
        ("sigmoid_scale", {"x": 21, "w": 1}, lambda x, w: x / (1 + np.exp(-w))),
    ):
        program = one_op(lambda p, s, x, w, name=name: getattr(ops, name)(x, w), **widths)
        tables = {key: table(width, 3.0) for key, width in widths.items()}
        got = run(program, tables, plain_step(ROWS), dtype=dtype)
        assert_close(got, formula(*(rounded(t, dtype) for t in tables.values())), dtype)


@pytest.mark.parametrize("own", [False, True], ids=["one row", "a row for each"])
def test_rows_do_not_depend_on_their_neighbours(own: bool) -> None:
    """Nor on how many others chose the same expert, nor on threads: bit for bit."""

    def build(p, logits, experts, x):  # type: ignore[no-untyped-def]
        weight = p.weight("w", (EXPERTS * 24, 40))
        y = ops.expert_linear(x, weight, experts, num_experts=EXPERTS)
        return ops.expert_sum(y, ops.expert_weights(logits, experts, renormalise=own))

    width = 40 * (TOP_K if own else 1)
    program = routed(build, x=width)
    logits = table(EXPERTS, 2.0)
    logits[::7] = [5, 4, 3, 0, 0]  # many choose alike
    weights = {
        "logits": logits,
        "x": table(width),
        "w": RNG.standard_normal((EXPERTS * 24, 40)).astype(np.float32),
    }
    whole = run(program, weights, plain_step(ROWS))
    for trial in range(count(reduced=10, full=200)):
        picked = RNG.permutation(ROWS)[: RNG.integers(1, ROWS)]
        step = plain_step(len(picked))
        step.token_ids[:] = picked
        some = run(program, weights, step, threads=1 + trial % 3)
        assert some.tobytes() == whole[picked].tobytes()


def test_shapes_that_do_not_fit_are_named() -> None:
    p = Program()
    x, logits = (p.input(f"i{n}", ("T", n)) for n in (8, 4))
    experts = ops.top_experts(logits, 2)
    with pytest.raises(ops.ShapeError, match="5 of the 4 experts"):
        ops.top_experts(logits, 5)
    with pytest.raises(ops.ShapeError, match="not 3 equal parts"):
        ops.expert_linear(x, p.weight("a", (20, 8)), experts, num_experts=3)
    with pytest.raises(ops.ShapeError, match="a row of x must be 5 or 2 times 5 wide"):
        ops.expert_linear(x, p.weight("b", (20, 5)), experts, num_experts=4)
    with pytest.raises(ops.ShapeError, match=r"weight is c \[20, 8\], bias is d \[5\]"):
        bias = p.weight("d", (5,))
        ops.expert_linear(x, p.weight("c", (20, 8)), experts, bias, num_experts=4)
    with pytest.raises(ops.ShapeError, match="expected one column"):
        ops.sigmoid_scale(x, logits)
    with pytest.raises(ops.ShapeError, match=r"expert_sum: x is i8 \[T, 8\], weights is"):
        ops.expert_sum(x, p.input("i3", ("T", 3)))
