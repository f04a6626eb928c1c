"""The public operations: signature, shapes, formula, and the numerics that every backend shares.

A model file calls these on handles. Each checks its shapes once and appends to the Program.
Written here, once, is what an operation means; `kernels/reference/` says it in readable torch, and
every other backend is held to that.

Numerics shared by all backends
-------------------------------
* Inside an operation everything is fp32; its result is rounded once to the activation dtype
  (float32, bfloat16 or float16). Logits stay fp32: the Program's result, and back from it through
  `scale` and `softcap` to the operation they follow (the head's `linear`), which is not rounded
  either; nor are the ids that `top_experts` makes. Weights of one dimension (norms, biases) take
  part as fp32.
* Law 2: a row of a result depends on that row's operands alone, bit for bit: never on T, on the
  row's place among the T rows, on its neighbours, on threads, or on how a prompt was chunked. So
  every reduction has an order fixed by shapes that do not contain T.
* `linear` multiplies the weight's own values (a quantised weight means its dequantised values).
* A mixture of experts: a token's experts stand in the order of `top_experts`, best first, and are
  summed in that order. Which other tokens chose an expert shows in no bit.
* `attention` reads keys in tiles aligned to absolute positions, in ascending order; a tile that a
  row's mask hides entirely leaves the row's running maximum, sum and accumulator untouched. The
  size of a tile is the backend's own, the same for every step. Slots at or past a sequence's
  length hold anything, NaN too, and are not read.
The sampling program's numerics are in `kernels/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .program import Attr, Dim, Handle, Program, R, T

__all__ = [
    "STEP_INPUTS",
    "Handle",
    "Program",
    "StepHandles",
    "add",
    "attention",
    "clamped_silu_mul",
    "embedding",
    "expert_linear",
    "expert_sum",
    "expert_weights",
    "gelu_tanh_mul",
    "kv_write",
    "linear",
    "rms_norm",
    "rope",
    "scale",
    "select_rows",
    "sigmoid_scale",
    "silu_mul",
    "softcap",
    "top_experts",
]

# Name and shape of every step input a Program may read. Attention and kv_write also read the
# packed step's sequence metadata (see backend.StepInputs), which is not an operand of the model.
STEP_INPUTS: dict[str, tuple[str, ...]] = {
    "token_ids": (T,),
    "positions": (T,),
    "logit_rows": (R,),
}


class ShapeError(ValueError):
    """An operation was given operands whose shapes do not fit; the message names both."""


@dataclass(frozen=True)
class StepHandles:
    """What a model's forward() gets as `step`."""

    token_ids: Handle  # [T]
    positions: Handle  # [T]
    logit_rows: Handle  # [R]

    @classmethod
    def of(cls, program: Program) -> StepHandles:
        return cls(**{name: program.input(name, shape) for name, shape in STEP_INPUTS.items()})


def embedding(table: Handle, token_ids: Handle) -> Handle:
    """out[t] = table[token_ids[t]].  table [V, H], token_ids [T] -> [T, H]."""
    _rank("embedding", "table", table, 2)
    _rank("embedding", "token_ids", token_ids, 1)
    return _append("embedding", (table, token_ids), {}, (token_ids.shape[0], table.shape[1]))


def linear(x: Handle, weight: Handle, bias: Handle | None = None) -> Handle:
    """out = x @ weight.T + bias.  x [*, K], weight [N, K], bias [N] or None -> [*, N].

    fp32 accumulation in an order fixed by K; the bias is added to the finished sum.
    """
    _rank("linear", "x", x, 2)
    _rank("linear", "weight", weight, 2)
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(f"linear: x is {_show(x)}, weight is {_show(weight)}: K differs")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ShapeError(f"linear: weight is {_show(weight)}, bias is {_show(bias)}")
    return _append("linear", (x, weight, bias), {}, (x.shape[0], weight.shape[0]))


