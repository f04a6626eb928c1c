"""The reference's paged attention: against float64 numpy over odd shapes, and law 2 as bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference backend needs torch")

from engineroom.kernels import ops  # noqa: E402
from engineroom.kernels.backend import KV_CODES, KV_DTYPES, KVSpec, StepInputs  # noqa: E402
from engineroom.kernels.program import Program  # noqa: E402
from engineroom.kernels.reference import ReferenceBackend  # noqa: E402
from engineroom.kernels.reference.attention import GROUP_TILES, KEY_TILE, QUERY_TILE  # noqa: E402
from tests.counts import count  # noqa: E402
from tests.kernels.packed_steps import (  # noqa: E402
    DTYPES,
    Paged,
    assert_close,
    raw,
    rounded,
)

VOCAB = 640  # distinct rows of q, k and v


@dataclass(frozen=True)
class Shape:
    """One attention layer; its q, k and v are embeddings of the token ids."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.3
    alibi: bool = False
    sinks: bool = False

    @property
    def slopes(self) -> tuple[float, ...]:
        """Powers of two for any number of heads, as Press et al. have them for powers of two."""
        return tuple(2.0 ** (-8 * (h + 1) / self.num_heads) for h in range(self.num_heads))

    def program(self) -> Program:
        program = Program()
        step = ops.StepHandles.of(program)
        q, k, v = (
            ops.embedding(program.weight(name, (VOCAB, heads * self.head_dim)), step.token_ids)
            for name, heads in (
                ("q", self.num_heads),
                ("k", self.num_kv_heads),
                ("v", self.num_kv_heads),
            )
        )
        # Written to layer 1 of 2: a cache that mixed up its layers would be seen.
        kv = {"layer": 1, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        cache = ops.kv_write(k, v, **kv)
        shape = {"num_heads": self.num_heads, "window": self.window, "softcap": self.softcap}
        if self.alibi:
            shape["alibi_slopes"] = self.slopes
        if self.sinks:
            shape["sinks"] = program.weight("sinks", (self.num_heads,))
        out = ops.attention(q, cache, scale=self.scale, **kv, **shape)
        return program.finish(ops.select_rows(out, step.logit_rows))

    def tables(self, seed: int = 0, spread: float = 1.5) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        tables = {
            name: (rng.standard_normal((VOCAB, n * self.head_dim)) * spread).astype(np.float32)
            for name, n in heads.items()
        }
        if self.sinks:
            tables["sinks"] = rng.standard_normal(self.num_heads).astype(np.float32) * 2
        return tables


class Layer:
    """A Shape, lowered, with its own cache."""

    def __init__(
        self,
        shape: Shape,
        *,
        block_size: int = 16,
        num_blocks: int = 128,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        threads: int = 1,
        fill: float = 0.0,
        spread: float = 1.5,
    ) -> None:
        backend = ReferenceBackend(activation_dtype=dtype, threads=threads)
        weights = {n: backend.pack(raw(t)) for n, t in shape.tables(spread=spread).items()}
        spec = KVSpec(2, shape.num_kv_heads, shape.head_dim, block_size, kv_dtype or dtype)
        self.cache = backend.allocate_kv(spec, num_blocks)
        for half in (self.cache.keys, self.cache.values):
            half.data.fill_(fill)
        self.pages = Paged(block_size, num_blocks, np.random.default_rng(1))
        self._executable = backend.lower(shape.program(), weights, self.cache)

    def run(self, step: StepInputs) -> np.ndarray:
        return self._executable.run(step).numpy()

    def feed(self, sequence: int, tokens: Sequence[int], chunk: int) -> np.ndarray:
        """The sequence alone, `chunk` tokens a step; every row's result."""
        parts = [
            self.run(self.pages.step({sequence: tokens[i : i + chunk]}))
            for i in range(0, len(tokens), chunk)
        ]
        return np.concatenate(parts)

    def feed_new(self, tokens: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """`feed` to a new sequence, by default in one step."""
        return self.feed(self.pages.add(), tokens, chunk or len(tokens))


def cached(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """x [n, heads, dim] as the cache holds it, in float64."""
    if kv_dtype == "int4":
        return in_4_bits(x.astype(np.float32))
    if kv_dtype not in KV_CODES:
        return rounded(x, kv_dtype)
    largest = np.float32({"int8": 127, "fp8": 448}[kv_dtype])
    most = np.abs(x.astype(np.float32)).max(-1, keepdims=True)
    q = x.astype(np.float32) * (largest / most)
    q = np.rint(q) if kv_dtype == "int8" else e4m3(q)
    return q.astype(np.float64) * (most / largest)


def in_4_bits(x: np.ndarray) -> np.ndarray:
    """ops.kv_write of an int4 cache, in groups of 32."""
    out = np.empty(x.shape)
    for d in range(0, x.shape[-1], 32):
        group = x[..., d : d + 32]
        offset = to_bfloat16(group.min(-1, keepdims=True), np.floor)
        scale = to_bfloat16((group.max(-1, keepdims=True) - offset) / np.float32(15), np.ceil)
        codes = np.minimum(np.rint((group - offset) * (1 / scale)), 15).astype(np.float64)
        out[..., d : d + 32] = codes * scale + offset
    return out


def to_bfloat16(x: np.ndarray, rounding: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """x with 8 significant bits."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(rounding(np.ldexp(fraction, 8)), exponent - 8).astype(np.float32)


E4M3 = np.array([(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)])
E4M3 = E4M3[:-1]  # the last code is NaN


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest of all 127 magnitudes, of two as near the one of the even code."""
    away = np.abs(np.abs(x.astype(np.float64))[..., None] - E4M3)
    even = np.arange(len(E4M3)) % 2
    return np.copysign(E4M3[np.lexsort((np.broadcast_to(even, away.shape), away))[..., 0]], x)


def oracle(
    shape: Shape, tokens: Sequence[int], dtype: str, kv_dtype: str, spread: float = 1.5
) -> np.ndarray:
    """One softmax per (token, head) over the keys it may see, in float64."""
    tables = shape.tables(spread=spread)
    t = {n: rounded(tables[n], dtype)[tokens] for n in "qkv"}
    d = shape.head_dim
    q = t["q"].reshape(len(tokens), -1, d)
    parts = zip("kv", KVSpec(1, 1, d, 1, kv_dtype).parts, strict=True)
    k, v = (cached(t[n].reshape(len(tokens), -1, d), part) for n, part in parts)
    out = np.zeros_like(q)
    for p in range(len(tokens)):
        first = max(0, p - shape.window + 1) if shape.window else 0
        for h in range(shape.num_heads):
            g = h // (shape.num_heads // shape.num_kv_heads)
            score = k[first : p + 1, g] @ q[p, h] * shape.scale
            if shape.softcap:
                score = shape.softcap * np.tanh(score / shape.softcap)
            if shape.alibi:
                score = score + shape.slopes[h] * (np.arange(first, p + 1) - p)
            if shape.sinks:  # one more key, without a value
                score = np.append(score, tables["sinks"][h])
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            out[p, h] = weight[: p + 1 - first] @ v[first : p + 1, g]
    return out.reshape(len(tokens), -1)


def tokens_of(length: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).permutation(VOCAB)[:length].tolist()


SHAPES = {
    "mha": Shape(num_heads=3, num_kv_heads=3),
    "gqa 4": Shape(num_heads=8, num_kv_heads=2),
    "gqa 8, one kv head": Shape(num_heads=8, num_kv_heads=1, head_dim=64, scale=0.1),
    "gqa 3": Shape(num_heads=9, num_kv_heads=3, head_dim=16),
    "head 80": Shape(head_dim=80, scale=0.1),
    "head 256": Shape(num_heads=2, num_kv_heads=1, head_dim=256, scale=0.05),
    "window 1": Shape(window=1),
    "window 24": Shape(window=24),
    "window of a key tile": Shape(window=KEY_TILE),
    "softcap": Shape(softcap=2.0),
    "window and softcap": Shape(window=33, softcap=5.0),
    "alibi": Shape(num_heads=6, alibi=True),
    "sinks": Shape(num_heads=6, sinks=True, window=20),
    "alibi, softcap and sinks": Shape(
        num_heads=9, num_kv_heads=3, alibi=True, sinks=True, softcap=3.0
    ),
}
# 1 token; a full last page; one past it; around one and two key tiles.
LENGTHS = (1, 16, 17, KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE + 5)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_its_formula(name: str) -> None:
    shape = SHAPES[name]
    layer = Layer(shape)
    for length in LENGTHS:
        tokens = tokens_of(length, seed=length)
        got = layer.feed(layer.pages.add(), tokens, chunk=length)
        assert_close(got, oracle(shape, tokens, "float32", "float32"), "float32", 4e-6)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_dtypes(dtype: str, kv_dtype: str) -> None:
    shape = SHAPES["gqa 4"]
    tokens = tokens_of(150)
    got = Layer(shape, dtype=dtype, kv_dtype=kv_dtype).feed_new(tokens)
    assert_close(got, oracle(shape, tokens, dtype, kv_dtype), dtype, 4e-6)


def test_huge_scores_do_not_overflow() -> None:
    """exp of scores in the thousands: only differences from the maximum count."""
    shape = Shape(scale=1.0)
    tokens = tokens_of(140)
    got = Layer(shape, spread=60.0).feed_new(tokens)
    assert np.isfinite(got).all()
    assert_close(got, oracle(shape, tokens, "float32", "float32", 60.0), "float32", 2e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_do_not_depend_on_chunking_or_block_size(name: str) -> None:
    shape = SHAPES[name]
    tokens = tokens_of(KEY_TILE + 61)
    whole = Layer(shape).feed_new(tokens)
    for block_size, chunk in ((8, 5), (24, 50), (32, KEY_TILE), (512, 33)):
        num_blocks = 1 + len(tokens) // block_size
        layer = Layer(shape, block_size=block_size, num_blocks=num_blocks, threads=2)
        some = layer.feed_new(tokens, chunk)
        assert some.tobytes() == whole.tobytes(), (block_size, chunk)


@pytest.mark.parametrize("name", ["gqa 3", "window and softcap"])
def test_one_token_at_a_time_is_the_whole(name: str) -> None:
    shape = SHAPES[name]
    tokens = tokens_of(KEY_TILE + 3)
    assert Layer(shape).feed_new(tokens, 1).tobytes() == Layer(shape).feed_new(tokens).tobytes()


@pytest.mark.parametrize("name", ["gqa 3", "window and softcap"])
def test_rows_do_not_depend_on_neighbours(name: str) -> None:
    """A sequence in steps mixed with 1..63 others, of any lengths and in any order."""
    shape = SHAPES[name]
    rng = np.random.default_rng(5)
    tokens = tokens_of(KEY_TILE + 20)
    alone = Layer(shape).feed_new(tokens)
    for trial in range(count(reduced=4, full=60)):
        num_others = (1, 3, 20, 63)[trial % 4]
        # A cache full of NaN: stale slots must not be read at all, not merely weighed with 0.
        layer = Layer(shape, num_blocks=2000, threads=1 + trial % 2, fill=np.nan)
        ours = layer.pages.add()
        others = [layer.pages.add() for _ in range(num_others)]
        done = 0
        while done < len(tokens):
            chunk = tokens[done : done + int(rng.integers(1, 80))]
            chunks = {s: rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for s in others}
            chunks[ours] = chunk
            order = rng.permutation(list(chunks)).tolist()
            step = layer.pages.step({s: chunks[s] for s in order})
            start = step.query_start[order.index(ours)]
            got = layer.run(step)[start : start + len(chunk)]
            assert got.tobytes() == alone[done : done + len(chunk)].tobytes()
            done += len(chunk)


def test_a_long_chunk_is_cut_into_groups_without_a_trace() -> None:
    shape = Shape(num_heads=8, num_kv_heads=1)
    length = GROUP_TILES * QUERY_TILE // 8 + 40
    layer = Layer(shape)
    tokens = tokens_of(length)
    whole = layer.feed_new(tokens)
    assert whole.tobytes() == layer.feed_new(tokens, 50).tobytes()


@pytest.mark.parametrize("placed", ["after the sequences", "inside a sequence"])
def test_padding_rows_write_nothing_and_give_zeros(placed: str) -> None:
    shape = SHAPES["gqa 4"]
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


def test_kv_write_stores_rounded_values_at_their_slots_alone() -> None:
    shape = Shape(num_heads=2, num_kv_heads=2, head_dim=8)
    layer = Layer(shape, block_size=4, num_blocks=8, kv_dtype="bfloat16", fill=9.0)
    tokens = [5, 3, 11, 2, 8]  # one full block and one slot of the next
    layer.feed_new(tokens)
    for half, name in ((layer.cache.keys, "k"), (layer.cache.values, "v")):
        want = torch.full_like(half.data, 9.0)
        for position, token in enumerate(tokens):
            block = layer.pages.tables[0][position // 4]
            row = torch.from_numpy(shape.tables()[name][token]).to(torch.bfloat16)
            want[block, 1, :, position % 4] = row.view(2, 8)
        assert torch.equal(half.data, want)


def test_kv_write_to_an_int8_cache_stores_steps_and_scales() -> None:
    spec = KVSpec(1, 2, 4, 4, "int8")
    cache = ReferenceBackend().allocate_kv(spec, 2)
    assert cache.nbytes == 2 * spec.bytes_per_block == 2 * 4 * 2 * 2 * (4 + 4)
    x = torch.tensor([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1e-38] * 4, [1, 2, float("nan"), 3]])
    heads = x.view(2, 1, 2, 4).repeat(1, 2, 1, 1)  # two tokens of two heads, k and v alike
    at = torch.tensor([1, 1]), torch.tensor([0, 3])
    cache.write(0, *at, heads)
    assert cache.keys.data[1, 0, :, 0].tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    for half in (cache.keys, cache.values):
        assert half.scales[1, 0, :, 0, 0].tolist() == [1.0, 0.0]
    assert cache.keys.data[1, 0, :, 3].tolist() == [[0] * 4] * 2
    got = cache.read(0, *at)
    assert got[0, 1].tolist() == [[127, 0, 2, -2], [0] * 4]
    assert got[1, 0, 0].tolist() == [0] * 4 and torch.isnan(got[1, 0, 1]).all()


def test_a_shared_prefix_reads_the_same_bits() -> None:
    """Blocks that another sequence wrote serve a prefix hit."""
    shape = SHAPES["gqa 3"]
    layer, tokens = Layer(shape), tokens_of(70)
    cold = layer.feed_new(tokens)
    hit = layer.pages.add()
    layer.pages.tables[hit] = layer.pages.tables[0][:4]
    layer.pages.lengths[hit] = 64
    assert layer.run(layer.pages.step({hit: tokens[64:]})).tobytes() == cold[64:].tobytes()


def test_lower_refuses_a_cache_that_does_not_fit() -> None:
    shape = Shape()
    backend = ReferenceBackend(threads=1)
    weights = {n: backend.pack(raw(t)) for n, t in shape.tables().items()}
    for spec in (KVSpec(1, 2, 8, 16, "float32"), KVSpec(2, 1, 8, 16, "float32")):
        cache = backend.allocate_kv(spec, 4)
        with pytest.raises(ValueError, match="layer 1 has 2 kv heads of 8; the KV cache has"):
            backend.lower(shape.program(), weights, cache)
    with pytest.raises(ValueError, match="no KV cache"):
        backend.lower(shape.program(), weights, None)
