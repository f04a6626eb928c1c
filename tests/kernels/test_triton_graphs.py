"""Recorded steps on the interpreter: what a replay computes has the bits of its launches alone.

The recorder of these tests keeps launches with their very arguments and runs them again: whatever a
launcher worked out on the host when it was recorded stays as it was, as in a card's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engineroom.kernels.backend import KVSpec
from tests.counts import FULL, count
from tests.kernels import programs
from tests.kernels.packed_steps import Paged, random_blocks, raw
from tests.kernels.triton_device import TritonBackend, interpreter, torch

from engineroom.kernels.triton import attention, graphs  # isort: skip
from engineroom.kernels.weights import FILE_FORMATS, RawWeight  # isort: skip

BLOCKS, CONTEXT = 400, 200
VOCAB = 200


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", 64)
    monkeypatch.setattr(attention, "MIN_PAIRS", 12)
    monkeypatch.setattr(graphs, "_PAIRS", 4)


class Recorder:
    """Notes launches while they are recorded; `replayed` counts what is run again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple] | None = None
        self.recorded: list[list[tuple]] = []
        self.replayed = 0
        run = interpreter.InterpretedFunction.run

        def noting(kernel: Any, *args: Any, **options: Any) -> Any:
            if self.launches is not None:
                self.launches.append((kernel, args, options))
            return run(kernel, *args, **options)

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", noting)
        self._run = run

    def note(self, launch: Callable[[], Any]) -> list[tuple]:
        self.launches = []
        launch()
        noted, self.launches = self.launches, None
        return noted

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        noted = self.note(launch)
        self.recorded.append(noted)

        def replay() -> None:
            self.replayed += 1
            for kernel, args, options in noted:
                self._run(kernel, *args, **options)

        return replay


def seen(launches: Sequence[tuple]) -> list[tuple]:
    """Launches as a card's graph keeps them: addresses and numbers."""

    def value(x: Any) -> Any:
        return (x.data_ptr(), x.dtype) if isinstance(x, torch.Tensor) else x

    return [
        (kernel.fn.__name__, [value(x) for x in args], {k: value(x) for k, x in options.items()})
        for kernel, args, options in launches
    ]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def executable(dtype: str, fmt: str = "F32", block_size: int = 4) -> Any:
    program = programs.two_layers(hidden=64)
    backend = TritonBackend(activation_dtype=dtype, threads=1)
    weights = {}
    for name, values in programs.random_weights(program).items():
        weights[name] = raw(values, name=name)
        if fmt != "F32" and values.ndim == 2 and values.shape[1] % 32 == 0:
            data = random_blocks(
                np.random.default_rng(len(name)), FILE_FORMATS[fmt], values.size // 32
            )
            weights[name] = RawWeight(name, FILE_FORMATS[fmt], values.shape, {"data": data})
    packed = {name: backend.pack(weight) for name, weight in weights.items()}
    cache = backend.allocate_kv(KVSpec(2, 2, 16, block_size, dtype), BLOCKS)
    empty(cache)
    made = backend.lower(program, packed, cache)
    return SimpleNamespace(
        run=made.run, made=made, cache=cache, program=program, backend=backend, weights=weights
    )


def empty(cache: Any) -> None:
    for half in (cache.keys, cache.values):
        half.data.fill_(float("nan"))


def same_cache(one: Any, other: Any) -> None:
    for a, b in ((one.cache.keys, other.cache.keys), (one.cache.values, other.cache.values)):
        same = torch.equal(a.data.nan_to_num(7.0), b.data.nan_to_num(7.0))
        assert same, "padding rows wrote, or a row did not"


def steps(rng: np.random.Generator, block_size: int, num: int) -> Iterator[tuple[Any, bool]]:
    """Packed steps of sequences that come, grow and go, and whether each one is a decoding one."""
    pages = Paged(block_size, BLOCKS, rng)
    living: list[int] = []
    for i in range(num):
        if i % 3 == 0 or not living:  # prompts, beside sequences that decode
            new = [pages.add() for _ in range(rng.integers(1, 4))]
            chunks = {s: rng.integers(0, VOCAB, rng.integers(1, 70)).tolist() for s in new}
            chunks |= {s: [int(rng.integers(VOCAB))] for s in living}
            living += new
        else:
            living = [s for s in living if rng.random() < 0.9 and pages.lengths[s] < CONTEXT - 9]
            rng.shuffle(living)
            if not living:
                continue
            chunks = {s: [int(rng.integers(VOCAB))] for s in living}
        last = np.cumsum([len(c) for c in chunks.values()]) - 1
        yield pages.step(chunks, logit_rows=last), all(len(c) == 1 for c in chunks.values())


@pytest.mark.skipif(not FULL, reason="minutes on the interpreter: only in `make test-all`")
@pytest.mark.parametrize(("dtype", "fmt"), [("float32", "Q4_1"), ("float16", "F32")])
def test_a_replay_has_the_bits_of_its_launches(dtype: str, fmt: str, recorder: Recorder) -> None:
    eager, recorded = executable(dtype, fmt), executable(dtype, fmt)
    recorded.made.prepare(256, 14, CONTEXT, recorder)
    num_decoding, used = 0, set()
    bucket = recorded.made._graphs.bucket

    def watched(*args: Any) -> Any:
        found = bucket(*args)
        used.add(found)
        return found

    recorded.made._graphs.bucket = watched
    for seed in range(count(reduced=1, full=2)):
        for each in (eager, recorded):
            empty(each.cache)
        for step, decodes in steps(np.random.default_rng(seed), 4, 12):
            before = recorder.replayed
            assert recorded.run(step).numpy().tobytes() == eager.run(step).numpy().tobytes()
            assert recorder.replayed - before == decodes
            num_decoding += decodes
            same_cache(recorded, eager)
    assert num_decoding > 8
    assert any(b and b.pairs for b in used) and any(b and not b.pairs for b in used)


