"""Mixtures of experts of the Triton backend on the interpreter, beside the reference.

fp32 and fp16: the interpreter's bf16 is wrong. Law 2 as bits, as far as numpy's products show it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.backend import BackendUnavailable, KVSpec
from engineroom.kernels.program import Program
from engineroom.kernels.weights import F16, FORMATS, RawWeight, WeightGroup
from engineroom.quant.values import dequantise
from tests.counts import FULL, count
from tests.kernels import programs
from tests.kernels.packed_steps import (
    ROWS,
    Paged,
    assert_close,
    one_op,
    plain_step,
    random_rows,
    raw,
)
from tests.kernels.packed_steps import run as run_reference
from tests.kernels.test_triton_graphs import Recorder
from tests.kernels.triton_device import DTYPES, TritonBackend, run, torch

from engineroom.kernels.triton import expert_linear, experts, graphs, linear  # isort: skip
from engineroom.kernels.triton.quantised import LAYOUTS  # isort: skip

RNG = np.random.default_rng(43)


def table(width: int, spread: float = 1.0, rows: int = ROWS) -> np.ndarray:
    return (RNG.standard_normal((rows, width)) * spread).astype(np.float32)


def routed(
    num_experts: int, top_k: int, rows: int, width: int, own: bool, bias: bool = False
) -> Program:
    """expert_linear of operand x by the experts that operand `logits` chooses."""

    def build(p: Program, s: Any, logits: Any, x: Any) -> Any:
        weight = p.weight("w", (num_experts * rows, width))
        chosen = ops.top_experts(logits, top_k)
        added = p.weight("b", (num_experts * rows,)) if bias else None
        return ops.expert_linear(x, weight, chosen, added, num_experts=num_experts)

    return one_op(build, logits=num_experts, x=width * (top_k if own else 1))


def favourites(num_experts: int, top_k: int) -> np.ndarray:
    """Logits of tokens that choose by chance, then of many that choose the same few; the second
    expert is never chosen where it can be helped."""
    logits = table(num_experts, 2.0)
    logits[40:80] = np.arange(num_experts)[::-1]
    if top_k < num_experts:
        logits[:, 1] = -50.0
    return logits


@pytest.mark.parametrize("num_experts", [9, 200])
def test_routing_is_the_references(num_experts: int) -> None:
    """Ties, infinities and NaN among the logits, and zeros of both signs."""
    logits = RNG.integers(-3, 4, (ROWS, num_experts)).astype(np.float32)
    logits[0] *= -0.0
    logits[1, ::2] = -0.0
    logits[3, 2], logits[4, 1:3], logits[5], logits[6] = np.nan, np.nan, np.nan, -np.inf
    logits[7], logits[7, 3], logits[8, 5] = np.nan, -np.inf, np.inf
    step = plain_step(12)
    every = one_op(lambda p, s, a: ops.top_experts(a, 9), a=num_experts)
    got = run(every, {"a": logits}, step)
    assert np.array_equal(got, run_reference(every, {"a": logits}, step))
    for renormalise in (True, False):

        def build(p: Program, s: Any, a: Any, renormalise: bool = renormalise) -> Any:
            return ops.expert_weights(a, ops.top_experts(a, 3), renormalise=renormalise)

        program = one_op(build, a=num_experts)
        want = run_reference(program, {"a": logits}, step)
        with np.errstate(invalid="ignore"):
            got = run(program, {"a": logits}, step)
        np.testing.assert_allclose(got, want, rtol=4e-6)


def test_ids_are_not_rounded() -> None:
    """Of 3,000 experts the ids are no numbers of 16 bits."""
    program = one_op(lambda p, s, a: ops.top_experts(a, 2), a=3000)
    logits = np.zeros((ROWS, 3000), np.float32)
    logits[:, [2049, 2999]] = [1, 2]
    got = run(program, {"a": logits}, plain_step(2), dtype="float16")
    assert got.tolist() == [[2999, 2049]] * 2


def test_pairs_are_sorted_by_expert_and_every_tile_fits() -> None:
    """Lists, starts and ends as numpy has them, across the sorter's blocks."""
    for num_tokens, num_experts, top_k in ((1, 4, 1), (7, 9, 3), (700, 5, 2), (40, 70, 4)):
        chosen = np.argsort(RNG.random((num_tokens, num_experts)), axis=1)[:, :top_k]
        if num_experts == 5:
            chosen[:, 0], chosen[:, 1] = 3, 1  # all choose alike
        size = experts.Route.size(num_tokens, num_experts, top_k)
        route = experts.Route.of(torch.full((size,), -1, dtype=torch.int32), num_experts)
        experts.sort(torch.from_numpy(chosen.astype(np.float32)), route)
        counts = np.bincount(chosen.ravel(), minlength=num_experts)
        assert route.counts.tolist() == counts.tolist()
        assert route.starts.tolist() == (np.cumsum(counts) - counts).tolist()
        assert route.pairs.tolist() == np.argsort(chosen.ravel(), kind="stable").tolist()
        for width, ends in zip(linear.TOKENS, route.ends, strict=True):
            assert ends.tolist() == np.cumsum(-(-counts // width)).tolist()
            most = expert_linear.most_tiles(chosen.size, num_experts, width)
            assert ends[-1] <= most <= chosen.size // width + num_experts


# Experts, places, rows of an expert and columns: odd everything, one past a tile, whole steps.
SHAPES = ((9, 2, 66, 64), (5, 3, 7, 33), (4, 1, 65, 32))
STEPS = ((1, 0), (33, 25), (7, 0))  # tokens, and the first of them


@pytest.mark.parametrize(
    "dtype,own",
    [("float32", True), ("float16", False)] + FULL * [("float32", False), ("float16", True)],
)
def test_expert_linear_is_the_references(dtype: str, own: bool) -> None:
    for i, (num_experts, top_k, rows, width) in enumerate(SHAPES):
        program = routed(num_experts, top_k, rows, width, own, bias=own)
        w = table(width, rows=num_experts * rows)
        weights = {
            "logits": favourites(num_experts, top_k),
            "x": table(width * (top_k if own else 1)),
            "w": raw(w, F16) if rows == 7 else w,
        }
        if own:
            weights["b"] = table(1, rows=num_experts * rows).ravel()
        for num_tokens, first in STEPS if FULL else STEPS[:i] + STEPS[i + 1 :]:
            step = plain_step(num_tokens)
            step.token_ids[:] += first
            want = run_reference(program, weights, step, dtype=dtype).astype(np.float64)
            got = run(program, weights, step, dtype=dtype)
            assert_close(got, want, dtype, 4e-6)


@pytest.mark.parametrize("name", list(LAYOUTS) if FULL else ["Q4_K", "Q6_K", "NF4"])
def test_quantised_experts(name: str) -> None:
    """Against float64 over the specification's values; with a row of x for each place."""
    columns = max(FORMATS[name].block_elements, 96)
    columns -= columns % FORMATS[name].block_elements
    data = random_rows(RNG, FORMATS[name], 4 * 9, columns)
    w = RawWeight(name, FORMATS[name], (4 * 9, columns), {"data": data})
    logits, x = favourites(4, 2), table(2 * columns)
    got = run(routed(4, 2, 9, columns, True), {"logits": logits, "x": x, "w": w}, plain_step(18))
    values = dequantise(w).astype(np.float64).reshape(4, 9, columns)
    chosen = np.argsort(-logits[:18], axis=1, kind="stable")[:, :2]
    places = x[:18].reshape(18, 2, columns).astype(np.float64)
    want = np.einsum("tjk,tjnk->tjn", places, values[chosen]).reshape(18, -1)
    size = np.einsum("tjk,tjnk->tjn", np.abs(places), np.abs(values[chosen])).reshape(18, -1)
    assert (np.abs(got - want) <= 1e-6 * size + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_sum_and_sigmoid_scale(dtype: str) -> None:
    for name, widths in (("expert_sum", {"x": 21, "w": 3}), ("sigmoid_scale", {"x": 21, "w": 1})):
        program = one_op(lambda p, s, x, w, name=name: getattr(ops, name)(x, w), **widths)
        tables = {key: table(width, 3.0) for key, width in widths.items()}
        step = plain_step(18)
        want = run_reference(program, tables, step, dtype=dtype).astype(np.float64)
        assert_close(run(program, tables, step, dtype=dtype), want, dtype)


CASES = [("F32", "auto", True), ("Q4_1", "auto", False)]
if FULL:
    CASES += [("F32", "auto", False), ("Q4_1", "auto", True), ("Q4_0", "auto", True)]
    CASES += [("Q8_0", "int8", own) for own in (False, True)]
    CASES += [("FP8", "fp8", own) for own in (False, True)]


@pytest.mark.parametrize("name,activations,own", CASES)
def test_rows_do_not_depend_on_their_neighbours(name: str, activations: str, own: bool) -> None:
    """Nor on how many others chose the same expert, nor on their place in a tile; and a pair has
    the bits of the linear layer by its expert alone."""
    num_experts, top_k, rows, columns = 5, 3, 9, 64
    program = routed(num_experts, top_k, rows, columns, own)
    if name == "F32":
        w = raw(table(columns, rows=num_experts * rows))
    else:
        data = random_rows(RNG, FORMATS[name], num_experts * rows, columns)
        w = RawWeight(name, FORMATS[name], (num_experts * rows, columns), {"data": data})
    logits, x = favourites(num_experts, top_k), table(columns * (top_k if own else 1))
    weights = {"logits": logits, "x": x, "w": w}
    whole = run(program, weights, plain_step(60), activations=activations)
    for num_tokens in (1, 33, *RNG.integers(1, 60, count(reduced=0, full=20))):
        step = plain_step(num_tokens)
        step.token_ids[:] = picked = RNG.permutation(60)[:num_tokens]
        some = run(program, weights, step, activations=activations)
        assert some.tobytes() == whole[picked].tobytes(), num_tokens
    token, place = 50, 2  # of those that choose 0, 2, 3
    alone = one_op(lambda p, s, x: ops.linear(x, p.weight("w", (rows, columns))), x=columns)
    one = x.reshape(ROWS, -1, columns)[:, place if own else 0]
    step = plain_step(ROWS)
    want = run(alone, {"x": one, "w": w.rows(3 * rows, 4 * rows)}, step, activations=activations)
    assert whole[token, place * rows :].tobytes() == want[token].tobytes()


def lowered(dtype: str = "float32") -> tuple[Any, Any, Any, Any]:
    program = programs.mixture()
    backend = TritonBackend(activation_dtype=dtype, threads=1)
    raws = {n: raw(w, name=n) for n, w in programs.random_weights(program).items()}
    packed = {name: backend.pack(w) for name, w in raws.items()}
    cache = backend.allocate_kv(KVSpec(2, 2, 8, 4, dtype), 64)
    return program, backend, raws, backend.lower(program, packed, cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_of_mixtures(dtype: str) -> None:
    """As Mixtral has them, and as Qwen2-MoE, with a shared expert."""
    program, backend, raws, executable = lowered(dtype)
    rng = np.random.default_rng(1)
    pages = Paged(4, 64, rng)
    a, b = pages.add(), pages.add()
    step = pages.step({a: rng.integers(0, 200, 13).tolist(), b: [5]}, padding=2)
    want = run_reference(program, raws, step, dtype=dtype, kv=KVSpec(2, 2, 8, 4, dtype))
    got = executable.run(step).numpy()
    loose = {"float32": 1e-5, "float16": 2e-2}[dtype]
    far = (np.abs(got - want) > loose * np.abs(want).max()).any(1)
    # Where two experts' logits are nearly one, rounding may choose the other.
    assert far.sum() <= (dtype == "float16")
    rows = len(step.token_ids)
    assert 0 < executable.workspace_bytes <= backend.workspace_bytes(program, rows, rows, 256)
    assert executable.weights_bytes == backend.weights_bytes(program, raws)


def test_a_recorded_step_fits_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched for one choice of experts is launched again, for others."""
    eager, recorded = lowered()[-1], lowered()[-1]
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(graphs, "row_counts", lambda most: [most])
    recorded.prepare(2, 2, 8, recorder)
    pages = Paged(4, 64, np.random.default_rng(1))
    a, b = pages.add(), pages.add()
    for chunks in ({a: [5], b: [6]}, {b: [17], a: [100]}, {a: [31]}):
        step = pages.step(chunks)
        assert recorded.run(step).numpy().tobytes() == eager.run(step).numpy().tobytes()
    assert recorder.replayed == 3


def test_experts_that_cannot_be_multiplied_are_refused() -> None:
    data = random_rows(RNG, FORMATS["Q6_K"], 4 * 3, 256)
    w = RawWeight("experts", FORMATS["Q6_K"], (4 * 3, 256), {"data": data})
    weights = {"logits": table(4), "x": table(256), "w": w}
    with pytest.raises(BackendUnavailable, match="'experts' is Q6_K, which"):
        run(routed(4, 2, 3, 256, False), weights, plain_step(1), activations="int8")
    with pytest.raises(ValueError, match="mixes Q6_K, F32"):
        TritonBackend(threads=1).pack(WeightGroup((w, raw(table(256)))))
