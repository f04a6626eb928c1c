"""config.json: published ones are read right; what cannot be honoured is refused by its key."""

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engineroom.engine import models
from engineroom.engine.config import ConfigError, ModelConfig
from tests.counts import count
from tests.models.published import CONFIGS


def read(values: dict[str, Any]) -> ModelConfig:
    return models.find_by_hf(values["architectures"][0]).config_from_hf(values)


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """A published configuration with keys set, or left out where the value is `...`."""
    values = {**CONFIGS[name], **changes}
    return {k: v for k, v in values.items() if v is not ...}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations(name: str) -> None:
    values = CONFIGS[name]
    config = read(values)
    assert config.hidden_size == values["hidden_size"]
    assert config.num_layers == len(config.windows) == values["num_hidden_layers"]
    assert config.num_kv_heads == values["num_key_value_heads"]
    assert config.head_dim == values.get("head_dim", config.hidden_size // config.num_heads)
    assert config.max_position == values["max_position_embeddings"]
    assert config.dtype == values.get("torch_dtype", "float32")
    eos = values["eos_token_id"]
    assert config.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    notes = ("not used: interpolate_factor, lm_head_bias",) if name == "Phi-4-mini" else ()
    assert config.notes == notes


def test_what_the_families_read() -> None:
    assert read(CONFIGS["Llama-2-7b"]).rope.theta == 10000.0
    assert read(CONFIGS["Llama-3.1-8B"]).rope.kind == "llama3"
    assert set(read(CONFIGS["Mistral-7B-v0.1"]).windows) == {4096}
    assert set(read(changed("Mistral-7B-v0.1", sliding_window=None)).windows) == {0}
    absent = read(changed("Mistral-7B-v0.1", sliding_window=...))
    assert set(absent.windows) == {4096} and "absent" in absent.notes[0]
    assert read(CONFIGS["Qwen2.5-0.5B"]).qkv_bias
    qwen = read(changed("Qwen2.5-0.5B", use_sliding_window=True, sliding_window=100))
    assert qwen.windows == (0,) * 21 + (100,) * 3
    assert read(CONFIGS["Qwen3-0.6B"]).qk_norm
    gemma2 = read(CONFIGS["gemma-2-2b"])
    assert gemma2.windows == (4096, 0) * 13 and gemma2.tie_embeddings
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert (gemma2.norm_offset, gemma2.embedding_scale) == (1.0, 48.0)
    no_caps = changed("gemma-2-2b", attn_logit_softcapping=None, final_logit_softcapping=...)
    assert (read(no_caps).attention_softcap, read(no_caps).final_softcap) == (0.0, 30.0)
    gemma3 = read(CONFIGS["gemma-3-1b-it"])
    assert gemma3.windows == ((512,) * 5 + (0,)) * 4 + (512,) * 2
    assert gemma3.rope.theta == 1e6 and gemma3.rope_local and gemma3.rope_local.theta == 1e4
    oss = read(CONFIGS["gpt-oss-20b"])
    assert oss.windows == (128, 0) * 12 and oss.qkv_bias and oss.o_bias
    assert (oss.num_experts, oss.experts_per_token, oss.expert_size) == (32, 4, 2880)
    assert (oss.rope.kind, oss.rope.truncate) == ("yarn", False)
    phi = read(CONFIGS["Phi-4-mini"])
    assert (phi.rope.rotary_dim, phi.rope.kind, phi.rope.factor) == (96, "longrope", 32.0)
    assert phi.rope.original_max_position == 4096


def test_transformers_5_spelling_is_the_same() -> None:
    """rope_parameters for rope_theta and rope_scaling, dtype for torch_dtype."""
    old = CONFIGS["Llama-3.1-8B"]
    rope = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    new = changed(
        "Llama-3.1-8B",
        torch_dtype=...,
        dtype="bfloat16",
        rope_theta=...,
        rope_scaling=...,
        rope_parameters=rope,
    )
    assert read(new) == read(old)
    nested = {"full_attention": rope, "sliding_attention": rope}
    assert read({**new, "rope_parameters": nested}) == read(old)
    gemma = changed(
        "gemma-3-1b-it",
        rope_theta=...,
        rope_scaling=...,
        rope_local_base_freq=...,
        sliding_window_pattern=...,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 4
        + ["sliding_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        },
    )
    assert read(gemma) == read(CONFIGS["gemma-3-1b-it"])


LLAMA3 = CONFIGS["Llama-3.1-8B"]["rope_scaling"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama-2-7b", {"hidden_act": "gelu"}, "hidden_act"),
    ("Llama-2-7b", {"pretraining_tp": 2}, "pretraining_tp"),
    ("Llama-2-7b", {"rope_scaling": {"type": "mrope"}}, "type"),
    ("Llama-2-7b", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("Llama-2-7b", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    ("Llama-2-7b", {"rope_scaling": {"rope_type": "linear", "factor": 2, "alpha": 3}}, "alpha"),
    ("Llama-2-7b", {"rope_scaling": "linear"}, "rope_scaling"),
    ("Llama-2-7b", {"rope_theta": 1}, "rope_theta"),
    ("Llama-2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("Llama-2-7b", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("Llama-2-7b", {"hidden_size": ...}, "hidden_size"),
    ("Llama-2-7b", {"hidden_size": True}, "hidden_size"),
    ("Llama-2-7b", {"hidden_size": 1 << 60}, "hidden_size"),
    ("Llama-2-7b", {"hidden_size": 10**5000}, "hidden_size"),  # repr() of it fails
    ("Llama-2-7b", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("Llama-2-7b", {"eos_token_id": True}, "eos_token_id"),
    ("Llama-2-7b", {"hidden_size": 4095}, "hidden_size"),
    ("Llama-2-7b", {"num_attention_heads": 0}, "num_attention_heads"),
    ("Llama-2-7b", {"num_key_value_heads": 5}, "num_key_value_heads"),
    ("Llama-2-7b", {"head_dim": 127}, "head_dim"),
    ("Llama-2-7b", {"num_hidden_layers": -1}, "num_hidden_layers"),
    ("Llama-2-7b", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ("Llama-2-7b", {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ("Llama-2-7b", {"vocab_size": 2.5}, "vocab_size"),
    ("Llama-2-7b", {"eos_token_id": 32000}, "eos_token_id"),
    ("Llama-2-7b", {"eos_token_id": [2, "3"]}, "eos_token_id"),
    ("Llama-2-7b", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ("Llama-2-7b", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("Llama-2-7b", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("Llama-3.1-8B", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor"),
    ("Llama-3.1-8B", {"rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
    ("Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window"),
    ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ("Qwen2.5-0.5B", {"mlp_bias": True}, "mlp_bias"),
    ("Qwen2.5-0.5B", {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
    ("Qwen2.5-0.5B", {"layer_types": ["full_attention"] * 23}, "layer_types"),
    ("Qwen3-0.6B", {"head_dim": ...}, "head_dim"),
    ("gemma-2-2b", {"attention_bias": True}, "attention_bias"),
    ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma-3-1b-it", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    ("gemma-3-1b-it", {"vision_config": {}}, "vision_config"),
    ("gpt-oss-20b", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("gpt-oss-20b", {"swiglu_alpha": 1.5}, "swiglu_alpha"),
    ("gpt-oss-20b", {"num_experts_per_tok": 33}, "num_experts_per_tok"),
    ("Phi-4-mini", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type"),
    ("Phi-4-mini", {"partial_rotary_factor": 0.5}, "short_factor"),
    ("Phi-4-mini", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
]


@pytest.mark.parametrize(("name", "changes", "field"), REFUSED)
def test_refused_naming_the_key(name: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(name, **changes))
    assert caught.value.field == field
    assert field in str(caught.value)


def test_unknown_keys_become_a_note() -> None:
    notes = read(changed("Llama-2-7b", some_flag=1, another="x", empty=None)).notes
    assert notes == ("not used: another, some_flag",)
    rope = {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}
    assert read(changed("Llama-2-7b", rope_scaling=rope)).notes == (
        "not used by linear rope: beta_fast",
    )


def test_architectures_not_known() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'LlamaForCausalLM'.*Qwen3ForCausalLM"):
        models.find_by_hf("LlamaForCausaLM")
    with pytest.raises(ConfigError, match="did you mean 'qwen2'"):
        models.find_by_gguf("qwen2vl")
    with pytest.raises(ConfigError, match="images are not supported"):
        models.find_by_hf("Gemma3ForConditionalGeneration")


KEYS = """rope_type type rope_theta factor original_max_position_embeddings low_freq_factor
high_freq_factor beta_fast beta_slow mscale mscale_all_dim truncate attention_factor short_factor
long_factor partial_rotary_factor full_attention sliding_attention"""
ROPE_KEYS = KEYS.split()
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([1 << 31, 1 << 63, -(1 << 63), 10**400, 1 << 24, 32768])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["", "silu", "default", "yarn", "llama3", "longrope", "dynamic", "linear"])
    | st.text(max_size=4)
)
ropes = st.dictionaries(st.sampled_from(ROPE_KEYS), scalars | st.lists(scalars, max_size=3))
hostile = (
    scalars
    | st.lists(scalars, max_size=3)
    | ropes
    | st.dictionaries(st.sampled_from(ROPE_KEYS), ropes, max_size=2)
    | st.dictionaries(st.text(max_size=3) | st.integers(), scalars, max_size=2)
)
MORE = """rope_parameters rope_scaling rope_theta layer_types sliding_window use_sliding_window
dtype head_dim rope_local_base_freq _sliding_window_pattern partial_rotary_factor
original_max_position_embeddings unknown"""
more_keys = st.sampled_from(MORE.split())


@given(st.data())
@settings(max_examples=count(reduced=150, full=3000), deadline=None)
@example(data=None)
def test_any_configuration_is_read_or_refused_by_key(data: Any) -> None:
    """Whatever the values: a ModelConfig whose ropes are numbers, or ConfigError naming a key."""
    if data is None:
        values = changed("Llama-2-7b", rope_scaling={1: 2, "a": 3})
    else:
        values = dict(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
        keys = st.sampled_from(sorted(values.keys() - {"architectures"})) | more_keys
        for key in data.draw(st.lists(keys, min_size=1, max_size=4)):
            values[key] = data.draw(hostile)
    try:
        config = read(values)
    except ConfigError as error:
        assert error.field and error.field in str(error) and str(error).isprintable()
        return
    for rope in filter(None, (config.rope, config.rope_local)):
        freqs, factor = rope.table(config.max_position)
        assert all(math.isfinite(f) and f > 0 for f in freqs) and math.isfinite(factor)
        assert len(freqs) == rope.rotary_dim // 2
    if config.num_layers <= 32:
        models.record(models.find_by_hf(values["architectures"][0]), config)
