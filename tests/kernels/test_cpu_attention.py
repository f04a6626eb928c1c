"""Paged attention of every usable CPU unit: against a float64 oracle, and against itself.

The oracle reads K and V as the cache stores them, and q as the products do (rounded to bfloat16 for
keys of bfloat16 and int4). What is left, with values v of a row's keys:

* float32, float16: fp32 sums over dims and keys. Scores of size up to some 10 carry a few 1e-6,
  which is the weights' relative error and so, times max|v|, the result's: 1e-5 max|v|.
* bfloat16: weights rounded to 8 bits, a relative 2^-9 each: 2^-9 max|v| beside the above.
* int8: weights, times their values' scales, in steps of 1/32258 of the largest product in the
  split, which is at most max|v| / 127. 256 errors of up to half a step, independent and evenly
  spread, have the deviation 16 * 0.29 / 32258 = 1.4e-4 max|v|; four of them. q in steps of 1/32258
  of its largest element moves a score, and so a weight, by less.
* int4: weights in 8 bits again, of up to 15 scales above an offset, which is twice max|v| at most:
  q is rounded as for bfloat16. k8v4: int8's scores with int4's values.
* fp8: codes are numbers of bfloat16; q is rounded as for bfloat16, the weights times the values'
  scales to 8 bits: a relative 2^-8 at most, which a row's only key has too (1 times a scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from engineroom.kernels.backend import KV_CODES, KVSpec
from engineroom.kernels.cpu import _native
from engineroom.quant.rounding import e4m3_codes
from engineroom.quant.small_floats import e4m3_values
from tests.counts import FULL

pytestmark = pytest.mark.cores

UNITS = _native.kernel_tables()
DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "k8v4", "fp8")
TOLERANCE = {
    "float32": 1e-5,
    "float16": 1e-5,
    "bfloat16": 2.0**-9 + 1e-5,
    "int8": 6e-4,
    "int4": 2.0**-8 + 1e-5,
    "k8v4": 2.0**-8 + 6e-4,
    "fp8": 2.0**-8 + 1e-5,
}


def bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return bfloat16(x)
    return x.astype(dtype).astype(np.float32)


def quantised(x: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """ops.kv_write of an int8 cache: q [n, heads, dim] and scales [n, heads, 1]."""
    heads = x.reshape(len(x), -1, head_dim)
    most = np.abs(heads).max(-1, keepdims=True)
    return np.rint(heads * (np.float32(127) / most)), most / np.float32(127)


def quantised_to_fp8(x: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """ops.kv_write of an fp8 cache: codes [n, heads, dim] and scales [n, heads, 1]."""
    heads = x.reshape(len(x), -1, head_dim)
    most = np.abs(heads).max(-1, keepdims=True)
    factor = np.float32(448) / most
    scaled = np.where(np.isfinite(most) & np.isfinite(factor), heads * factor, np.float32(0))
    scale = np.where(np.isfinite(most), most / np.float32(448), np.float32(np.nan))
    return e4m3_codes(scaled), scale


def bfloat16_towards(x: np.ndarray, up: bool) -> np.ndarray:
    """The nearest number of bfloat16 that is not below (up) or not above x."""
    bits = x.astype(np.float32).view(np.uint32)
    further = ((bits & 0xFFFF) != 0) & ((bits >> 31 == 1) != up)
    return ((bits & 0xFFFF0000) + further * np.uint32(0x10000)).astype(np.uint32).view(np.float32)


def quantised_to_4_bits(x: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ops.kv_write of an int4 cache: codes [n, heads, dim], scales, offsets [n, heads, groups]."""
    heads = x.reshape(len(x), -1, head_dim)
    groups = [heads[..., d : d + 32] for d in range(0, head_dim, 32)]
    low, high = (np.stack([f(g, -1) for g in groups], -1) for f in (np.min, np.max))
    offset = bfloat16_towards(low, up=False)
    scale = bfloat16_towards((high - offset) / np.float32(15), up=True)
    each = [np.repeat(a, 32, -1)[..., :head_dim] for a in (offset, np.float32(1) / scale)]
    return np.minimum(np.rint((heads - each[0]) * each[1]), 15), scale, offset


