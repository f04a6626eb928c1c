"""Programs that several kernel tests run: a small transformer with every kind of operation."""

from __future__ import annotations

import numpy as np

from engineroom.kernels import ops
from engineroom.kernels.program import Program


def two_layers(
    hidden: int = 32, heads: int = 4, kv_heads: int = 2, vocab: int = 200, ffn: int = 80
) -> Program:
    """A small transformer with every kind of operation."""
    p = Program()
    step = ops.StepHandles.of(p)
    d = hidden // heads
    kv = {"num_kv_heads": kv_heads, "head_dim": d}
    inv_freq = [1000.0 ** (-i / (d // 2)) for i in range(d // 2)]
    x = ops.scale(ops.embedding(p.weight("embed", (vocab, hidden)), step.token_ids), 2.0)
    for i in range(2):

        def w(name: str, *shape: int, i: int = i):  # type: ignore[no-untyped-def]
            return p.weight(f"{i}.{name}", shape)

        h = ops.rms_norm(x, w("norm", hidden), eps=1e-5)
        q = ops.linear(h, w("q", hidden, hidden), w("q_bias", hidden))
        k = ops.linear(h, w("k", kv_heads * d, hidden))
        v = ops.linear(h, w("v", kv_heads * d, hidden))
        q = ops.rope(q, step.positions, head_dim=d, inv_freq=inv_freq)
        k = ops.rope(k, step.positions, head_dim=d, inv_freq=inv_freq)
        written = ops.kv_write(k, v, layer=i, **kv)
        a = ops.attention(q, written, layer=i, num_heads=heads, scale=0.3, softcap=9.0, **kv)
        x = ops.add(x, ops.linear(a, w("o", hidden, hidden)))
        h = ops.rms_norm(x, w("ffn_norm", hidden), eps=1e-5, offset=1.0)
        gate, up = ops.linear(h, w("gate", ffn, hidden)), ops.linear(h, w("up", ffn, hidden))
        act = ops.silu_mul(gate, up) if i else ops.gelu_tanh_mul(gate, up)
        x = ops.add(x, ops.linear(act, w("down", hidden, ffn)))
    x = ops.select_rows(x, step.logit_rows)
    return p.finish(ops.softcap(ops.linear(x, p.weight("embed", (vocab, hidden))), 20.0))


def random_weights(program: Program, seed: int = 3) -> dict[str, np.ndarray]:
    """fp32 values for a Program's weights; matrices keep the size of what they multiply."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, handle in program.weights.items():
        shape = tuple(int(n) for n in handle.shape)
        values = rng.standard_normal(shape).astype(np.float32)
        out[name] = values / np.float32(shape[1] ** 0.5) if len(shape) == 2 else 1 + values / 8
    return out
