"""What every family's GGUF metadata says: sizes, windows, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..config import ConfigError, RopeConfig
from ._fields import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIZE,
    REQUIRED,
    Fields,
    is_number,
    show,
)

# Float tensors that are configuration, not weights; who opens the file hands in their values.
NO_TENSORS: Mapping[str, Sequence[float]] = MappingProxyType({})
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"

# Keys under the architecture's prefix that change the computation, and the only values under
# which they do not.
NEUTRAL_GGUF: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "embedding_scale": (1,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False, True),  # read by none of these architectures
}
HARMLESS_GGUF = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


def gguf_fields(meta: Mapping[str, Any], architecture: str) -> Fields:
    """The keys under `architecture.` of a GGUF file."""
    return Fields(meta, "GGUF metadata", prefix=f"{architecture}.")


def gguf_sizes(
    fields: Fields, meta: Mapping[str, Any], tensor_names: Sequence[str], *, experts: bool = False
) -> dict[str, Any]:
    """What every family's GGUF metadata says: keyword arguments of ModelConfig.

    `experts`: the family may have them, and reads their keys itself.
    """
    fields.ignore(*HARMLESS_GGUF)
    fields.neutral(NEUTRAL_GGUF)
    if not experts:
        fields.neutral({"expert_count": (0,), "expert_used_count": (0,)})
    hidden = fields.integer("embedding_length", 1, MAX_SIZE)
    heads = fields.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = fields.integer("attention.head_count_kv", 1, MAX_HEADS, heads)
    if heads % kv_heads:
        raise fields.bad("attention.head_count_kv", kv_heads, f"a divisor of {heads}")
    fits = hidden % heads == 0 and 2 <= hidden // heads <= MAX_HEAD_DIM
    default_dim = hidden // heads if fits else REQUIRED
    head_dim = fields.integer("attention.key_length", 2, MAX_HEAD_DIM, default_dim)
    value_dim = fields.integer("attention.value_length", 2, MAX_HEAD_DIM, head_dim)
    if value_dim != head_dim:
        raise fields.bad("attention.value_length", value_dim, f"the key length, {head_dim}")
    whole = Fields(meta, "GGUF metadata")
    vocab = fields.integer("vocab_size", 1, MAX_SIZE, None)
    if vocab is None:
        tokens = whole.raw("tokenizer.ggml.tokens", ())
        vocab = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else 0
    if not 0 < vocab <= MAX_SIZE:
        raise ConfigError(
            "tokenizer.ggml.tokens",
            f"GGUF metadata: neither {fields.prefix}vocab_size nor tokenizer.ggml.tokens says how "
            "many tokens there are",
        )
    bos = whole.token_ids("tokenizer.ggml.bos_token_id", vocab)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": fields.integer("block_count", 1, MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer("feed_forward_length", 1, MAX_SIZE),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "max_position": fields.integer("context_length", 1, MAX_SIZE),
        "tie_embeddings": "output.weight" not in tensor_names,
        "attention_scale": _positive(fields, "attention.scale"),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": whole.token_ids("tokenizer.ggml.eos_token_id", vocab),
    }


def gguf_window(fields: Fields, default: int = 0) -> int:
    """attention.sliding_window in tokens; 0 = full attention."""
    return fields.integer("attention.sliding_window", 0, MAX_SIZE, default)


def gguf_softcap(fields: Fields, key: str, default: float = 0.0) -> float:
    return _positive(fields, key) if fields.has(key) else default


def gguf_rope(
    fields: Fields,
    sizes: Mapping[str, Any],
    tensor_names: Sequence[str],
    tensors: Mapping[str, Sequence[float]],
    *,
    default_theta: float = 10000.0,
    interleaved: bool = False,
) -> RopeConfig:
    """The rope of a GGUF file; `tensors` holds the values of the ROPE_ tensors that it has.

    attn_factor is what cos and sin are multiplied by; with YaRN it multiplies what YaRN itself
    prescribes (llama.cpp has it so). Errors: ConfigError naming the key or tensor.
    """
    unread = [n for n in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT) if n in tensor_names]
    for name in unread:
        if name not in tensors:
            raise ConfigError(name, f"the file has {name!r}, and its values were not read")
    head_dim, max_position = sizes["head_dim"], sizes["max_position"]
    rotary_dim = fields.integer("rope.dimension_count", 2, MAX_SIZE, head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise fields.bad("rope.dimension_count", rotary_dim, f"even and at most {head_dim}")
    key = "rope.scaling.original_context_length"
    original = fields.integer(key, 0, MAX_SIZE, 0) or max_position
    values: dict[str, Any] = {
        "theta": fields.number("rope.freq_base", 1.0, 1e15, default_theta),
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
        "freq_divisors": _divisors(ROPE_FREQS, tensors, rotary_dim // 2),
    }
    kind = fields.choice("rope.scaling.type", ("none", "linear", "yarn", "longrope"), "none")
    factor = _positive(fields, "rope.scaling.factor") or 1.0
    if factor < 1:
        raise fields.bad("rope.scaling.factor", factor, "at least 1: it stretches the context")
    fast = fields.number("rope.scaling.yarn_beta_fast", 0.0, 1e6, 32.0)
    slow = fields.number("rope.scaling.yarn_beta_slow", 0.0, 1e6, 1.0)
    if not fast > slow:
        raise fields.bad("rope.scaling.yarn_beta_fast", fast, f"above yarn_beta_slow ({slow:g})")
    attn_factor = _positive(fields, "rope.scaling.attn_factor") or None
    yarn_attn_factor = _positive(fields, "rope.scaling.yarn_attn_factor") or 1.0

    if ROPE_LONG in tensors or ROPE_SHORT in tensors or kind == "longrope":
        if original < 2:
            raise fields.bad(key, original, "at least 2")
        return RopeConfig(
            **values,
            kind="longrope",
            factor=max(1.0, max_position / original),
            original_max_position=original,
            attention_factor=attn_factor,
            long_factor=_divisors(ROPE_LONG, tensors, rotary_dim // 2, required=True),
            short_factor=_divisors(ROPE_SHORT, tensors, rotary_dim // 2, required=True),
        )
    if kind == "yarn":
        magnitude = 1.0 + 0.1 * math.log(factor)
        return RopeConfig(
            **values,
            kind="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=magnitude * (attn_factor or 1.0) * yarn_attn_factor,
        )
    if attn_factor not in (None, 1.0):
        raise fields.bad("rope.scaling.attn_factor", attn_factor, f"1 with {kind} scaling")
    return RopeConfig(**values, kind="default" if kind == "none" else kind, factor=factor)


def _divisors(
    name: str, tensors: Mapping[str, Sequence[float]], length: int, *, required: bool = False
) -> tuple[float, ...]:
    if name not in tensors and not required:
        return ()
    values = tensors.get(name, ())
    if len(values) != length or not all(is_number(v) and 0 < v <= 1e9 for v in values):
        raise ConfigError(
            name, f"tensor {name!r} must hold {length} numbers above 0, it holds {show(values)}"
        )
    return tuple(float(v) for v in values)


def _positive(fields: Fields, key: str) -> float:
    """0 where the key is absent or 0, else above 0."""
    value = fields.raw(key, 0)
    return 0.0 if is_number(value) and value == 0 else fields.number(key, 0.0, 1e6)
