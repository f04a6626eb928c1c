"""What the families share: weight tables, handles by canonical name, attention and gated MLP.

A family's file holds its own table of checkpoint names and its own forward(); the pieces here are
those whose formula is the same in every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...kernels import ops
from ...kernels.ops import Handle, Program, StepHandles
from ..config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps rows of a weight: a tensor's name, and rows [start, stop), or all.

    `shape`: the tensor's own, where the weight's does not tell it, but for dimensions of 1, which
    converters drop. One of three dimensions stands for its rows: [E, N, K] for E*N rows, and where
    `transposed` it is [E, K, N] in a file of floats (quantised rows are never transposed). `turns`:
    rows 0, turns, 2 turns, .. are meant first, then 1, turns + 1, ..; of what follows, `rows` are
    taken.
    """

    name: str
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    transposed: bool = False
    turns: int = 1


Sources = tuple[Source, ...]  # whose rows, one after another, are the weight


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a model: its canonical name, shape (rows first), and its sources.

    No source: that kind of checkpoint has no such weight. `otherwise`: sources of checkpoints
    without the first tensor of those.
    """

    name: str
    shape: tuple[int, ...]
    hf: Sources
    gguf: Sources
    otherwise: tuple[Sources, ...] = ()


class WeightHandles:
    """A Program's weights by canonical name; `layer(i)` gives those of one layer by short name."""

    def __init__(self, program: Program, specs: Iterable[WeightSpec], prefix: str = "") -> None:
        self.program = program
        self.shapes = {spec.name: spec.shape for spec in specs}
        self.prefix = prefix

    def __getitem__(self, name: str) -> Handle:
        full = self.prefix + name
        return self.program.weight(full, self.shapes[full])

    def get(self, name: str) -> Handle | None:
        """None where this model has no such weight (a bias, say)."""
        return self[name] if self.prefix + name in self.shapes else None

    def layer(self, index: int) -> WeightHandles:
        view = WeightHandles(self.program, (), f"layers.{index}.")
        view.shapes = self.shapes
        return view


# ------------------------------------------------------------------------------ weight tables

# A family's table: canonical name -> (name in a Hugging Face layer, name in a GGUF block).
# A third element gives the rows of a tensor that holds several weights.
Names = tuple[str, str] | tuple[str, str, tuple[int, int]]

# Buffers that older checkpoints stored; they follow from the configuration.
ROTARY_BUFFERS = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

ATTENTION: Mapping[str, Names] = {
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
}
MLP: Mapping[str, Names] = {
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
}


def biases(config: ModelConfig) -> dict[str, Names]:
    """Table entries of the biases that `config` says there are."""
    having = {"qkv": config.qkv_bias, "o": config.o_bias, "mlp": config.mlp_bias}
    which = [n for n in "qkv" if having["qkv"]] + ["o"] * having["o"] + list(MLP) * having["mlp"]
    table = {**ATTENTION, **MLP}
    return {
        f"{name}_bias": (
            table[name][0].removesuffix("weight") + "bias",
            table[name][1].removesuffix("weight") + "bias",
        )
        for name in which
    }


def weight_specs(config: ModelConfig, layer: Mapping[str, Names]) -> list[WeightSpec]:
    """The whole model's weights from one layer's table."""
    hidden, vocab = config.hidden_size, config.vocab_size

    def whole(name: str, shape: tuple[int, ...], hf: str, gguf: str) -> WeightSpec:
        return WeightSpec(name, shape, (Source(hf),), (Source(gguf),))

    specs = [whole("embed", (vocab, hidden), "model.embed_tokens.weight", "token_embd.weight")]
    for i in range(config.num_layers):
        specs += layer_specs(config, i, layer)
    specs.append(whole("final_norm", (hidden,), "model.norm.weight", "output_norm.weight"))
    if not config.tie_embeddings:
        specs.append(whole("lm_head", (vocab, hidden), "lm_head.weight", "output.weight"))
    return specs


def layer_specs(config: ModelConfig, index: int, layer: Mapping[str, Names]) -> list[WeightSpec]:
    """The weights of layer `index` that the table names."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes = {
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }

    def shape(name: str) -> tuple[int, ...]:
        if name.endswith("_bias"):
            return shapes[name.removesuffix("_bias")][:1]
        return shapes.get(name, (hidden,))  # the norms over the hidden dimension

    specs = []
    for name, (hf, gguf, *rows) in layer.items():
        span = rows[0] if rows else None
        specs.append(
            WeightSpec(
                f"layers.{index}.{name}",
                shape(name),
                (Source(f"model.layers.{index}.{hf}", span),),
                (Source(f"blk.{index}.{gguf}", span),),
            )
        )
    return specs


# ------------------------------------------------------------------------------------ pieces


def project(x: Handle, layer: WeightHandles, name: str) -> Handle:
    """x W^T + b, with the bias where this model has one.  [T, K] -> [T, N]."""
    return ops.linear(x, layer[name], layer.get(f"{name}_bias"))


def norm(config: ModelConfig, x: Handle, weight: Handle) -> Handle:
    """RMS norm over the width of `weight`: a row, or each head of it."""
    return ops.rms_norm(x, weight, eps=config.norm_eps, offset=config.norm_offset)


def attend(
    config: ModelConfig,
    step: StepHandles,
    q: Handle,
    k: Handle,
    v: Handle,
    *,
    index: int,
    rope: RopeConfig | None = None,
    sinks: Handle | None = None,
) -> Handle:
    """softmax(rope(q) rope(k)^T * scale) v over the sequence's cache, in layer `index`.

    q [T, heads*dim], k and v [T, kv_heads*dim] -> [T, heads*dim]. `rope` defaults to config.rope;
    sinks [heads]: see ops.attention.
    """
    rope = rope or config.rope
    inv_freq, attention_factor = rope.table(config.max_position)

    def rotate(x: Handle) -> Handle:
        return ops.rope(
            x,
            step.positions,
            head_dim=config.head_dim,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
            interleaved=rope.interleaved,
        )

    cache = ops.kv_write(
        rotate(k), v, layer=index, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    return ops.attention(
        rotate(q),
        cache,
        layer=index,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.score_scale,
        window=config.windows[index],
        softcap=config.attention_softcap,
        sinks=sinks,
    )


def swiglu(x: Handle, layer: WeightHandles) -> Handle:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""
    gated = ops.silu_mul(project(x, layer, "gate"), project(x, layer, "up"))
    return project(gated, layer, "down")


def geglu(x: Handle, layer: WeightHandles) -> Handle:
    """down(gelu(gate(x)) * up(x)), gelu by its tanh form (same paper)."""
    gated = ops.gelu_tanh_mul(project(x, layer, "gate"), project(x, layer, "up"))
    return project(gated, layer, "down")
