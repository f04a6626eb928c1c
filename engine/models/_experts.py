"""What the families with mixtures of experts share: the mixture, its weights, its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels import ops
from ...kernels.ops import Handle
from ..config import ModelConfig
from ._blocks import Source, Sources, WeightHandles, WeightSpec, project
from ._fields import MAX_LAYERS, MAX_SIZE, Fields, is_number

MAX_EXPERTS = 1 << 12
TRAINING_HF = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")

# Keys of a GGUF file that would choose or weigh experts in another way.
NEUTRAL_GGUF: Mapping[str, tuple[Any, ...]] = {
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
}


# ModelConfig.activation -> what an expert's gate and up layer become.
GATES = {"silu": ops.silu_mul, "clamped_silu": ops.clamped_silu_mul}


def mixture(config: ModelConfig, x: Handle, layer: WeightHandles) -> Handle:
    """sum over e of p_e down_e(silu(gate_e(x)) * up_e(x)), e of the experts that x's router rates
    highest and p its softmax (Shazeer et al. 2017, arXiv:1701.06538).  x [T, H] -> [T, H].

    With biases where this model has them; silu(a) * b stands for the gate of config.activation.
    """
    logits = project(x, layer, "router")  # [T, E]
    experts = ops.top_experts(logits, config.experts_per_token)  # [T, k]
    weights = ops.expert_weights(logits, experts, renormalise=config.renormalise_experts)

    def each(x: Handle, name: str) -> Handle:
        bias = layer.get(f"{name}_bias")
        return ops.expert_linear(x, layer[name], experts, bias, num_experts=config.num_experts)

    gate = GATES[config.activation]
    gated = gate(each(x, "gate_experts"), each(x, "up_experts"))  # [T, k*F]
    return ops.expert_sum(each(gated, "down_experts"), weights)


# ------------------------------------------------------------------------------ weight tables


def expert_specs(
    config: ModelConfig, index: int, *, block: str = "mlp", names: Sequence[str] = ()
) -> list[WeightSpec]:
    """Router and experts of layer `index`.

    `block` is the module of a Hugging Face layer that holds them, `names` are an expert's gate, up
    and down in it. Checkpoints that keep all experts in one tensor, as transformers 5 does in
    memory, have gate and up in one, and GGUF files may too.
    """
    count, hidden, ffn = config.num_experts, config.hidden_size, config.expert_size
    hf, gguf = f"model.layers.{index}", f"blk.{index}"
    names = names or ("gate_proj", "up_proj", "down_proj")
    router = WeightSpec(
        f"layers.{index}.router",
        (count, hidden),
        (Source(f"{hf}.{block}.gate.weight"),),
        (Source(f"{gguf}.ffn_gate_inp.weight"),),
        ((Source(f"{hf}.mlp.gate.weight"),),),
    )
    fused = {"hf": f"{hf}.mlp.experts.gate_up_proj", "gguf": f"{gguf}.ffn_gate_up_exps.weight"}

    def halves(name: str, half: int) -> Sources:
        """Gate (0) or up (1) of each expert in a tensor [E, 2F, H]."""
        starts = ((2 * e + half) * ffn for e in range(count))
        return tuple(Source(name, (at, at + ffn), (count, 2 * ffn, hidden)) for at in starts)

    specs = [router]
    for which, name in zip(("gate", "up", "down"), names, strict=True):
        rows, columns = (hidden, ffn) if which == "down" else (ffn, hidden)
        stacked: tuple[Sources, ...]
        if which == "down":
            stacked = ((Source(f"{hf}.mlp.experts.down_proj", shape=(count, rows, columns)),),)
        else:
            stacked = tuple(halves(tensor, which == "up") for tensor in fused.values())
        specs.append(
            WeightSpec(
                f"layers.{index}.{which}_experts",
                (count * rows, columns),
                tuple(
                    Source(f"{hf}.{block}.experts.{e}.{name}.weight", shape=(rows, columns))
                    for e in range(count)
                ),
                (Source(f"{gguf}.ffn_{which}_exps.weight", shape=(count, rows, columns)),),
                stacked,
            )
        )
    return specs


def shared_specs(config: ModelConfig, index: int) -> list[WeightSpec]:
    """The expert of every token, as `gate`, `up` and `down`, and its gate, in layer `index`."""
    hidden, ffn = config.hidden_size, config.shared_expert_size
    hf, gguf = f"model.layers.{index}.mlp", f"blk.{index}"
    specs = [
        WeightSpec(
            f"layers.{index}.{which}",
            (hidden, ffn) if which == "down" else (ffn, hidden),
            (Source(f"{hf}.shared_expert.{which}_proj.weight"),),
            (Source(f"{gguf}.ffn_{which}_shexp.weight"),),
        )
        for which in ("gate", "up", "down")
    ]
    gate = WeightSpec(
        f"layers.{index}.shared_router",
        (1, hidden),
        (Source(f"{hf}.shared_expert_gate.weight"),),
        (Source(f"{gguf}.ffn_gate_inp_shexp.weight", shape=(1, hidden)),),
    )
    return [*specs, gate]


# ------------------------------------------------------------------------------ configuration


def hf_experts(fields: Fields, layers: int, *, count: int, top_k: int, size: int) -> dict[str, Any]:
    """Qwen's keys in config.json: keyword arguments of ModelConfig. The arguments are defaults."""
    fields.ignore(*TRAINING_HF)
    key = "num_experts" if fields.has("num_experts") else "num_local_experts"
    count = fields.integer(key, 1, MAX_EXPERTS, count)
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = fields.raw("mlp_only_layers", ())
    if not isinstance(dense, list | tuple) or not all(is_number(i) for i in dense):
        raise fields.bad("mlp_only_layers", dense, "a list of layers")
    return {
        "num_experts": count,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, count, min(top_k, count)),
        "expert_size": fields.integer("moe_intermediate_size", 1, MAX_SIZE, size),
        "renormalise_experts": fields.flag("norm_topk_prob", False),
        "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % step),
    }


def gguf_experts(
    fields: Fields, sizes: Mapping[str, Any], tensor_names: Sequence[str], *, renormalise: bool
) -> dict[str, Any]:
    """What a GGUF file says of its experts: keyword arguments of ModelConfig; none without them.

    `renormalise`: what the architecture does where the file does not say.
    """
    count = fields.integer("expert_count", 0, MAX_EXPERTS, 0)
    if not count:
        fields.neutral({"expert_used_count": (0,)})
        return {}
    fields.neutral(NEUTRAL_GGUF)
    top_k = fields.integer("expert_used_count", 1, count)
    dense = (i for i in range(sizes["num_layers"]) if f"blk.{i}.ffn_gate.weight" in tensor_names)
    return {
        "num_experts": count,
        "experts_per_token": top_k,
        "expert_size": fields.integer(
            "expert_feed_forward_length", 1, MAX_SIZE, sizes["intermediate_size"]
        ),
        "renormalise_experts": fields.flag("expert_weights_norm", renormalise),
        "dense_layers": tuple(dense),
    }
