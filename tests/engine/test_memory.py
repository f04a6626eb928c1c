"""The memory plan: its arithmetic, its refusals with numbers, and that it is held to."""

from __future__ import annotations

import pytest

from engineroom.engine.config import ConfigError, EngineConfig, ModelConfig, RopeConfig, parse_bytes
from engineroom.engine.runtime.memory import available_memory, kv_spec, plan_memory
from engineroom.kernels.backend import KVSpec

MiB = 2**20
MODEL = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    norm_eps=1e-5,
    max_position=2048,
    rope=RopeConfig(theta=1e4, rotary_dim=16),
)
KV = KVSpec(num_layers=4, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")


def plan(available=100 * MiB, weights=10 * MiB, workspace=2 * MiB, **options):
    config = EngineConfig(model="m", **options)
    return plan_memory(
        config, MODEL, weight_bytes=weights, workspace_bytes=workspace, kv=KV, available=available
    )


def test_kv_bytes_per_token_are_layers_times_two_times_heads_times_dim():
    assert KV.bytes_per_token == 4 * 2 * 2 * 16 * 4
    assert (
        kv_spec(
            EngineConfig(model="m", kv_cache_dtype="bfloat16"), MODEL, "float32"
        ).bytes_per_token
        == 512
    )


def test_an_int8_cache_has_a_scale_for_every_row():
    spec = kv_spec(EngineConfig(model="m", kv_cache_dtype="int8"), MODEL, "float32")
    assert spec.bytes_per_token == 4 * 2 * 2 * (16 + 4)


@pytest.mark.parametrize("head_dim, row", [(16, 16 + 4), (64, 32 + 8), (80, 48 + 12), (34, 32 + 8)])
def test_an_int4_cache_has_a_scale_and_an_offset_for_every_32_dims(head_dim, row):
    spec = KVSpec(num_layers=4, num_kv_heads=2, head_dim=head_dim, block_size=16, dtype="int4")
    assert spec.bytes_per_token == 4 * 2 * 2 * row


def test_a_k8v4_cache_has_the_keys_of_int8_and_the_values_of_int4():
    spec = KVSpec(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="k8v4")
    assert spec.bytes_per_token == 4 * 2 * ((64 + 4) + (32 + 8))


def test_the_cache_takes_what_the_requests_can_use_and_no_more():
    p = plan(max_num_seqs=2, max_model_len=100)
    assert p.fits and p.num_blocks == 2 * 7 and p.max_model_len == 100
    assert p.total == p.weights + p.workspace + p.kv <= p.budget
    assert p.requests_at(100) == 2 and p.requests_at(33) == 2


def test_the_budget_limits_the_cache():
    p = plan(max_num_seqs=4096, memory_budget="20MiB")
    assert p.fits and p.total <= 20 * MiB
    assert p.num_blocks == 8 * MiB // KV.bytes_per_block


def test_an_unset_context_shrinks_to_what_fits_and_says_so():
    p = plan(memory_budget="13MiB")
    assert p.fits and p.max_model_len == 1024 < MODEL.max_position
    assert "1024" in p.notes[0] and "2048" in p.notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"memory_budget": "13MiB", "max_model_len": 2048},
            ["2048", "128", "13.0 MiB", "max_model_len"],
        ),
        ({"memory_budget": "11MiB"}, ["10.0 MiB", "11.0 MiB", "memory_budget"]),
        ({"num_blocks": 10**6}, ["1000000 blocks", "num_blocks"]),
        ({"max_model_len": 4096}, ["4096", "2048"]),
    ],
)
def test_what_does_not_fit_is_told_with_numbers(options, words):
    p = plan(**options)
    assert not p.fits
    for word in words:
        assert word in p.because


def test_available_memory_is_sane():
    assert 64 * MiB < available_memory() < 2**50


@pytest.mark.parametrize(("text", "n"), [("1GiB", 2**30), ("2 GB", 2 * 10**9), ("512k", 512000)])
def test_bytes_are_read_as_people_write_them(text, n):
    assert parse_bytes(text) == n


@pytest.mark.torch
def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    golden_model, monkeypatch
):
    pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom import LLM
    from engineroom.engine.runtime import assemble
    from engineroom.engine.runtime.memory import DoesNotFit

    monkeypatch.setattr(assemble, "Runner", None)  # would be called to load
    with pytest.raises(DoesNotFit, match="budget"):
        LLM(str(golden_model), memory_budget="100KiB")


@pytest.mark.torch
def test_a_context_beyond_the_models_is_an_option_out_of_range(golden_model):
    pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom import LLM

    with pytest.raises(ConfigError, match="max_model_len=5000 is more than the 512") as error:
        LLM(str(golden_model), max_model_len=5000)
    assert error.value.field == "max_model_len"


@pytest.mark.torch
def test_the_plan_is_told_at_load(golden_model):
    pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom.engine.runtime.assemble import load_model

    said: list[str] = []
    loaded = load_model(EngineConfig(model=str(golden_model), max_num_seqs=2), said.append)
    loaded.close()
    assert said[-1] == f"memory: {loaded.memory.because}"
    assert "KV" in said[-1] and "workspace" in said[-1] and "budget" in said[-1]


@pytest.mark.torch
def test_the_pool_is_as_large_as_planned(make_llm):
    llm = make_llm(max_num_seqs=3, max_model_len=200)
    memory = llm.engine.memory
    assert memory.num_blocks == 3 * 13
    assert llm.engine.scheduler.stats().free_blocks == memory.num_blocks
    assert llm.engine._runner.kv_nbytes == memory.kv