def rms_norm(x: Handle, weight: Handle, *, eps: float, offset: float = 0.0) -> Handle:
    """out = x / sqrt(mean(x^2) + eps) * (weight + offset), over groups of len(weight).

    x [T, G*D], weight [D] -> [T, G*D]: with D = hidden size it is the usual norm, with D = head
    size the per-head query/key norm. `offset` is 1 where the checkpoint stores weight - 1 (Gemma).
    Root mean square layer normalisation, Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    _rank("rms_norm", "x", x, 2)
    _rank("rms_norm", "weight", weight, 1)
    if _int(x, 1) % _int(weight, 0):
        raise ShapeError(
            f"rms_norm: rows of {x.shape[1]} are not whole groups of {weight.shape[0]}"
        )
    return _append("rms_norm", (x, weight), {"eps": eps, "offset": offset}, x.shape)


def add(a: Handle, b: Handle) -> Handle:
    """out = a + b, elementwise over equal shapes."""
    _same("add", a, b)
    return _append("add", (a, b), {}, a.shape)


def scale(x: Handle, factor: float) -> Handle:
    """out = x * factor (factor rounded to fp32)."""
    return _append("scale", (x,), {"factor": factor}, x.shape)


def softcap(x: Handle, cap: float) -> Handle:
    """out = cap * tanh(x / cap), a division (Gemma 2, arXiv:2408.00118)."""
    if not cap > 0:
        raise ValueError(f"softcap: the cap must be above 0, not {cap}")
    return _append("softcap", (x,), {"cap": cap}, x.shape)


def silu_mul(gate: Handle, up: Handle) -> Handle:
    """out = gate / (1 + exp(-gate)) * up, elementwise over equal shapes (SwiGLU)."""
    _same("silu_mul", gate, up)
    return _append("silu_mul", (gate, up), {}, gate.shape)


def gelu_tanh_mul(gate: Handle, up: Handle) -> Handle:
    """out = gelu(gate) * up, elementwise over equal shapes (GeGLU).

    gelu(x) = x/2 (1 + tanh(u)) = x / (1 + exp(-2u)), with u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    _same("gelu_tanh_mul", gate, up)
    return _append("gelu_tanh_mul", (gate, up), {}, gate.shape)


def clamped_silu_mul(gate: Handle, up: Handle) -> Handle:
    """out = g / (1 + exp(-1.702 g)) * (u + 1), elementwise over equal shapes.

    g = min(gate, 7), u = max(-7, min(up, 7)); a NaN stays one (gpt-oss, arXiv:2508.10925).
    """
    _same("clamped_silu_mul", gate, up)
    return _append("clamped_silu_mul", (gate, up), {}, gate.shape)


def sigmoid_scale(x: Handle, gate: Handle) -> Handle:
    """out[t] = x[t] * s, s = 1 / (1 + exp(-gate[t])) rounded to fp32.  x [T, H], gate [T, 1].

    The shared expert's gate of Qwen2-MoE (arXiv:2407.10671).
    """
    _rank("sigmoid_scale", "x", x, 2)
    if gate.shape != (x.shape[0], 1):
        raise ShapeError(
            f"sigmoid_scale: gate is {_show(gate)}, expected one column beside {_show(x)}"
        )
    return _append("sigmoid_scale", (x, gate), {}, x.shape)


