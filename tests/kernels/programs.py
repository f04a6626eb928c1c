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


def mixture(
    hidden: int = 32,
    ffn: int = 24,
    num_experts: int = 6,
    top_k: int = 3,
    shared: int = 40,
    vocab: int = 200,
) -> Program:
    """Attention and a mixture of experts, twice: as Mixtral has it, and as gpt-oss (with sinks,
    biases and a clamped gate) with a shared expert."""
    p = Program()
    step = ops.StepHandles.of(p)
    kv = {"num_kv_heads": 2, "head_dim": hidden // 4}
    x = ops.embedding(p.weight("embed", (vocab, hidden)), step.token_ids)
    for i in range(2):

        def w(name: str, *shape: int, i: int = i):  # type: ignore[no-untyped-def]
            return p.weight(f"{i}.{name}", shape)

        q = ops.linear(x, w("q", hidden, hidden))
        k, v = (ops.linear(x, w(n, hidden // 2, hidden)) for n in "kv")
        written = ops.kv_write(k, v, layer=i, **kv)
        sinks = w("sinks", 4) if i else None
        a = ops.attention(q, written, layer=i, num_heads=4, scale=0.3, sinks=sinks, **kv)
        x = ops.add(x, a)
        h = ops.rms_norm(x, w("norm", hidden), eps=1e-5)
        logits = ops.linear(h, w("router", num_experts, hidden))
        experts = ops.top_experts(logits, top_k)
        weights = ops.expert_weights(logits, experts, renormalise=i == 0)

        def by_experts(x, name: str, rows: int, columns: int, w=w, experts=experts, i=i):  # type: ignore[no-untyped-def]
            weight = w(name, num_experts * rows, columns)
            bias = w(f"{name}_bias", num_experts * rows) if i else None
            return ops.expert_linear(x, weight, experts, bias, num_experts=num_experts)

        gate, up = (by_experts(h, n, ffn, hidden) for n in ("gates", "ups"))
        gated = ops.clamped_silu_mul(gate, up) if i else ops.silu_mul(gate, up)
        each = by_experts(gated, "downs", hidden, ffn)
        y = ops.expert_sum(each, weights)
        if i:
            gate, up = (ops.linear(h, w(n, shared, hidden)) for n in ("gate", "up"))
            one = ops.linear(ops.silu_mul(gate, up), w("down", hidden, shared))
            y = ops.add(y, ops.sigmoid_scale(one, ops.linear(h, w("shared", 1, hidden))))
        x = ops.add(x, y)
    x = ops.select_rows(x, step.logit_rows)
    return p.finish(ops.linear(x, p.weight("embed", (vocab, hidden))))


def random_weights(program: Program, seed: int = 3) -> dict[str, np.ndarray]:
    """fp32 values for a Program's weights; matrices keep the size of what they multiply."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, handle in program.weights.items():
        shape = tuple(int(n) for n in handle.shape)
        values = rng.standard_normal(shape).astype(np.float32)
        out[name] = values / np.float32(shape[1] ** 0.5) if len(shape) == 2 else 1 + values / 8
    return out