def cached(x: np.ndarray, shape: Shape, dtype: str) -> np.ndarray:
    """x [n, heads * dim] as a cache of `dtype` holds it, in float64."""
    if dtype == "int4":
        codes, *of = quantised_to_4_bits(x, shape.head_dim)
        scale, offset = (np.repeat(a, 32, -1)[..., : shape.head_dim] for a in of)
        return (codes.astype(np.float64) * scale + offset).reshape(x.shape)
    if dtype == "fp8":
        of_fp8, scale = quantised_to_fp8(x, shape.head_dim)
        return (e4m3_values()[of_fp8].astype(np.float64) * scale).reshape(x.shape)
    if dtype == "int8":
        q, scale = quantised(x, shape.head_dim)
        return (q.astype(np.float64) * scale).reshape(x.shape)
    return stored(x, dtype).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence's q [n, heads * dim], k and v [n, kv heads * dim]. `padding` has slot -1."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    padding: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.q)


@dataclass(frozen=True)
class Shape:
    """What all sequences of a case share, and how it is run."""

    dtype: str = "bfloat16"
    head_dim: int = 64
    kv_heads: int = 2
    group: int = 3
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    unit: str = UNITS[0]
    threads: int = 1
    rounding: str = "float32"
    scale: float = field(default=0.0)  # 0: head_dim ** -0.5

    def factor(self) -> float:
        return self.scale or self.head_dim**-0.5

    def sequence(self, n: int, seed: int = 0) -> Tokens:
        rng = np.random.default_rng(seed)
        kv = self.kv_heads * self.head_dim
        q, k, v = (
            rng.standard_normal((n, width)).astype(np.float32)
            for width in (kv * self.group, kv, kv)
        )
        return Tokens(q, k, v)


Step = Sequence[tuple[int, int, int]]  # (sequence, first token, end token), packed in this order


def in_chunks(lengths: Sequence[int], size: int) -> list[Step]:
    """Every sequence alone, one after another, in chunks of `size` tokens."""
    return [
        [(s, start, min(start + size, n))]
        for s, n in enumerate(lengths)
        for start in range(0, n, size)
    ]


