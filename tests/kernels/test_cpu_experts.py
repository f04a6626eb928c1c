"""A mixture of experts on the CPU: equal to the reference, and pure bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.cpu import _native, lower
from engineroom.kernels.cpu.backend import CpuBackend
from engineroom.kernels.fuse import Step
from engineroom.kernels.program import Program
from engineroom.kernels.weights import BF16, F16, FORMATS, INT4, INT8, Q4_0, Q4_K, Q8_0, WeightGroup
from tests.counts import FULL
from tests.kernels.packed_steps import Paged, one_op, plain_step, raw, run
from tests.kernels.programs import mixture, random_weights
from tests.kernels.test_cpu_backend import (
    PROMPTS,
    TABLES,
    executable,
    logits,
    packed_as,
    quantised,
    steps,
)

pytestmark = pytest.mark.cores

WIDE = {"hidden": 256, "ffn": 256, "num_experts": 7, "shared": 256}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp32": (random_weights, {}),
    "bf16": (
        lambda p: {n: raw(w, BF16, n) for n, w in random_weights(p).items()},
        {"activation_dtype": "bfloat16"},
    ),
    "Q4_0": (lambda p: quantised(p, Q4_0), {}),
    "Q4_K": (lambda p: quantised(p, Q4_K), {}),
    "Q8_0": (lambda p: quantised(p, Q8_0), {"activations": "float32"}),
    "INT8": (lambda p: packed_as(p, INT8, INT8), {}),
    "INT4": (lambda p: packed_as(p, INT4, INT8), {}),
}


# The tiles' own kernels are test_cpu_linear's, in every table.
@pytest.fixture(params=TABLES if FULL else TABLES[:1])
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_logits_equal_the_references(isa: str) -> None:
    """Both round in fp32 and sum in different orders: a few 1e-6, as in test_cpu_backend."""
    from engineroom.kernels.reference import ReferenceBackend

    program = mixture()
    weights = random_weights(program)
    inputs = steps([PROMPTS, {0: [5], 2: [6, 7], 1: [8]}], padding=3)
    want = logits(executable(program, weights, ReferenceBackend()), inputs)
    got = logits(executable(program, weights, CpuBackend(isa=isa)), inputs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fmt", [*FORMATS.values()], ids=FORMATS)
def test_every_format_is_the_references(isa: str, fmt: Any) -> None:
    """Floating formats and, with activations as they are, quantised ones; an expert at a time."""
    from engineroom.kernels.reference import ReferenceBackend

    program = mixture(**WIDE)
    if fmt.is_float:
        weights = {n: raw(w, fmt, n) for n, w in random_weights(program).items()}
    else:
        weights = quantised(program, fmt)
    if fmt is Q4_K:  # experts of several formats
        down = [(weights if e % 2 else quantised(program, Q8_0))["0.downs"] for e in range(7)]
        parts = (w.rows(256 * e, 256 * (e + 1)) for e, w in enumerate(down))
        weights["0.downs"] = WeightGroup(tuple(parts))
    inputs = steps([PROMPTS])
    want = logits(executable(program, weights, ReferenceBackend()), inputs)[0]
    exact = CpuBackend(isa=isa, activations="float32")
    got = logits(executable(program, weights, exact), inputs)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_law_2_bit_for_bit(isa: str, case: str) -> None:
    """A row's logits: alone = in a batch = in chunks = by any number of threads.

    142 tokens and 7 experts: some have more than the 64 rows that are multiplied at once.
    """
    make, options = CASES[case]
    program = mixture(**WIDE)
    weights = make(program)
    rng = np.random.default_rng(1)
    prompts = {s: rng.integers(0, 200, n).tolist() for s, n in enumerate([130, 1, 2, 9])}
    backend = CpuBackend(isa=isa, threads=2, **options)
    alone = [
        logits(executable(program, weights, backend), steps([{0: tokens}]))[0]
        for tokens in prompts.values()
    ]
    for threads in (1, 2, 3):
        other = CpuBackend(isa=isa, threads=threads, **options)
        [together] = logits(executable(program, weights, other), steps([prompts]))
        assert together.tobytes() == np.concatenate(alone).tobytes(), f"{threads} threads"
    cuts = [{0: prompts[0][:70], 2: prompts[2][:1]}, {0: prompts[0][70:], 2: prompts[2][1:]}]
    first, second = logits(executable(program, weights, backend), steps(cuts))
    whole = np.concatenate([first[:70], second[:60]])
    assert whole.tobytes() == alone[0].tobytes()
    assert np.concatenate([first[70:], second[60:]]).tobytes() == alone[2].tobytes()
    single = executable(program, weights, backend)
    for i, step in enumerate(steps([{0: [t]} for t in prompts[3]])):
        assert single.run(step).numpy().tobytes() == alone[3][i : i + 1].tobytes()


@pytest.mark.parametrize("case", CASES)
def test_fusion_changes_no_bit(isa: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = CASES[case]
    program = mixture(**WIDE)
    weights = make(program)
    inputs = steps([PROMPTS, {0: [5], 2: [6, 7]}])
    backend = CpuBackend(isa=isa, **options)
    fused = logits(executable(program, weights, backend), inputs)
    monkeypatch.setattr(lower, "early_rows", lambda p: p)
    monkeypatch.setattr(lower, "fuse", lambda p, form: [Step(op.name, (op,)) for op in p])
    apart = logits(executable(program, weights, backend), inputs)
    for a, b in zip(fused, apart, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("renormalise", [True, False])
def test_routing_is_the_references(renormalise: bool) -> None:
    """Ties, infinities and NaN among the logits; a NaN shows in the weights alone."""

    def build(p: Program, s: Any, a: Any) -> Any:
        return ops.expert_weights(a, ops.top_experts(a, 3), renormalise=renormalise)

    table = np.random.default_rng(5).integers(-3, 4, (96, 9)).astype(np.float32)
    table[3, 2], table[4, 1:3], table[5], table[6] = np.nan, np.nan, np.nan, -np.inf
    for program in (one_op(lambda p, s, a: ops.top_experts(a, 9), a=9), one_op(build, a=9)):
        weights = {"a": table}
        want = run(program, weights, plain_step(96))
        backend = CpuBackend()
        packed = {"a": backend.pack(raw(table, name="a"))}
        got = backend.lower(program, packed, None).run(plain_step(96)).numpy()
        np.testing.assert_allclose(got, want, rtol=3e-7)


def test_planned_memory_is_what_is_taken() -> None:
    program = mixture(**WIDE, top_k=5)
    backend = CpuBackend(threads=2)
    weights = {n: raw(w, name=n) for n, w in random_weights(program).items()}
    tiles = {"gates": 7, "ups": 7, "downs": 7}
    want = 0
    for name, w in weights.items():
        if len(w.shape) == 1:
            want += 4 * w.shape[0]
            continue
        count = tiles.get(name[2:], 1)
        want += count * _native.packed_bytes("F32", w.shape[0] // count, w.shape[1])
    assert backend.weights_bytes(program, weights) == want
    paged = Paged(16, 64, np.random.default_rng(4))
    paged.add()
    for tokens in (1, 2, 300):
        step = paged.step({0: [7] * tokens})
        built = executable(program, weights, backend)
        built.run(step)
        bound = backend.workspace_bytes(program, tokens, tokens, 1024)
        assert built.workspace_bytes <= bound


def test_an_expert_of_two_formats_is_refused() -> None:
    program = mixture()
    weights: dict[str, Any] = dict(random_weights(program))
    values = weights["0.ups"]
    parts = (raw(values[:30], F16, "a"), raw(values[30:], name="b"))
    with pytest.raises(ValueError, match=r"'a\+b': expert 1 is 2 tensors or formats"):
        executable(program, {**weights, "0.ups": WeightGroup(parts)}, CpuBackend())


def test_a_row_that_is_no_number_stays_within_its_row() -> None:
    """NaN logits choose experts that exist, and no other row hears of it."""
    program = mixture()
    weights = random_weights(program)
    clean = {**weights, "embed": weights["embed"].copy()}
    weights["embed"][7] = np.nan
    [step] = steps([{0: [3, 4, 5], 1: [7], 2: [9, 11]}])
    got, want = (logits(executable(program, w, CpuBackend()), [step])[0] for w in (weights, clean))
    keep = [0, 1, 2, 4, 5]
    columns = [i for i in range(200) if i != 7]  # the head shares the table
    assert np.array_equal(got[keep][:, columns], want[keep][:, columns])
    assert np.isnan(got[3]).all()
