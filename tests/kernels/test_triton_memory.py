"""The memory plan of the Triton backend: weights, cache and workspace to the byte, by counting the
tensors that are alive."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from engineroom.kernels.backend import KVSpec
from engineroom.kernels.program import Program
from engineroom.kernels.weights import FORMATS, RawWeight
from tests.kernels import programs
from tests.kernels.packed_steps import Paged, random_rows, raw
from tests.kernels.triton_device import TritonBackend, interpreter, torch

from engineroom.engine.bench.gpu.launches import sampling_rows  # isort: skip
from engineroom.kernels.triton import workspace  # isort: skip
from engineroom.kernels.triton.executor import TritonLogits  # isort: skip

LIMITS = (40, 12, 200)  # tokens and logit rows of a step, tokens of a sequence
BLOCKS = 64


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers take their memory; what kernels compute is other tests' business."""
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *args, **options: None)


def alive() -> list[torch.Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


class Counter:
    """Bytes of tensors on the device that were not there before; `hosts`: buffers of the host's."""

    def __init__(self) -> None:
        self._before = alive()  # held, so that no address is taken again
        self.hosts: list[torch.Tensor] = []

    def __call__(self) -> int:
        others = {t.untyped_storage().data_ptr() for t in (*self._before, *self.hosts)}
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive()}
        return sum(size for address, size in found.items() if address not in others)


def weights_of(program: Program, fmt: str, *, ordered: bool) -> dict[str, RawWeight]:
    """Matrices but for the table of embeddings in `fmt`; ordered: those of one width of input have
    one order of columns, each its own copy."""
    rng, made = np.random.default_rng(1), {}
    orders: dict[int, np.ndarray] = {}
    for name, values in programs.random_weights(program).items():
        made[name] = raw(values, name=name)
        if fmt == "F32" or values.ndim == 1 or name == "embed":
            continue
        rows, columns = values.shape
        data = random_rows(rng, FORMATS[fmt], rows, columns)
        weight = RawWeight(name, FORMATS[fmt], (rows, columns), {"data": data})
        if ordered:
            order = orders.setdefault(columns, rng.permutation(columns).astype(np.int32))
            weight = replace(weight, columns=order.copy())
        made[name] = weight
    return made


@pytest.mark.parametrize(
    ("mixed", "fmt", "activations", "kv_dtype"),
    [
        (False, "F32", "auto", "float32"),
        (False, "Q4_1", "auto", "float32"),
        (False, "I4G32", "int8", "int8"),
        (True, "F32", "auto", "float32"),
    ],
)
def test_what_is_planned_is_what_is_allocated(
    mixed: bool, fmt: str, activations: str, kv_dtype: str
) -> None:
    program = programs.mixture() if mixed else programs.two_layers(hidden=64, ffn=96)
    raws = weights_of(program, fmt, ordered=fmt == "I4G32")
    spec = KVSpec(2, 2, 8 if mixed else 16, 4, kv_dtype)
    backend = TritonBackend(activation_dtype="float32", threads=1, activations=activations)
    taken = Counter()
    cache = backend.allocate_kv(spec, BLOCKS)
    kv_bytes = BLOCKS * spec.bytes_per_block
    assert taken() == kv_bytes
    made = backend.lower(program, {n: backend.pack(w) for n, w in raws.items()}, cache)
    weight_bytes = backend.weights_bytes(program, raws)
    taken.hosts += [made._upload._host, made._recorded_upload._host]
    assert taken() - kv_bytes == weight_bytes == made.weights_bytes
    # As on a card, but that a recording launches nothing.
    made.prepare(*LIMITS, lambda launch: lambda: None)
    planned = workspace.plan(
        program,
        dtype="float32",
        activations=backend._activations,
        limits=LIMITS,
        weights=raws,
        kv=spec,
        on_card=False,
    )
    taken.hosts += [made._upload._host, made._recorded_upload._host]
    assert taken() - kv_bytes - weight_bytes == planned.taken == made.workspace_bytes
    # Nothing more comes with steps, the largest among them.
    pages = Paged(4, BLOCKS, np.random.default_rng(1))
    long, *others = [pages.add() for _ in range(LIMITS[1])]
    pages.step({long: [7] * (LIMITS[2] - 29)})
    made.run(pages.step({long: [7] * 29, **{s: [9] for s in others}}, logit_rows=range(12)))
    assert taken() - kv_bytes - weight_bytes == planned.taken == made.workspace_bytes
    whole = backend.workspace_bytes(program, *LIMITS, weights=raws, kv=spec)
    assert whole == planned.total <= backend.workspace_bytes(program, *LIMITS)


def test_sampling_takes_no_more_than_is_planned() -> None:
    """Of rows that draw and filter; and what it has is what it says."""
    vocab, rows = 4100, 3
    logits = torch.randn(rows, vocab)
    taken = Counter()
    sampler = TritonBackend(activation_dtype="float32", threads=1).sampler(vocab)
    sampler.run(TritonLogits(logits), sampling_rows(rows, 0.8, vocab, 0.9))
    taken.hosts.append(sampler._upload._host)
    assert 0 < taken() == sampler.workspace_bytes
    planned = workspace.sampling.workspace_bytes(rows, vocab)
    assert planned / 2 < sampler.workspace_bytes <= planned
