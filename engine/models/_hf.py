"""What every family's config.json says: sizes, windows per layer, rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

DTYPES = ("float32", "bfloat16", "float16")
LAYER_TYPES = ("full_attention", "sliding_attention")

# Keys of config.json that do not change what is computed here.
_HARMLESS = """
_name_or_path _attn_implementation _attn_implementation_autoset architectures attention_dropout
auto_map bad_words_ids begin_suppress_tokens bos_token_id boi_token_index cache_implementation
decoder_start_token_id embd_pdrop eoi_token_index exponential_decay_length_penalty
finetuning_task id2label initializer_range keys_to_ignore_at_inference label2id max_length
max_new_tokens min_length model_type num_return_sequences output_attentions
output_hidden_states pad_token_id prefix problem_type resid_pdrop return_dict sep_token_id
task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript
transformers_version typical_p use_bfloat16 use_cache
"""
HARMLESS_HF = frozenset(_HARMLESS.split())
# Keys that change it, and the only values under which they do not.
NEUTRAL_HF: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "sparsity_config": (),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
}


def hf_sizes(
    fields: Fields, *, activation: tuple[str, str] = ("hidden_act", "silu"), tied: bool = False
) -> dict[str, Any]:
    """What every family's config.json says: keyword arguments of ModelConfig.

    `activation` is (key, the only value that the family's program computes); `tied` is what the
    family means where tie_word_embeddings is absent.
    """
    fields.ignore(*HARMLESS_HF)
    fields.neutral(NEUTRAL_HF)
    key, value = activation
    fields.choice(key, (value,), value)
    hidden = fields.integer("hidden_size", 1, MAX_SIZE)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, heads)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", kv_heads, f"a divisor of the {heads} query heads")
    head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, None)
    if head_dim is None:
        head_dim, rest = divmod(hidden, heads)
        if rest or not 2 <= head_dim <= MAX_HEAD_DIM:
            wanted = f"a multiple of the {heads} query heads, with 2..{MAX_HEAD_DIM} to each"
            raise fields.bad("hidden_size", hidden, wanted)
    vocab = fields.integer("vocab_size", 1, MAX_SIZE)
    bos = fields.token_ids("bos_token_id", vocab)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size", 1, MAX_SIZE),
        "norm_eps": fields.number("rms_norm_eps", 0.0, 1.0),
        "max_position": fields.integer("max_position_embeddings", 1, MAX_SIZE),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "dtype": _hf_dtype(fields),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": fields.token_ids("eos_token_id", vocab),
    }


def hf_window(fields: Fields, absent: int) -> int:
    """sliding_window in tokens, 0 for null; `absent` is what the class of transformers has."""
    return fields.integer("sliding_window", 1, MAX_SIZE, fields.absent("sliding_window", absent, 0))


def hf_windows(
    fields: Fields, layers: int, *, window: int, default: Sequence[str]
) -> tuple[int, ...]:
    """Each layer's window from layer_types (or `default`); `window` 0 means there is none."""
    types = fields.raw("layer_types", default)
    if (
        not isinstance(types, list | tuple)
        or len(types) != layers
        or not all(isinstance(t, str) and t in LAYER_TYPES for t in types)
    ):
        raise fields.bad("layer_types", types, f"{layers} of {', '.join(LAYER_TYPES)}")
    if not window and "sliding_attention" in types:
        raise ConfigError(
            "layer_types",
            f"{fields.where}: layer_types has sliding_attention layers, but no sliding_window is "
            "in force; set sliding_window (and use_sliding_window where the family has it)",
        )
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _hf_dtype(fields: Fields) -> str:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    fields.ignore("dtype", "torch_dtype")
    value = fields.raw(key, "float32")
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in DTYPES:
        raise fields.bad(key, value, "one of " + ", ".join(DTYPES))
    return name


# ---------------------------------------------------------------------------------- rope, HF

_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "attention_factor",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "short_factor",
        "long_factor",
        "attention_factor",
    ),
}
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_ALL_ROPE_KEYS = frozenset(_ROPE_COMMON).union(*_ROPE_KEYS.values())


def hf_rope(
    fields: Fields,
    sizes: Mapping[str, Any],
    *,
    kinds: Sequence[str] = RopeConfig.KINDS,
    default_theta: float = 10000.0,
    partial: bool = False,
) -> tuple[RopeConfig, list[str]]:
    """One RopeConfig for all layers, from rope_parameters (transformers 5) or rope_theta and
    rope_scaling (before), and notes. `partial`: the family honours partial_rotary_factor.
    """
    scaling = rope_dict(fields)
    nested = [k for k in LAYER_TYPES if isinstance(scaling.get(k), Mapping)]
    if nested:  # by layer type; these families have one rope, so the entries must agree
        if any(scaling[k] != scaling[nested[0]] for k in nested) or len(nested) != len(scaling):
            raise ConfigError(
                "rope_parameters",
                f"{fields.where}: rope_parameters differ between layer types, which this family "
                "does not have",
            )
        scaling = scaling[nested[0]]
    theta = rope_theta(fields, default_theta)
    fraction = fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    return hf_rope_entry(
        fields, scaling, sizes, kinds=kinds, theta=theta, fraction=fraction, partial=partial
    )


