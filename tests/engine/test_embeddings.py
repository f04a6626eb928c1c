"""Embeddings: what they are the mean of, and that neither chunks nor neighbours show in a bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from engineroom import AsyncLLM, SamplingParams
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.runtime.pooling import Pool

PROMPTS = [[(7 * i + j * j) % 256 for j in range(n)] for i, n in enumerate((1, 5, 16, 17, 70, 200))]


@pytest.fixture(scope="module", params=["cpu", pytest.param("reference", marks=pytest.mark.torch)])
def make(make_llm: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "reference":
        pytest.importorskip("torch", reason="the reference backend needs torch")
    return partial(make_llm, device=request.param)


def bits(outputs: list[Any]) -> list[bytes]:
    return [out.embedding.tobytes() for out in outputs]


def test_chunks_blocks_and_neighbours_change_nothing(make: Callable[..., Any]) -> None:
    whole = make(max_num_batched_tokens=512)
    alone = bits([whole.embed(p)[0] for p in PROMPTS])
    assert len(set(alone)) == len(PROMPTS)
    assert bits(whole.embed(PROMPTS)) == alone
    for options in (
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 37, "block_size": 16},
        {"max_num_batched_tokens": 64, "max_num_seqs": 3, "enable_prefix_caching": False},
    ):
        assert bits(make(**options).embed(PROMPTS)) == alone, options


def test_a_prefix_known_already_is_computed_anew(make: Callable[..., Any]) -> None:
    llm = make()
    (first,) = llm.embed(PROMPTS[5])
    llm.generate([PROMPTS[5]], SamplingParams(max_tokens=2), use_tqdm=False)
    (again,) = llm.embed(PROMPTS[5])
    assert bits([again]) == bits([first])
    # and what embedding computed is there for generation, which is the same for it
    hit = llm.generate([PROMPTS[5]], SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
    assert hit[0].usage.cached_tokens > 0


def test_beside_requests_that_generate(make: Callable[..., Any]) -> None:
    """One step holds both kinds, and each is as it is alone."""
    llm = make(max_num_batched_tokens=48, max_num_seqs=8)
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5, logprobs=2)
    (text,) = llm.generate([PROMPTS[3]], params, use_tqdm=False)
    alone = bits(llm.embed(PROMPTS))
    engine = llm.engine
    engine.add_request("text", PROMPTS[3], params)
    found = {}
    waiting = [(f"e{i}", ids) for i, ids in enumerate(PROMPTS)]
    while engine.has_work:
        found |= {out.request_id: out for out in engine.step() if out.finished}
        if waiting:
            engine.add_request(*waiting.pop(0), SamplingParams(), embed=True)
    assert found["text"].outputs[0].token_ids == text.outputs[0].token_ids
    assert found["text"].outputs[0].logprobs == text.outputs[0].logprobs
    for i, expected in enumerate(alone):
        out = found[f"e{i}"]
        assert np.array(out.embedding, np.float32).tobytes() == expected
        assert out.usage.completion_tokens == 0 and out.usage.cached_tokens == 0
        assert out.outputs[0].finish_reason == "length" and out.outputs[0].token_ids == ()
    assert not engine._runner.pooling.pools  # nothing is kept


def test_a_preempted_prompt_counts_every_row_once() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    whole, again = Pool(4), Pool(4)
    whole.add(0, rows)
    again.add(0, rows[:2])
    assert again.embedding() is None
    again.add(0, rows[:3])  # from the beginning, after a preemption
    again.add(3, rows[3:])
    assert again.embedding() == whole.embedding()
    assert Pool(4).embedding() is None


@pytest.mark.parametrize("prompt", PROMPTS[:5])
def test_unit_length_and_the_backends_agree(
    make_llm: Callable[..., Any], prompt: list[int]
) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    (cpu,) = make_llm(device="cpu").embed(prompt)
    (reference,) = make_llm(device="reference").embed(prompt)
    assert abs(float(np.linalg.norm(cpu.embedding)) - 1) < 1e-6
    np.testing.assert_allclose(cpu.embedding, reference.embedding, rtol=0, atol=2e-6)


@pytest.mark.torch
def test_the_mean_of_transformers_hidden_states(
    golden_model: Any, make: Callable[..., Any]
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    ids = PROMPTS[4]
    model = transformers.AutoModelForCausalLM.from_pretrained(golden_model, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    expected = states.double().mean(0).numpy()
    expected /= np.linalg.norm(expected)
    (out,) = make(max_num_batched_tokens=16).embed(ids)
    np.testing.assert_allclose(out.embedding, expected, rtol=0, atol=2e-5)


def test_tritons_interpreter_agrees(make_llm: Callable[..., Any]) -> None:
    pytest.importorskip("tests.kernels.triton_device")  # skips where triton is missing
    options = {"dtype": "float32", "kv_cache_dtype": "float32", "max_num_batched_tokens": 16}
    for ours, other in zip(
        make_llm(device="cuda", **options).embed(PROMPTS[1:4]),
        make_llm(device="cpu", **options).embed(PROMPTS[1:4]),
        strict=True,
    ):
        np.testing.assert_allclose(ours.embedding, other.embedding, rtol=0, atol=2e-6)


@pytest.mark.parametrize("client", ["thread", None])
def test_a_step_that_fails_is_an_error_and_no_embedding(
    golden_model: Any, make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, client: Any
) -> None:
    def broken(pool: Pool, start: int, rows: np.ndarray) -> None:
        raise ZeroDivisionError("a bug of ours")

    async def asked() -> None:
        async with AsyncLLM(str(golden_model), client=client, device="cpu") as llm:
            await llm.embed(PROMPTS[1])

    monkeypatch.setattr(Pool, "add", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        if client is None:
            make_llm(device="cpu").embed(PROMPTS[:2])
        else:
            asyncio.run(asked())


def test_what_is_refused(make: Callable[..., Any]) -> None:
    llm = make()
    with pytest.raises(AdmissionError, match="empty"):
        llm.embed([[]])
    with pytest.raises(AdmissionError, match="max_model_len"):
        llm.embed([[1] * 600])
    with pytest.raises(ParameterError, match="samples nothing"):
        llm.engine.add_request("x", [1], SamplingParams(temperature=0), embed=True)
    (cut,) = llm.embed([[9] * 600 + PROMPTS[1]], truncate_prompt_tokens=5)
    assert bits([cut]) == bits(llm.embed(PROMPTS[1]))


@pytest.mark.parametrize("client", ["thread", "process"])
def test_the_asyncio_face(golden_model: Any, make_llm: Callable[..., Any], client: Any) -> None:
    async def both() -> list[Any]:
        async with AsyncLLM(str(golden_model), client=client, device="cpu") as llm:
            return await asyncio.gather(*(llm.embed(p) for p in PROMPTS))

    found = [np.array(out.embedding, np.float32) for out in asyncio.run(both())]
    alone = make_llm(device="cpu").embed(PROMPTS)
    assert [f.tobytes() for f in found] == bits(alone)