def run(shape: Shape, sequences: Sequence[Tokens], steps: Sequence[Step]) -> list[np.ndarray]:
    """Outputs [n, heads * dim] of each sequence. Slots that nothing is written to hold NaN."""
    size = shape.block_size
    blocks = [-(-len(s) // size) for s in sequences]
    total = sum(blocks) + 2
    order = np.random.default_rng(7).permutation(total).astype(np.int32)
    table = np.full((len(sequences), max(blocks)), order[-1], np.int32)
    for s, count in enumerate(blocks):
        start = sum(blocks[:s])
        table[s, :count] = order[start : start + count]
    spec = KVSpec(1, shape.kv_heads, shape.head_dim, size, shape.dtype)
    cache = np.full(total * spec.bytes_per_block, 255, np.uint8)
    results = [np.full_like(s.q, 3.0) for s in sequences]
    for step in steps:
        positions = np.concatenate([np.arange(a, b) for _, a, b in step]).astype(np.int32)
        owner = np.concatenate([np.full(b - a, s) for s, a, b in step])
        slot = table[owner, positions // size] * size + positions % size
        for i, (s, p) in enumerate(zip(owner, positions, strict=True)):
            if p in sequences[s].padding:
                slot[i] = -1
        q, k, v = (
            np.concatenate([getattr(sequences[s], name)[a:b] for s, a, b in step])
            for name in ("q", "k", "v")
        )
        starts = np.cumsum([0, *(b - a for _, a, b in step)]).astype(np.int32)
        out = np.full_like(q, 5.0)
        _native.attention_test(
            shape.unit,
            *spec.parts,
            cache,
            size,
            shape.kv_heads,
            shape.head_dim,
            q,
            k,
            v,
            positions,
            starts,
            np.array([b for _, _, b in step], np.int32),
            np.ascontiguousarray(table[[s for s, _, _ in step]]),
            slot.astype(np.int32),
            out,
            shape.factor(),
            shape.window,
            shape.softcap,
            shape.rounding,
            shape.threads,
        )
        for (s, a, b), start in zip(step, starts[:-1], strict=True):
            results[s][a:b] = out[start : start + b - a]
    return results


def whole(shape: Shape, sequences: Sequence[Tokens]) -> list[np.ndarray]:
    """All sequences in one packed step."""
    return run(shape, sequences, [[(s, 0, len(q)) for s, q in enumerate(sequences)]])


def oracle(shape: Shape, sequence: Tokens) -> np.ndarray:
    """The definition, in float64."""
    n, dim = len(sequence), shape.head_dim
    keys, values = KVSpec(1, 1, dim, 1, shape.dtype).parts
    q = bfloat16(sequence.q) if keys in ("bfloat16", "int4", "fp8") else sequence.q
    q = q.astype(np.float64).reshape(n, shape.kv_heads, shape.group, dim)
    k = cached(sequence.k, shape, keys).reshape(n, shape.kv_heads, dim)
    v = cached(sequence.v, shape, values).reshape(n, shape.kv_heads, dim)
    score = q.transpose(1, 2, 0, 3) @ k.transpose(1, 2, 0)[:, None] * shape.factor()
    if shape.softcap:
        score = shape.softcap * np.tanh(score / shape.softcap)
    at = np.arange(n)
    hidden = at[None] > at[:, None]
    if shape.window:
        hidden |= at[None] <= at[:, None] - shape.window
    score = np.where(hidden, -np.inf, score)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    out: np.ndarray = weight @ v.transpose(1, 0, 2)[:, None]
    return out.transpose(2, 0, 1, 3).reshape(n, -1)


def check(shape: Shape, sequences: Sequence[Tokens], got: Sequence[np.ndarray]) -> None:
    for sequence, result in zip(sequences, got, strict=True):
        bound = TOLERANCE[shape.dtype] * np.abs(sequence.v).max()
        np.testing.assert_allclose(result, oracle(shape, sequence), rtol=0, atol=bound)


def assert_same_bits(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


# ------------------------------------------------------------------------------ the oracle


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_head_sizes(unit: str, dtype: str, head_dim: int) -> None:
    shape = Shape(dtype, head_dim, unit=unit)
    sequences = [shape.sequence(n, n) for n in (1, 16, 33)]
    check(shape, sequences, whole(shape, sequences))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_groups(unit: str, group: int) -> None:
    shape = Shape(group=group, head_dim=16, unit=unit)
    sequences = [shape.sequence(n, n) for n in (1, 40)]
    check(shape, sequences, whole(shape, sequences))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 32, 128])
def test_block_sizes_and_contexts_across_splits(unit: str, dtype: str, block_size: int) -> None:
    shape = Shape(dtype, head_dim=16, kv_heads=1, group=2, block_size=block_size, unit=unit)
    sequences = [shape.sequence(n, n) for n in (256, 257, 520)]  # exactly full pages, and not
    got = run(shape, sequences, [[(s, 0, len(q)) for s, q in enumerate(sequences)]])
    check(shape, sequences, got)
    same = Shape(dtype, head_dim=16, kv_heads=1, group=2, block_size=48, unit=unit)
    assert_same_bits(got, whole(same, sequences))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 16, 100, 256, 300, 1000])