def rope_theta(fields: Fields, default: float, key: str = "rope_theta") -> float:
    """Above 1, since YaRN divides by its logarithm."""
    return fields.number(key, 1.0, 1e15, default)


def rope_dict(fields: Fields) -> Mapping[str, Any]:
    """rope_parameters or rope_scaling, whichever there is; {} for neither."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.raw(key, {})
        if not isinstance(value, Mapping):
            raise fields.bad(key, value, "an object of rope parameters")
        if value:
            found[key] = value
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ConfigError(
            "rope_scaling",
            f"{fields.where}: rope_parameters and rope_scaling are both given and differ; keep one",
        )
    return next(iter(found.values()), {})


def hf_rope_entry(
    fields: Fields,
    scaling: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    kinds: Sequence[str],
    theta: float,
    fraction: float = 1.0,
    partial: bool = False,
) -> tuple[RopeConfig, list[str]]:
    """One rope dictionary; `theta` and `fraction` are what holds where it does not say.

    Errors: ConfigError naming the key, also for a key that is not known at all: everything in
    such a dictionary changes the computation.
    """
    rope = Fields(scaling, f"{fields.where}: rope parameters")
    kind = rope.choice("rope_type" if rope.has("rope_type") else "type", kinds, "default")
    unknown = sorted(show(k) for k in scaling if k not in _ALL_ROPE_KEYS)
    if unknown:
        raise ConfigError(
            unknown[0].strip("'") or "''",
            f"{rope.where}: {unknown[0]} is not known; known: {', '.join(sorted(_ALL_ROPE_KEYS))}",
        )
    idle = [k for k in sorted(scaling) if k not in _ROPE_COMMON and k not in _ROPE_KEYS[kind]]
    notes = [f"not used by {kind} rope: {', '.join(idle)}"] if idle else []

    fraction = rope.number("partial_rotary_factor", 0.0, 1.0, fraction)
    if fraction != 1.0 and not partial:
        raise rope.bad("partial_rotary_factor", fraction, "1 in this family")
    rotary_dim = int(sizes["head_dim"] * fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "head_dim",
            f"{fields.where}: of head_dim {sizes['head_dim']}, {rotary_dim} dimensions rotate; "
            "that must be an even number, at least 2",
        )
    values: dict[str, Any] = {
        "theta": rope_theta(rope, theta),
        "rotary_dim": rotary_dim,
        "kind": kind,
    }
    max_position = sizes["max_position"]
    if kind in ("llama3", "yarn", "longrope"):
        outer = fields.integer("original_max_position_embeddings", 2, MAX_SIZE, None)
        inner = rope.integer("original_max_position_embeddings", 2, MAX_SIZE, max_position)
        values["original_max_position"] = outer or inner
        if values["original_max_position"] < 2:
            raise fields.bad("max_position_embeddings", max_position, "at least 2")
    if kind == "dynamic":
        values["original_max_position"] = max_position
        if rotary_dim < 4:
            raise fields.bad("head_dim", sizes["head_dim"], "at least 4 for dynamic rope")
    if kind in ("yarn", "longrope"):  # both may leave the factor to the ratio of the contexts
        ratio = max(1.0, max_position / values["original_max_position"])
        values["factor"] = _factor(rope, ratio)
        values["attention_factor"] = rope.number("attention_factor", 0.0, 1e6, None)
    elif kind != "default":
        values["factor"] = _factor(rope)
    if kind == "llama3":
        low = rope.number("low_freq_factor", 0.0, 1e6)
        high = rope.number("high_freq_factor", 0.0, 1e6)
        if not high > low:
            raise rope.bad("high_freq_factor", high, f"above low_freq_factor ({low:g})")
        values |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "yarn":
        fast = rope.number("beta_fast", 0.0, 1e6, 32.0)
        slow = rope.number("beta_slow", 0.0, 1e6, 1.0)
        if not fast > slow:
            raise rope.bad("beta_fast", fast, f"above beta_slow ({slow:g})")
        values |= {
            "beta_fast": fast,
            "beta_slow": slow,
            "mscale": _magnitude(rope, "mscale"),
            "mscale_all_dim": _magnitude(rope, "mscale_all_dim"),
            "truncate": rope.flag("truncate", True),
        }
    if kind == "longrope":
        values["short_factor"] = rope.divisors("short_factor", rotary_dim // 2)
        values["long_factor"] = rope.divisors("long_factor", rotary_dim // 2)
    return RopeConfig(**values), notes


def _factor(rope: Fields, default: Any = REQUIRED) -> float:
    value = rope.number("factor", 0.0, 1e6, default)
    if value < 1:
        raise rope.bad("factor", value, "at least 1: it stretches the context")
    return value


def _magnitude(rope: Fields, key: str) -> float:
    """0 (unset) or above."""
    value = rope.raw(key, 0)
    if is_number(value) and value == 0:
        return 0.0
    return rope.number(key, 0.0, 1e6)
