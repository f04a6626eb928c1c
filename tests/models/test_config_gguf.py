"""GGUF metadata: read right per architecture; what cannot be honoured is refused by its key."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.engine import models
from engineroom.engine.config import ConfigError, ModelConfig
from tests.counts import count

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
KEYS: dict[str, Any] = {
    "block_count": 4,
    "context_length": 4096,
    "embedding_length": 96,
    "feed_forward_length": 200,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 300,
}
MIXED: dict[str, Any] = {"expert_count": 8, "expert_used_count": 2}
FREQS = {"rope_freqs.weight": (1.0,) * 7 + (8.0,)}
LONG = {"rope_factors_long.weight": (4.0,) * 8, "rope_factors_short.weight": (1.0,) * 8}


def read(
    arch: str,
    tensors: dict[str, tuple[float, ...]] | None = None,
    names: tuple[str, ...] = (),
    **changes: Any,
) -> ModelConfig:
    """KEYS with changes; in the names `__` is a dot, and `...` leaves a key out."""
    keys = {**KEYS, **{k.replace("__", "."): v for k, v in changes.items()}}
    meta = {f"{arch}.{k}": v for k, v in keys.items() if v is not ...}
    meta |= {"general.architecture": arch, "tokenizer.ggml.eos_token_id": 2}
    given_tensors = tensors or {}
    return models.find_by_gguf(arch).config_from_gguf(
        meta, ("token_embd.weight", *names, *given_tensors), given_tensors
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_common_keys(arch: str) -> None:
    config = read(arch)
    assert (config.family, config.num_layers, config.num_heads, config.num_kv_heads) == (
        arch,
        4,
        6,
        2,
    )
    assert (config.head_dim, config.vocab_size, config.eos_token_ids) == (16, 300, (2,))
    assert config.tie_embeddings and not read(arch, names=("output.weight",)).tie_embeddings
    assert config.norm_offset == 0.0  # Gemma's converter has added it
    assert config.rope.interleaved == (arch == "llama")
    assert config.notes == ()
    assert read(arch, attention__key_length=32, attention__value_length=32).head_dim == 32


def test_what_the_architectures_read() -> None:
    assert read("llama", rope__freq_base=5e5).rope.theta == 5e5
    assert read("llama", FREQS).rope.freq_divisors == FREQS["rope_freqs.weight"]
    assert set(read("llama", attention__sliding_window=9).windows) == {9}
    assert read("llama", names=("blk.0.attn_q.bias",)).qkv_bias
    assert read("qwen2").qkv_bias and read("qwen3").qk_norm
    gemma2 = read("gemma2", attention__sliding_window=9)
    assert gemma2.windows == (9, 0, 9, 0) and gemma2.attention_softcap == 50.0
    gemma3 = read("gemma3", attention__sliding_window=9, block_count=7)
    assert gemma3.windows == (9,) * 5 + (0, 9)
    assert gemma3.rope.theta == 1e6 and gemma3.rope_local and gemma3.rope_local.theta == 1e4
    assert gemma3.embedding_scale == math.sqrt(96)
    assert gemma3.attention_scale == 16**-0.5
    # The 27B models, told by their number of layers: the scale is of hidden size / heads.
    big = read("gemma3", block_count=62, attention__key_length=32, attention__value_length=32)
    assert big.attention_scale == (96 / 6) ** -0.5
    scaled = read("gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert (scaled.rope.kind, scaled.rope.factor) == ("linear", 8.0)
    assert scaled.rope_local and scaled.rope_local.kind == "default"
    phi = read("phi3", LONG, rope__scaling__original_context_length=1024)
    assert (phi.rope.kind, phi.rope.factor) == ("longrope", 4.0)
    assert phi.rope.table(4096)[0][0] == 0.25 and phi.rope.table(1024)[0][0] == 1.0
    assert phi.rope.table(4096)[1] == math.sqrt(1 + math.log(4) / math.log(1024))
    given_factor = read("phi3", LONG, rope__scaling__attn_factor=1.25)
    assert given_factor.rope.table(4096)[1] == 1.25
    yarn = read("qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0)
    assert yarn.rope.table(4096)[1] == pytest.approx(0.1 * math.log(4) + 1)


def test_what_files_say_of_experts() -> None:
    mixtral = read("llama", **MIXED)
    assert (mixtral.family, mixtral.num_experts, mixtral.experts_per_token) == ("mixtral", 8, 2)
    assert mixtral.expert_size == 200 and mixtral.renormalise_experts
    assert read("llama", expert_count=0, expert_used_count=0).family == "llama"
    sizes = {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 48}
    names = ("blk.1.ffn_gate.weight", "blk.0.attn_q.bias")
    qwen2 = read("qwen2moe", names=names, **MIXED, **sizes)
    assert (qwen2.family, qwen2.expert_size, qwen2.shared_expert_size) == ("qwen2_moe", 24, 48)
    assert not qwen2.renormalise_experts and qwen2.qkv_bias
    assert qwen2.dense_layers == (1,) and qwen2.num_mixtures == 3 and qwen2.notes == ()
    qwen3 = read("qwen3moe", **MIXED, expert_feed_forward_length=24)
    assert qwen3.renormalise_experts and qwen3.qk_norm and qwen3.num_mixtures == 4
    assert not read("qwen3moe", **MIXED, expert_weights_norm=False).renormalise_experts


def test_vocabulary_size_from_the_token_list() -> None:
    meta = {f"llama.{k}": v for k, v in KEYS.items() if k != "vocab_size"}
    family = models.find_by_gguf("llama")
    config = family.config_from_gguf({**meta, "tokenizer.ggml.tokens": ["a"] * 7}, ())
    assert config.vocab_size == 7
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.tokens"):
        family.config_from_gguf(meta, ())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"block_count": ...}, "llama.block_count"),
    ("llama", {"block_count": "4"}, "llama.block_count"),
    ("llama", {"attention__head_count": [6, 6, 6, 6]}, "llama.attention.head_count"),
    ("llama", {"attention__head_count_kv": 4}, "llama.attention.head_count_kv"),
    ("llama", {"attention__value_length": 8}, "llama.attention.value_length"),
    ("llama", {"embedding_length": 95}, "llama.attention.key_length"),
    ("qwen2", {"expert_count": 8}, "qwen2.expert_count"),
    ("llama", {"expert_count": 8}, "llama.expert_used_count"),
    ("llama", {"expert_count": 8, "expert_used_count": 9}, "llama.expert_used_count"),
    ("llama", {"expert_used_count": 2}, "llama.expert_used_count"),
    ("qwen2moe", {}, "qwen2moe.expert_count"),
    ("qwen3moe", {**MIXED, "expert_gating_func": 2}, "qwen3moe.expert_gating_func"),
    ("llama", {"rope__scaling__type": "su"}, "llama.rope.scaling.type"),
    ("llama", {"rope__scaling__type": "longrope"}, "rope_factors_long.weight"),
    ("llama", {"rope__scaling__factor": 0.5}, "llama.rope.scaling.factor"),
    ("llama", {"rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
    ("llama", {"rope__dimension_count": 18}, "llama.rope.dimension_count"),
    ("llama", {"rope__freq_base": math.inf}, "llama.rope.freq_base"),
    ("llama", {"attention__causal": False}, "llama.attention.causal"),
    ("llama", {"tensors": {"rope_freqs.weight": (1.0,) * 7}}, "rope_freqs.weight"),
    ("llama", {"tensors": {"rope_freqs.weight": (0.0,) * 8}}, "rope_freqs.weight"),
    ("llama", {"names": ("rope_freqs.weight",)}, "rope_freqs.weight"),
    ("phi3", {"tensors": {"rope_factors_long.weight": (1.0,) * 8}}, "rope_factors_short.weight"),
    ("gemma3", {"attention__sliding_window": -1}, "gemma3.attention.sliding_window"),
]


@pytest.mark.parametrize(("arch", "changes", "field"), REFUSED)
def test_refused_naming_the_key(arch: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(arch, **changes)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_unknown_keys_of_the_architecture_become_a_note() -> None:
    assert read("qwen3", novelty=1).notes == ("not used: qwen3.novelty",)


MORE = """attention.key_length attention.value_length attention.scale attention.sliding_window
attention.sliding_window_pattern rope.freq_base rope.dimension_count rope.scaling.type
rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor
rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow attn_logit_softcapping expert_count
expert_used_count expert_feed_forward_length expert_weights_norm"""
hostile = (
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.sampled_from([1 << 24, 1 << 63, -(1 << 63)])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["", "yarn", "linear", "longrope", "none"])
    | st.lists(st.integers(-1, 8), max_size=3)
)


@given(
    st.sampled_from([*ARCHITECTURES, "qwen2moe", "qwen3moe"]),
    st.dictionaries(st.sampled_from([*KEYS, *MORE.split()]), hostile, min_size=1, max_size=5),
    st.dictionaries(
        st.sampled_from([*FREQS, *LONG]),
        st.lists(st.floats(0.5, 4) | hostile, min_size=8, max_size=8).map(tuple),
    ),
)
@settings(max_examples=count(reduced=150, full=3000), deadline=None)
def test_any_metadata_is_read_or_refused_by_key(
    arch: str, changes: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Whatever the values: a ModelConfig whose ropes are numbers, or ConfigError naming a key."""
    try:
        config = read(arch, tensors, **changes)
    except ConfigError as error:
        assert error.field and error.field in str(error) and str(error).isprintable()
        return
    for rope in filter(None, (config.rope, config.rope_local)):
        freqs, factor = rope.table(config.max_position)
        assert all(math.isfinite(f) and f > 0 for f in freqs) and math.isfinite(factor)
    if config.num_layers <= 32:
        models.record(models.families()[config.family], config)
