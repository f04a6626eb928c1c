"""Triton's paged attention on the interpreter: beside the reference's oracle, and law 2 as bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.backend import KV_CODES, KVSpec
from engineroom.kernels.program import Program
from engineroom.kernels.reference import ReferenceBackend
from tests.counts import FULL, count
from tests.kernels.packed_steps import Paged, assert_close, raw
from tests.kernels.test_reference_attention import VOCAB, Shape, oracle, tokens_of
from tests.kernels.test_reference_attention import Layer as ReferenceLayer
from tests.kernels.triton_device import DTYPES, TritonBackend, torch

from engineroom.kernels.triton import attention  # isort: skip


class Layer(ReferenceLayer):
    """A Shape on the Triton backend, with its own cache."""

    def __init__(
        self,
        shape: Shape,
        *,
        block_size: int = 16,
        num_blocks: int = 64,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        fill: float = 0.0,
        spread: float = 1.5,
    ) -> None:
        backend = TritonBackend(activation_dtype=dtype, threads=1)
        weights = {n: backend.pack(raw(t)) for n, t in shape.tables(spread=spread).items()}
        spec = KVSpec(2, shape.num_kv_heads, shape.head_dim, block_size, kv_dtype or dtype)
        self.cache = backend.allocate_kv(spec, num_blocks)
        for half in (self.cache.keys, self.cache.values):
            if half.scales is None:
                half.data.fill_(fill)
            else:
                half.data.fill_(0x7F)  # of fp8, NaN
                is_nan = half.scales.dtype == torch.int16 and np.isnan(fill)
                half.scales.fill_(0x7FC0 if is_nan else fill)
        self.pages = Paged(block_size, num_blocks, np.random.default_rng(1))
        self._executable = backend.lower(shape.program(), weights, self.cache)


SPLIT = attention.SPLIT if FULL else 32  # of these tests, so that a few tokens are several splits


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", SPLIT)


SHAPES = {
    "mha": Shape(num_heads=3, num_kv_heads=3),
    "gqa 2": Shape(),
    "gqa 3": Shape(num_heads=9, num_kv_heads=3, head_dim=16),
    "gqa 8, one kv head": Shape(num_heads=8, num_kv_heads=1, head_dim=64, scale=0.1),
    "gqa 20, one kv head": Shape(num_heads=20, num_kv_heads=1),
    "head 80": Shape(head_dim=80, scale=0.1),
    "head 64": Shape(num_heads=2, num_kv_heads=1, head_dim=64, scale=0.1),
    "head 96": Shape(num_heads=2, num_kv_heads=2, head_dim=96, scale=0.1),
    "head 128, gqa 4": Shape(num_heads=4, num_kv_heads=1, head_dim=128, scale=0.1),
    "gqa 16": Shape(num_heads=16, num_kv_heads=1, scale=0.2),
    "head 256": Shape(num_heads=2, num_kv_heads=1, head_dim=256, scale=0.05),
    "window 1": Shape(window=1),
    "window 24": Shape(window=24),
    "window of a split": Shape(window=SPLIT),
    "softcap": Shape(softcap=2.0),
    "window and softcap": Shape(window=33, softcap=5.0),
    "alibi": Shape(num_heads=6, alibi=True),
    "sinks": Shape(num_heads=6, sinks=True, window=20),
    "alibi, softcap and sinks": Shape(
        num_heads=2, num_kv_heads=1, alibi=True, sinks=True, softcap=3.0
    ),
}
# 1 token; a full last page; one past it; around a split; into the third.
LENGTHS = (1, 16, 17, SPLIT, SPLIT + 1, 2 * SPLIT + 3) if FULL else (1, SPLIT + 1)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_its_formula(name: str) -> None:
    shape = SHAPES[name]
    layer = Layer(shape, fill=np.nan)
    for length in LENGTHS:
        tokens = tokens_of(length, seed=length)
        got = layer.feed_new(tokens)
        assert_close(got, oracle(shape, tokens, "float32", "float32"), "float32", 4e-6)


@pytest.mark.parametrize("kv_dtype", (*DTYPES, *KV_CODES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_dtypes(dtype: str, kv_dtype: str) -> None:
    shape = SHAPES["gqa 2"]
    tokens = tokens_of(count(reduced=19, full=SPLIT + 6))
    got = Layer(shape, dtype=dtype, kv_dtype=kv_dtype).feed_new(tokens)
    want = oracle(shape, tokens, dtype, kv_dtype)
    # Where fp16 meets fp16, or codes, the weights are rounded to it for their product.
    error = 1e-3 if dtype == "float16" and kv_dtype != "float32" else 4e-6
    assert_close(got, want, dtype, error)


def test_huge_scores_do_not_overflow() -> None:
    shape = Shape(scale=1.0)
    tokens = tokens_of(40)
    got = Layer(shape, spread=60.0).feed_new(tokens)
    assert np.isfinite(got).all()
    assert_close(got, oracle(shape, tokens, "float32", "float32", 60.0), "float32", 2e-3)


# A shape, the dtype of q and that of the cache; "" where it is the same.
LAYERS = [
    ("gqa 2", "float16", ""),
    ("window and softcap", "float32", ""),
    ("alibi, softcap and sinks", "float16", "int8"),
    ("alibi, softcap and sinks", "float32", "fp8"),
    ("head 64", "float16", "k8v4"),
    ("window and softcap", "float32", "int4"),
]


@pytest.mark.parametrize(("name", "dtype", "kv_dtype"), LAYERS)
def test_rows_do_not_depend_on_chunking_or_block_size(name: str, dtype: str, kv_dtype: str) -> None:
    """Wide tiles (of fp16), narrow ones, and splits side by side."""
    shape, more = SHAPES[name], {"fill": np.nan, "dtype": dtype, "kv_dtype": kv_dtype or dtype}
    tokens = tokens_of(SPLIT + 5)
    whole = Layer(shape, **more).feed_new(tokens)
    ways = ((8, (SPLIT - 1, 1, 1, 4)), (24, (SPLIT // 2 + 3, SPLIT // 2, 2)))
    more_ways = ((64, (SPLIT, 5)), (128, (SPLIT + 5,)))
    for block_size, chunks in (*ways, *more_ways) if FULL else ways[:1]:
        num_blocks = 1 + len(tokens) // block_size
        layer = Layer(shape, block_size=block_size, num_blocks=num_blocks, **more)
        sequence, done = layer.pages.add(), 0
        for size in chunks:
            got = layer.run(layer.pages.step({sequence: tokens[done : done + size]}))
            assert got.tobytes() == whole[done : done + size].tobytes(), (block_size, done, size)
            done += size


@pytest.mark.parametrize(("name", "dtype", "kv_dtype"), LAYERS if FULL else LAYERS[::2])
def test_splits_side_by_side_are_splits_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, kv_dtype: str
) -> None:
    shape = SHAPES[name]
    tokens = tokens_of(2 * SPLIT + 5)
    layer = Layer(shape, dtype=dtype, kv_dtype=kv_dtype or dtype)
    layer.feed_new(tokens[:-1])
    step = layer.pages.step({0: tokens[-1:]})
    answers, plan = [], attention.plan
    for programs, pairs in ((0, 0), (1024, 3)):

        def planned(*args, n=programs):  # type: ignore[no-untyped-def]
            return plan(*args, split_programs=n)

        heads = attention.Shape(shape.num_heads, shape.num_kv_heads, 8, dtype, ahead=False)
        assert len(planned(step, heads, step.positions).pairs) == pairs
        monkeypatch.setattr(attention, "plan", planned)
        answers.append(layer.run(step).tobytes())
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype"), [("gqa 3", "float32", "float32"), *LAYERS[2 if FULL else 3 :]]
)
def test_rows_do_not_depend_on_neighbours(name: str, dtype: str, kv_dtype: str) -> None:
    shape = SHAPES[name]
    rng = np.random.default_rng(5)
    tokens = tokens_of(SPLIT + 4)
    alone = Layer(shape, dtype=dtype, kv_dtype=kv_dtype).feed_new(tokens)
    for trial in range(count(reduced=1, full=12)):
        layer = Layer(shape, num_blocks=600, fill=np.nan, dtype=dtype, kv_dtype=kv_dtype)
        ours = layer.pages.add()
        others = [layer.pages.add() for _ in range((2, 20)[trial % 2])]
        done = 0
        while done < len(tokens):
            chunk = tokens[done : done + int(rng.integers(1, SPLIT))]
            chunks = {s: rng.integers(0, VOCAB, rng.integers(1, 6)).tolist() for s in others}
            chunks[ours] = chunk
            order = rng.permutation(list(chunks)).tolist()
            step = layer.pages.step({s: chunks[s] for s in order})
            start = step.query_start[order.index(ours)]
            got = layer.run(step)[start : start + len(chunk)]
            assert got.tobytes() == alone[done : done + len(chunk)].tobytes()
            done += len(chunk)


@dataclass(frozen=True)
class OneBad(Shape):
    """Token 0 has no numbers for a value."""

    def tables(self, seed: int = 0, spread: float = 1.5) -> dict[str, np.ndarray]:
        tables = super().tables(seed, spread)
        tables["v"][0] = np.nan
        return tables


@pytest.mark.parametrize("kv_dtype", KV_CODES)
def test_rows_before_a_value_without_a_scale_do_not_see_it(kv_dtype: str) -> None:
    want = Layer(Shape(), kv_dtype=kv_dtype).feed_new([5, 3])
    got = Layer(OneBad(), kv_dtype=kv_dtype).feed_new([5, 3, 0])
    assert got[:2].tobytes() == want.tobytes()
    assert np.isnan(got[2]).all()


@pytest.mark.parametrize("placed", ["after the sequences", "inside a sequence"])
def test_padding_rows_write_nothing_and_give_zeros(placed: str) -> None:
    shape = SHAPES["gqa 2"]
    tokens = tokens_of(20)
    plain, padded = Layer(shape), Layer(shape)
    want = plain.feed_new(tokens)
    step = padded.pages.step({padded.pages.add(): tokens}, padding=5, logit_rows=range(25))
    if placed == "inside a sequence":
        step = replace(step, query_start=np.array([0, 25], dtype=np.int32))
    got = padded.run(step)
    assert got[:20].tobytes() == want.tobytes()
    assert not got[20:].any()
    assert torch.equal(padded.cache.keys.data, plain.cache.keys.data)
    assert torch.equal(padded.cache.values.data, plain.cache.values.data)


def test_only_padding() -> None:
    layer = Layer(Shape(), fill=7.0)
    step = layer.pages.step({layer.pages.add(): [1]})
    empty = replace(
        step,
        slot=np.array([-1], np.int32),
        query_start=np.zeros(2, np.int32),
        seq_len=np.zeros(1, np.int32),
    )
    assert not layer.run(empty).any()
    assert (layer.cache.keys.data == 7.0).all() and (layer.cache.values.data == 7.0).all()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_CODES)
def test_a_cache_in_codes_has_the_references_bytes(
    kv_dtype: str, dtype: str, rotated: bool
) -> None:
    """Codes and scales, of rows of every kind: zeros, ties, the tiniest, the largest, NaN."""
    kv_heads, dim = 3, 12
    program = Program()
    step = ops.StepHandles.of(program)
    k, v = (
        ops.embedding(program.weight(name, (VOCAB, kv_heads * dim)), step.token_ids)
        for name in "kv"
    )
    if rotated:
        frequencies = tuple(100.0 ** (-i / 5) for i in range(5))  # two elements stay
        k = ops.rope(k, step.positions, head_dim=dim, inv_freq=frequencies)
    heads = {"layer": 1, "num_kv_heads": kv_heads, "head_dim": dim}
    cache = ops.kv_write(k, v, **heads)
    program.finish(ops.attention(k, cache, num_heads=kv_heads, scale=1.0, **heads))

    rng = np.random.default_rng(7)
    tables = {n: rng.standard_normal((VOCAB, kv_heads, dim), np.float32) for n in "kv"}
    for x in tables.values():
        x *= 2.0 ** rng.integers(-12, 8, (VOCAB, kv_heads, 1))
        x[0] = 0
        x[1, :, 0] = np.nan
        x[2, :, 1] = -np.inf
        x[3] = np.arange(-6, 6) * np.float32(2.0**-24)  # the smallest of fp16
        x[4] = np.append(np.arange(1, 12) - 5.5, 127)  # ties of int8
        x[5] = np.append(np.arange(11) * 2.0**-10, 448)  # ties of fp8's smallest
        x[6] = np.append(np.arange(17, 39, 2), 448)  # ties of its three bits
        x[7] = 1e-44  # fp32: its factor is infinite
    made = []
    for backend in (
        TritonBackend(activation_dtype=dtype, threads=1),
        ReferenceBackend(activation_dtype=dtype, threads=1),
    ):
        packed = {n: backend.pack(raw(t.reshape(VOCAB, -1))) for n, t in tables.items()}
        kv = backend.allocate_kv(KVSpec(2, kv_heads, dim, 8, kv_dtype), 8)
        pages = Paged(8, 8, np.random.default_rng(1))
        backend.lower(program, packed, kv).run(pages.step({pages.add(): list(range(16))}))
        made.append((kv.keys, kv.values))
    for got, want in zip(*made, strict=True):
        assert got.data.any()
        np.testing.assert_array_equal(got.data.numpy(), want.data.numpy())
        scales = got.scales.view(want.scales.dtype)  # bits of bfloat16
        np.testing.assert_array_equal(scales.float(), want.scales.float())  # any NaN is NaN


def test_the_work_list_covers_every_token_once() -> None:
    rng = np.random.default_rng(3)
    shape = attention.Shape(8, 2, 64, "float16", ahead=True)
    pages = Paged(16, 4000, rng)
    for size in (1, 150, 300, 3, 40):
        pages.step({pages.add(): [0] * size})
    step = pages.step({s: [0] * n for s, n in enumerate((1, 1, 2, 1, 33))}, padding=3)
    last = np.where(step.slot >= 0, step.positions, -1).astype(np.int32)
    plan = attention.plan(step, shape, last)
    seen = np.concatenate(
        [
            np.arange(i[1], i[1] + i[2])
            for part in (plan.wide, plan.narrow, plan.split)
            for i in part
        ]
    )
    assert sorted(seen) == list(range(len(last)))
    # Longest first; the others have one split, or too many tokens at once.
    assert [item[6] for item in plan.split] == [-(-302 // SPLIT), -(-151 // SPLIT)]
    for item in (*plan.wide, *plan.narrow, *plan.split):
        here = last[item[1] : item[1] + item[2]]
        assert item[4] == here.max()
        assert item[3] == (here[here >= 0].min() if (here >= 0).any() else -1)
    assert all(len(part) <= shape.rows(True) for part in (plan.wide,))