def rope(
    x: Handle,
    positions: Handle,
    *,
    head_dim: int,
    inv_freq: Sequence[float],
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> Handle:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).  x [T, G*head_dim] -> same.

    The first 2*len(inv_freq) dims of each head are rotated, the rest pass. Pair j is dims
    (j, j + len(inv_freq)), or (2j, 2j+1) where `interleaved`. The angle is
    float32(position) * float32(inv_freq[j]), a float32 product; its exact cos and sin are rounded
    to float32 and multiplied by float32(attention_factor) (YaRN).
    """
    _rank("rope", "x", x, 2)
    if _int(x, 1) % head_dim:
        raise ShapeError(f"rope: rows of {x.shape[1]} are not whole heads of {head_dim}")
    if 2 * len(inv_freq) > head_dim:
        raise ShapeError(f"rope: {len(inv_freq)} frequencies rotate more than a head of {head_dim}")
    attrs: dict[str, Attr] = {
        "head_dim": head_dim,
        "inv_freq": tuple(float(f) for f in inv_freq),
        "attention_factor": float(attention_factor),
        "interleaved": interleaved,
    }
    return _append("rope", (x, positions), attrs, x.shape)


def kv_write(k: Handle, v: Handle, *, layer: int, num_kv_heads: int, head_dim: int) -> Handle:
    """Store K and V of every token at its slot of layer `layer`; slot -1 stores nothing.

    k, v [T, num_kv_heads*head_dim]. Returns a handle (shape [0]) that stands for the written
    cache, so that `attention` is ordered after it. Values are rounded to the cache's dtype.

    An int8 cache keeps, of each token and kv head, for K and for V apart: scale = m / 127, m being
    the largest magnitude of the head_dim values, and q = round-to-even(x * (127 / m)), all in fp32;
    what is read back is scale * q. Where 127 / m overflows (m below 4e-37) q is 0; where a value is
    NaN or infinite the scale is NaN.

    An fp8 cache is the same with 448 in the place of 127 and q rounded to even in e4m3 (4 bits of
    exponent, 3 of fraction, no infinity, 448 the largest; Micikevicius et al. 2022,
    arXiv:2209.05433). A scale to a row and not one for all: nothing saturates or is lost below
    2^-9, no prompt decides what another's keys become, and there is nothing to calibrate.

    An int4 cache keeps, of each 32 values of a token's kv head (of what is left at the end), for K
    and for V apart: offset = the least value, rounded down to bfloat16; scale = (the greatest value
    - offset) / 15, rounded up to bfloat16; and code = round-to-even((x - offset) * (1 / scale)), at
    most 15, all in fp32. What is read back is scale * code + offset, so a value is off by half a
    scale at most. Where 1 / scale overflows the code is 0; where a value of the 32 is NaN or
    infinite, or their distance from the offset overflows, scale and offset are NaN.

    A k8v4 cache keeps K as an int8 cache does and V as an int4 cache does.
    """
    _same("kv_write", k, v)
    if k.shape[1] != num_kv_heads * head_dim:
        raise ShapeError(f"kv_write: k is {_show(k)}, expected {num_kv_heads} heads of {head_dim}")
    attrs = {"layer": layer, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return _append("kv_write", (k, v), attrs, (0,))


def attention(
    q: Handle,
    cache: Handle,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Sequence[float] = (),
    sinks: Handle | None = None,
) -> Handle:
    """Causal attention of each token over its own sequence's paged KV.

    q [T, num_heads*head_dim] -> same. The token at position p attends keys at positions
    max(0, p - window + 1) .. p (window 0: from 0).
    score = q.k * scale; where softcap > 0, score = softcap * tanh(score / softcap). Query head h
    reads kv head h // (num_heads / num_kv_heads). Rows of slot -1 give zeros.

    alibi_slopes [num_heads], or empty for none: slope * (key position - p) is added to the score
    last (Press et al. 2021, arXiv:2108.12409). sinks [num_heads]: a weight, one logit of each query
    head that joins the softmax's sum and weighs no value (gpt-oss, arXiv:2508.10925).
    """
    _rank("attention", "q", q, 2)
    if num_heads % num_kv_heads:
        raise ShapeError(
            f"attention: {num_heads} query heads do not share {num_kv_heads} kv heads evenly"
        )
    if q.shape[1] != num_heads * head_dim:
        raise ShapeError(f"attention: q is {_show(q)}, expected {num_heads} heads of {head_dim}")
    if len(alibi_slopes) not in (0, num_heads):
        raise ShapeError(f"attention: {len(alibi_slopes)} slopes for {num_heads} query heads")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ShapeError(f"attention: sinks is {_show(sinks)}, expected [{num_heads}]")
    attrs: dict[str, Attr] = {
        "layer": layer,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "scale": float(scale),
        "window": window,
        "softcap": float(softcap),
        "alibi_slopes": tuple(float(slope) for slope in alibi_slopes),
    }
    return _append("attention", (q, cache, sinks), attrs, q.shape)


def top_experts(logits: Handle, top_k: int) -> Handle:
    """The ids of each token's top_k experts, by descending logit, ties to the lower id.

    logits [T, E] -> [T, top_k], whole numbers. A NaN counts as below every number, so that a row's
    ids are different ones of 0 .. E-1 whatever its logits hold.
    """
    _rank("top_experts", "logits", logits, 2)
    if not 1 <= top_k <= _int(logits, 1):
        raise ShapeError(
            f"top_experts: {top_k} of the {logits.shape[1]} experts of {_show(logits)}"
        )
    return _append("top_experts", (logits,), {"top_k": top_k}, (logits.shape[0], top_k))


def expert_weights(logits: Handle, experts: Handle, *, renormalise: bool) -> Handle:
    """What each chosen expert's result is multiplied by: out[t, j] = softmax(logits[t])[e_tj].

    logits [T, E], experts [T, k] of `top_experts` -> [T, k]. Where `renormalise`, the softmax is
    over the chosen logits alone, and a row's weights add up to 1. All in fp32, the largest logit
    subtracted first; the sum runs over ascending ids, or over the chosen in their order.
    """
    _rank("expert_weights", "logits", logits, 2)
    _rank("expert_weights", "experts", experts, 2)
    if logits.shape[0] != experts.shape[0]:
        raise ShapeError(f"expert_weights: rows differ, {_show(logits)} and {_show(experts)}")
    return _append("expert_weights", (logits, experts), {"renormalise": renormalise}, experts.shape)


def expert_linear(
    x: Handle, weight: Handle, experts: Handle, bias: Handle | None = None, *, num_experts: int
) -> Handle:
    """out[t, j] = x_tj @ weight_e.T + bias_e, e = experts[t, j]: `linear` by each chosen expert.

    weight [E*N, K] holds expert e in rows e*N .. (e+1)*N, and so does bias [E*N] (or None);
    experts [T, k] of `top_experts`; x [T, K], which every expert of a token reads, or [T, k*K],
    where x_tj is columns j*K .. (j+1)*K -> [T, k*N], in the same order. An element is that of the
    `linear` by weight_e and bias_e.
    """
    _rank("expert_linear", "x", x, 2)
    _rank("expert_linear", "weight", weight, 2)
    _rank("expert_linear", "experts", experts, 2)
    rows, width = _int(weight, 0), _int(weight, 1)
    top_k = _int(experts, 1)
    if num_experts < 1 or rows % num_experts:
        raise ShapeError(f"expert_linear: weight is {_show(weight)}, not {num_experts} equal parts")
    if x.shape[0] != experts.shape[0] or x.shape[1] not in (width, top_k * width):
        raise ShapeError(
            f"expert_linear: x is {_show(x)}, weight is {_show(weight)}, experts is "
            f"{_show(experts)}: a row of x must be {width} or {top_k} times {width} wide"
        )
    if bias is not None and bias.shape != (rows,):
        raise ShapeError(f"expert_linear: weight is {_show(weight)}, bias is {_show(bias)}")
    shape = (x.shape[0], top_k * (rows // num_experts))
    inputs = (x, weight, experts, bias)
    return _append("expert_linear", inputs, {"num_experts": num_experts}, shape)


def expert_sum(x: Handle, weights: Handle) -> Handle:
    """out[t] = sum over j of weights[t, j] * x_tj, x_tj being columns j*H .. (j+1)*H of x[t].

    x [T, k*H], weights [T, k] -> [T, H]. j ascends; each product is rounded to fp32, then added.
    """
    _rank("expert_sum", "x", x, 2)
    _rank("expert_sum", "weights", weights, 2)
    top_k = _int(weights, 1)
    if x.shape[0] != weights.shape[0] or _int(x, 1) % top_k:
        raise ShapeError(f"expert_sum: x is {_show(x)}, weights is {_show(weights)}")
    return _append("expert_sum", (x, weights), {}, (x.shape[0], _int(x, 1) // top_k))


def select_rows(x: Handle, rows: Handle) -> Handle:
    """out[r] = x[rows[r]].  x [T, H], rows [R] -> [R, H]."""
    _rank("select_rows", "x", x, 2)
    return _append("select_rows", (x, rows), {}, (rows.shape[0], x.shape[1]))


def _append(
    name: str,
    inputs: tuple[Handle | None, ...],
    attrs: Mapping[str, Attr],
    shape: tuple[Dim, ...],
) -> Handle:
    program = next(h.program for h in inputs if h is not None)
    return program.append(name, inputs, attrs, shape)


def _show(h: Handle) -> str:
    label = f"{h.name} " if h.name else ""
    return f"{label}[{', '.join(map(str, h.shape))}]"


def _int(h: Handle, axis: int) -> int:
    n = h.shape[axis]
    if not isinstance(n, int):
        raise ShapeError(f"{_show(h)}: axis {axis} must be a number here")
    return n


def _rank(op: str, operand: str, h: Handle, rank: int) -> None:
    if len(h.shape) != rank:
        raise ShapeError(f"{op}: {operand} is {_show(h)}, expected {rank} dimensions")


def _same(op: str, a: Handle, b: Handle) -> None:
    if a.shape != b.shape:
        raise ShapeError(f"{op}: shapes differ, {_show(a)} and {_show(b)}")