@pytest.mark.skipif(not FULL, reason="minutes on the interpreter: only in `make test-all`")
def test_nothing_that_changes_is_in_a_recording(recorder: Recorder) -> None:
    """Two steps of a bucket launch the very same: grids, addresses, numbers."""
    made = executable("float32", "Q4_1").made
    made.prepare(64, 8, CONTEXT, recorder)
    found = {
        bucket: seen(noted)
        for bucket, noted in zip(made._graphs._order, recorder.recorded, strict=True)
    }
    assert len(found) > 8
    names = {name for noted in found.values() for name, *_ in noted}
    assert {"walk_kernel", "split_kernel", "merge_kernel", "quantised_kernel"} < names
    rng, met = np.random.default_rng(3), set()
    for step, decodes in steps(rng, 4, 40):
        if not decodes or len(step.token_ids) > 8:
            continue
        last = step.positions
        work = {shape: attention.plan(step, shape, last) for shape in made._shapes}
        bucket = made._graphs.bucket(step, work)
        whole = graphs.padded(step, last, work, bucket)
        bound = made._bind(made._recorded_upload, *whole)
        made._make_room({False: bucket.rows, True: bucket.rows})
        assert seen(recorder.note(lambda bound=bound: made._launch(bound))) == found[bucket]
        met.add(bucket)
    assert len(met) >= 4


@pytest.mark.skipif(not FULL, reason="minutes on the interpreter: only in `make test-all`")
def test_what_a_prompt_between_leaves_behind_does_not_show(recorder: Recorder) -> None:
    """Memory is shared with steps that are not recorded, and stays where it was."""
    recorded = executable("float32")
    recorded.made.prepare(256, 64, CONTEXT, recorder)
    before = recorded.made.workspace_bytes
    for step, _ in steps(np.random.default_rng(5), 4, 10):
        recorded.run(step)
    assert recorded.made.workspace_bytes - before <= recorded.made._upload.nbytes
    planned = recorded.backend.workspace_bytes(recorded.program, 256, 64, CONTEXT)
    assert recorded.made.workspace_bytes <= planned


def test_tokens_of_the_step_before_are_read_on_the_device(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step of prompts, and in a replay of three rows of four, one of them in two splits."""
    eager, recorded = executable("float32"), executable("float32")
    monkeypatch.setattr(attention, "SPLIT", 16)
    monkeypatch.setattr(graphs, "_PAIRS", 12)
    monkeypatch.setattr(graphs, "row_counts", lambda most: [most])
    recorded.made.prepare(24, 4, 20, recorder)
    sampled = torch.tensor([17, -1, 5, 9], dtype=torch.int32)
    pages = Paged(4, BLOCKS, np.random.default_rng(1))
    for _ in range(3):
        pages.add()
    for chunks, rows in (
        ({0: list(range(17)), 1: [4], 2: [6]}, [16, 17, 18]),
        ({0: [1], 1: [2], 2: [3]}, [0, 1, 2]),
    ):
        step = pages.step(chunks, logit_rows=rows)
        known, late = step.token_ids.copy(), step.token_ids.copy()
        known[-3:], late[-3:] = [9, 0, 17], [-4, -2, -1]  # row 1 failed
        want = eager.run(replace(step, token_ids=known)).numpy()
        got = recorded.run(replace(step, token_ids=late, sampled=sampled)).numpy()
        assert got.tobytes() == want.tobytes()
    assert recorder.replayed == 1
    same_cache(recorded, eager)
    with pytest.raises(ValueError, match="row 4 of the step before, which sampled 4"):
        eager.run(replace(step, token_ids=late - 1, sampled=sampled))
    with pytest.raises(ValueError, match="token ids -4"):
        eager.run(replace(step, token_ids=late))


def test_a_larger_step_than_prepared_for_is_refused(recorder: Recorder) -> None:
    made = executable("float32").made
    made.prepare(16, 4, 60, recorder)
    pages = Paged(4, BLOCKS, np.random.default_rng(1))
    with pytest.raises(ValueError, match="a step of 17 tokens; it was prepared for 16"):
        made.run(pages.step({pages.add(): [1] * 17}, logit_rows=[0]))
    with pytest.raises(ValueError, match="a step of 5 logit rows"):
        made.run(pages.step({pages.add(): [1] * 5}))


def test_buckets() -> None:
    assert graphs.row_counts(100) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert graphs.row_counts(1) == [1]
    shape = attention.Shape(32, 8, 128, "bfloat16", ahead=True)
    found = list(graphs.buckets([shape], 2048, 320, 32768))
    assert found == sorted(found)
    assert [b.rows for b in found if not b.pairs] == graphs.row_counts(320)
    # From 129 sequences on there are programs enough without splitting.
    assert max(b.rows for b in found if b.pairs) == 128
    assert list(graphs.buckets([], 8, 4, 100)) == [(1, 0), (2, 0), (4, 0)]