def test_windows(unit: str, dtype: str, window: int) -> None:
    shape = Shape(dtype, head_dim=16, kv_heads=1, window=window, unit=unit)
    sequences = [shape.sequence(n, n) for n in (3, 600)]
    got = whole(shape, sequences)
    check(shape, sequences, got)
    assert_same_bits(got, run(shape, sequences, in_chunks([3, 600], 37)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_scale(unit: str, dtype: str) -> None:
    shape = Shape(dtype, head_dim=64, softcap=2.0, scale=0.3, unit=unit)
    sequences = [shape.sequence(n, n) for n in (20, 300)]
    check(shape, sequences, whole(shape, sequences))


@pytest.mark.parametrize("unit", UNITS)
def test_large_scores_do_not_overflow(unit: str) -> None:
    shape = Shape("float32", head_dim=64, scale=40.0, unit=unit)
    sequence = shape.sequence(300)
    got = whole(shape, [sequence])[0]
    # Scores of some 1000 carry 1e-4 each; nearly every row is one key's value.
    np.testing.assert_allclose(got, oracle(shape, sequence), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rounding", ["bfloat16", "float16"])
def test_the_result_is_rounded_once(rounding: str) -> None:
    shape = Shape("float32", head_dim=20)
    sequences = [shape.sequence(30)]
    exact = whole(shape, sequences)[0]
    got = whole(Shape("float32", head_dim=20, rounding=rounding), sequences)[0]
    np.testing.assert_array_equal(got, stored(exact, rounding))


def written(
    unit: str, dtype: str, k: np.ndarray, v: np.ndarray, block_size: int, dim: int
) -> np.ndarray:
    """The cache of two kv heads after k and v: bytes [block, head, ...], k's first, 255 before."""
    n = len(k)
    blocks = -(-n // block_size)
    spec = KVSpec(1, 2, dim, block_size, dtype)
    cache = np.full(blocks * spec.bytes_per_block, 255, np.uint8)
    _native.attention_test(
        unit,
        *spec.parts,
        cache,
        block_size,
        2,
        dim,
        k.copy(),
        k,
        v,
        np.arange(n, dtype=np.int32),
        np.array([0, n], np.int32),
        np.array([n], np.int32),
        np.arange(blocks, dtype=np.int32)[None],
        np.arange(n, dtype=np.int32),
        np.empty((n, 2 * dim), np.float32),
        1.0,
    )
    return cache.reshape(blocks, 2, -1)


def rows_of(
    halves: np.ndarray, part: int, block_size: int, row: int, order: Sequence[int] = (0, 1, 2, 3)
) -> np.ndarray:
    """The bytes [slot, head, row] of k (part 0) or v, of `row` a slot, by kernels.hpp. order: of
    four slots of values."""
    blocks = len(halves)
    elements = halves[:, :, part, : block_size * row]
    if block_size % 16 == 0 and row % 4 == 0:
        tiles = elements.reshape(blocks, 2, -1, row // 4, 16, 4)
        if part == 0:
            elements = tiles.transpose(0, 1, 2, 4, 3, 5)
        else:
            steps = elements.reshape(blocks, 2, -1, row, 4)[..., list(order)]
            elements = steps.swapaxes(-1, -2)
    return elements.reshape(blocks, 2, block_size, row).swapaxes(1, 2).reshape(-1, 2, row)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("block_size, dim", [(16, 20), (32, 24), (5, 20), (16, 18)])
def test_an_int8_cache_holds_what_kv_write_says(unit: str, block_size: int, dim: int) -> None:
    n = 33
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((n, 2 * dim)).astype(np.float32) for _ in "kv")
    k[3], k[4], k[5, 0], k[6, 1] = 0.0, 3e-39, np.nan, -np.inf
    k[7, :dim] = np.arange(dim) - 0.5  # the largest is dim - 1.5
    v[8, :dim], v[8, 0] = np.arange(dim) / 2, 127.0  # scale 1: halves go to even
    halves = written(unit, "int8", k, v, block_size, dim)
    halves = halves.reshape(len(halves), 2, 2, -1)
    for part, x in enumerate((k, v)):
        elements = rows_of(halves, part, block_size, dim)
        scales = np.ascontiguousarray(halves[:, :, part, block_size * dim :]).view(np.float32)
        scales = scales.swapaxes(1, 2).reshape(-1, 2)
        with np.errstate(all="ignore"):
            q, scale = quantised(x, dim)
        q[~np.isfinite(q) | (np.abs(scale) < 3e-39)] = 0
        np.testing.assert_array_equal(elements[:n].astype(int) - 128, q)
        scale[~np.isfinite(scale)] = np.nan
        np.testing.assert_array_equal(scales[:n], scale[..., 0])
        assert (elements[n:] == 255).all() and np.isnan(scales[n:]).all()  # nothing else is written


def rows_of_fp8(halves: np.ndarray, part: int, block_size: int, row: int) -> np.ndarray:
    """What rows_of is to int8: of fp8, two elements or slots together."""
    blocks = len(halves)
    elements = halves[:, :, part, : block_size * row]
    if block_size % 16 == 0 and part == 0:
        tiles = elements.reshape(blocks, 2, -1, row // 2, 16, 2)
        elements = tiles.transpose(0, 1, 2, 4, 3, 5)
    elif block_size % 16 == 0:
        elements = elements.reshape(blocks, 2, -1, row, 2).swapaxes(-1, -2)
    return elements.reshape(blocks, 2, block_size, row).swapaxes(1, 2).reshape(-1, 2, row)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("block_size, dim", [(16, 20), (32, 128), (5, 20), (16, 18)])
def test_an_fp8_cache_holds_what_kv_write_says(unit: str, block_size: int, dim: int) -> None:
    n = 200
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((n, 2 * dim)).astype(np.float32) for _ in "kv")
    k[20:] *= np.exp2(rng.uniform(-25, 0, k[20:].shape)).astype(np.float32)  # many subnormals
    k[3], k[4], k[5, 0], k[6, 1], k[7] = 0.0, 3e-39, np.nan, -np.inf, -0.0
    k[8], k[9], k[10] = 1.3e-36, 1.4e-36, 3e38  # 448 / m overflows; it does not; the largest
    v[8] = np.resize(np.arange(-20, 20) / 2**10, 2 * dim)  # halves of the least, to even
    v[8, ::dim] = 448.0
    v[9] = np.resize([16.5, 17.5, -17, 19, 248, 200, 0.0146, -1e-3, -5e-4], 2 * dim)
    v[9, ::dim] = -448.0
    halves = written(unit, "fp8", k, v, block_size, dim)
    halves = halves.reshape(len(halves), 2, 2, -1)
    for part, x in enumerate((k, v)):
        elements = rows_of_fp8(halves, part, block_size, dim)
        scales = np.ascontiguousarray(halves[:, :, part, block_size * dim :]).view(np.float32)
        scales = scales.swapaxes(1, 2).reshape(-1, 2)
        with np.errstate(all="ignore"):
            codes, scale = quantised_to_fp8(x, dim)
        np.testing.assert_array_equal(elements[:n], codes)
        np.testing.assert_array_equal(scales[:n], scale[..., 0])
        assert (elements[n:] == 255).all() and np.isnan(scales[n:]).all()  # nothing else is written
        subnormal = (codes & 0x7F) < 8
        assert part or (subnormal & (codes & 0x7F > 0)).mean() > 0.02


@pytest.mark.torch
@pytest.mark.parametrize("unit", UNITS)
def test_an_fp8_cache_holds_the_references_bytes(unit: str) -> None:
    torch = pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom.kernels.reference.attention import ROWS

    n, dim, size = 512, 64, 16
    rng = np.random.default_rng(6)
    x = rng.integers(0, 2**32, (2, n, 2 * dim), dtype=np.uint32).view(np.float32)  # any bits
    x[:, ::2] = rng.standard_normal((2, n // 2, 2 * dim)) * np.exp2(rng.uniform(-30, 0, 2 * dim))
    x[:, 1::4] = np.where(np.isfinite(x[:, 1::4]), x[:, 1::4], 1)
    x[:, 5::8] *= np.float32(2.0**-100)
    halves = written(unit, "fp8", x[0], x[1], size, dim)
    halves = halves.reshape(len(halves), 2, 2, -1)
    for part in (0, 1):
        codes, scale = ROWS["fp8"].encode(torch.from_numpy(x[part].reshape(n, 2, dim)))
        got = np.ascontiguousarray(halves[:, :, part, size * dim :]).view(np.float32)
        np.testing.assert_array_equal(got.swapaxes(1, 2).reshape(n, 2, 1), scale.numpy())
        bytes_ = codes.view(torch.uint8).numpy()
        np.testing.assert_array_equal(rows_of_fp8(halves, part, size, dim), bytes_)


@pytest.mark.parametrize("unit", UNITS)
def test_every_code_of_fp8_is_read_as_its_number(unit: str) -> None:
    """One key takes all the weight: what comes back is its row, code times scale."""
    numbers = np.delete(e4m3_values().astype(np.float32), [0x7F, 0xFF])
    rows = np.resize(numbers, (4, 64))
    rows[:, 0] = 448  # the scale is 1
    shape = Shape("fp8", 64, kv_heads=1, group=1, unit=unit)
    for row in rows:
        tokens = Tokens(row[None].copy(), row[None].copy(), row[None].copy())
        np.testing.assert_array_equal(whole(shape, [tokens])[0][0], row)
        # A key is that row and q picks one dim of it: beside a key of zeros the score tells it.
        values = np.zeros((2, 64), np.float32)
        values[0, :] = 448.0
        k = np.stack([row, np.zeros(64, np.float32)])
        for d in range(1, 64):
            q = np.zeros((2, 64), np.float32)
            q[:, d] = 1 / max(abs(row[d]), 2.0**-9)
            pair = Tokens(q, k, values)
            weight = whole(Shape("fp8", 64, 1, 1, unit=unit, scale=1.0), [pair])[0][1, 0] / 448
            want = 1 / (1 + np.exp(-np.sign(row[d]))) if row[d] else 0.5
            assert abs(weight - want) < 2.0**-7, (row[d], weight)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "block_size, dim", [(16, 40), (32, 64), (5, 20), (16, 18), (7, 66), (16, 6)]
)
def test_an_int4_cache_holds_what_kv_write_says(unit: str, block_size: int, dim: int) -> None:
    n = 33
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((n, 2 * dim)).astype(np.float32) for _ in "kv")
    k[3], k[4], k[5, 0], k[6, 1], k[9] = 0.0, 3e-39, np.nan, -np.inf, 7.3
    k[10, 0], k[10, 1] = 3e38, -3e38  # further apart than a number can say
    k[11] = 1000 + rng.random(2 * dim)  # the offset is much more than the scale
    v[8, :dim], v[8, 0] = (np.arange(dim) % 29) / 2, 15.0  # scale 1: halves go to even
    groups = -(-dim // 32)
    row = 16 * groups
    halves = written(unit, "int4", k, v, block_size, dim)
    halves = halves.reshape(len(halves), 2, 2, -1)
    for part, x in enumerate((k, v)):
        packed = rows_of(halves, part, block_size, row, order=(0, 2, 1, 3))
        each = packed.reshape(-1, 2, groups, 16)
        all_codes = np.concatenate([each & 15, each >> 4], -1).reshape(-1, 2, 32 * groups)
        codes = all_codes[..., :dim]
        assert not all_codes[:n, :, dim:].any()
        more = np.ascontiguousarray(halves[:, :, part, block_size * row :]).view(np.uint16)
        bits = more.reshape(-1, 2, 2, groups, block_size).transpose(0, 4, 1, 2, 3)
        bits = bits.reshape(-1, 2, 2, groups).astype(np.uint32) << 16
        got = bits.view(np.float32)
        with np.errstate(all="ignore"):
            want, scale, offset = quantised_to_4_bits(x, dim)
            spoilt = ~np.isfinite(scale) | ~np.isfinite(offset)
            none = np.repeat(spoilt | ~np.isfinite(1 / scale), 32, -1)[..., :dim]
        want[none] = 0
        scale[spoilt] = offset[spoilt] = np.nan
        np.testing.assert_array_equal(codes[:n], want)
        np.testing.assert_array_equal(got[:n, :, 0], scale)
        np.testing.assert_array_equal(got[:n, :, 1], offset)
        back = codes[:n] * np.repeat(scale, 32, -1)[..., :dim]
        back = back + np.repeat(offset, 32, -1)[..., :dim]
        error = np.abs(back - x.reshape(n, 2, dim)).astype(np.float64)
        # Half a scale, and roundings of fp32 to numbers of the value's size.
        bound = np.repeat(scale, 32, -1)[..., :dim] / 2 + 2.0**-21 * np.abs(x.reshape(n, 2, dim))
        bound = np.maximum(bound, 3e-39)
        assert (error <= bound)[np.isfinite(bound)].all()
        assert (packed[n:] == 255).all() and (bits[n:] == 0xFFFF0000).all()  # nothing else


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("block_size, dim", [(16, 64), (16, 18), (5, 40)])
def test_a_k8v4_cache_has_the_keys_of_int8_and_the_values_of_int4(
    unit: str, block_size: int, dim: int
) -> None:
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((33, 2 * dim)).astype(np.float32) for _ in "kv")
    of = {d: written(unit, d, k, v, block_size, dim) for d in ("int8", "int4", "k8v4")}
    keys, values = of["int8"].shape[2] // 2, of["int4"].shape[2] // 2
    np.testing.assert_array_equal(of["k8v4"][:, :, :keys], of["int8"][:, :, :keys])
    np.testing.assert_array_equal(of["k8v4"][:, :, keys:], of["int4"][:, :, values:])


# -------------------------------------------------------------------------- padding and NaN


@pytest.mark.parametrize("unit", UNITS)
def test_padding_rows_give_zeros_and_write_nothing(unit: str) -> None:
    shape = Shape(head_dim=24, unit=unit)
    full = shape.sequence(70)
    step: list[Step] = [[(0, 0, 40)], [(0, 40, 70)]]
    want = run(shape, [full], step)[0]
    # Rows 66 and up are padding; nobody before them may notice.
    padded = Tokens(full.q, full.k, full.v, padding=(66, 67, 68, 69))
    got = run(shape, [padded], step)[0]
    assert_same_bits([got[:66]], [want[:66]])
    assert not got[66:].any()
    alone = run(shape, [Tokens(full.q[:1], full.k[:1], full.v[:1], (0,))], [[(0, 0, 1)]])[0]
    assert not alone.any()


def one_token_and_two_rows_behind(
    block: int = 0, slot: int = 0, parts: tuple[str, str] = ("bfloat16", "bfloat16")
) -> tuple[np.ndarray, np.ndarray]:
    """v and the result of a step of one sequence of one token, padded to three rows."""
    sequence = Shape(head_dim=8, kv_heads=1, group=1).sequence(3)
    out = np.full((3, 8), 5.0, np.float32)
    _native.attention_test(
        UNITS[0],
        *parts,
        np.zeros(2 * 16 * 8 * 2, np.uint8),
        16,
        1,
        8,
        sequence.q,
        sequence.k,
        sequence.v,
        np.array([0, 0, 0], np.int32),
        np.array([0, 1], np.int32),
        np.array([1], np.int32),
        np.array([[block]], np.int32),
        np.array([slot, -1, -1], np.int32),
        out,
        1.0,
        threads=2,
    )
    return sequence.v, out


def test_rows_behind_the_last_sequence_are_zeros() -> None:
    v, out = one_token_and_two_rows_behind()
    np.testing.assert_array_equal(out[0], bfloat16(v[0]))
    assert not out[1:].any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("window", [0, 20])
def test_a_bad_token_spoils_no_row_that_does_not_see_it(
    unit: str, dtype: str, block_size: int, window: int
) -> None:
    shape = Shape(dtype, head_dim=24, block_size=block_size, window=window, unit=unit)
    clean = shape.sequence(300)
    bad = Tokens(clean.q.copy(), clean.k.copy(), clean.v.copy())
    bad.q[50] = np.nan
    bad.k[100] = np.nan
    bad.v[270] = np.nan
    bad.v[280, 3] = np.inf
    want, got = whole(shape, [clean])[0], whole(shape, [bad])[0]
    seen = np.zeros(300, bool)
    for token in (100, 270, 280):
        seen[token : token + window if window else 300] = True
    seen[50] = True
    assert_same_bits([got[~seen]], [want[~seen]])
    assert np.isnan(got[50]).all() and np.isnan(got[100]).all() and np.isnan(got[275]).all()
    if window and dtype in KV_CODES:  # an infinity spoils its whole row of the cache
        assert np.isnan(got[292, :72]).all() and np.isfinite(got[292, 72:]).all()
    elif window:  # 290 and up see the infinity alone
        assert np.isposinf(got[292, 3]) and np.isfinite(got[292, :3]).all()
    for size in (1, 7, 64):
        chunked = run(shape, [bad], in_chunks([300], size))[0]
        np.testing.assert_array_equal(chunked, got)


# ----------------------------------------------------------------------------- bit equality


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group, head_dim", [(3, 64), (1, 80), (7, 8)])
def test_bits_depend_on_nothing_but_the_row(
    unit: str, dtype: str, group: int, head_dim: int
) -> None:
    shape = Shape(dtype, head_dim, kv_heads=2, group=group, unit=unit)
    lengths = [1, 5, 61, 290]
    sequences = [shape.sequence(n, n) for n in lengths]
    packed = whole(shape, sequences)
    for size in (1, 7, 64, 1000):
        assert_same_bits(packed, run(shape, sequences, in_chunks(lengths, size)))
    # Decoding side by side: the longest's prompt, then everybody's last tokens in one step.
    mixed: list[Step] = [[(3, 0, 289)], [(2, 0, 60), (1, 0, 4)]]
    mixed.append([(s, n - 1, n) for s, n in reversed(list(enumerate(lengths)))])
    together = run(shape, sequences, mixed)
    assert_same_bits(packed, together)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_bits_do_not_depend_on_threads(unit: str, dtype: str, kv_heads: int) -> None:
    lengths = [900, 3, 30]
    steps: list[Step] = [[(0, 0, 890), (1, 0, 2)], [(2, 0, 29)]]
    steps.append([(0, 890, 891)])  # one row with a long context: its splits are divided
    steps.append([(0, 891, 899)])
    steps.append([(0, 899, 900), (1, 2, 3), (2, 29, 30)])

    def shape(threads: int, window: int) -> Shape:
        return Shape(dtype, 16, kv_heads, unit=unit, threads=threads, window=window)

    for window in (0, 700) if FULL else (700 if kv_heads == 3 else 0,):
        sequences = [shape(1, 0).sequence(n, n) for n in lengths]
        alone = run(shape(1, window), sequences, steps)
        check(shape(1, window), sequences, alone)
        for threads in (2, 3):
            assert_same_bits(alone, run(shape(threads, window), sequences, steps))


def test_units_agree_within_the_tolerance() -> None:
    for dtype in DTYPES:
        results = []
        for unit in UNITS:
            shape = Shape(dtype, unit=unit)
            results.append(whole(shape, [shape.sequence(300)])[0])
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], rtol=0, atol=9 * TOLERANCE[dtype])


def test_bad_arguments_are_refused() -> None:
    shape = Shape(head_dim=8)
    with pytest.raises(ValueError, match="unknown dtype"):
        one_token_and_two_rows_behind(parts=("int3", "int3"))
    with pytest.raises(ValueError, match="no cache of such keys with such values"):
        one_token_and_two_rows_behind(parts=("int4", "int8"))
    with pytest.raises(ValueError, match="unknown dtype"):
        whole(Shape(rounding="int8", head_dim=8), [shape.sequence(2)])
    with pytest.raises(ValueError, match="this machine cannot run"):
        whole(Shape(unit="abacus", head_dim=8), [shape.sequence(2)])
    with pytest.raises(ValueError, match="head_dim even"):
        whole(Shape(head_dim=7), [Shape(head_dim=7).sequence(2)])
    with pytest.raises(ValueError, match="block is outside the cache"):
        one_token_and_two_rows_behind(block=1)
    with pytest.raises(ValueError, match="slot is outside the cache"):
        one_token_and_two_rows_behind(slot=16)
