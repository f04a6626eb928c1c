"""Real quantised checkpoints against their own dequantised fp32 twins, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM, SamplingParams
from tests.counts import count
from tests.data import model_path
from tests.engine.twins import write_twin

pytestmark = pytest.mark.cores

TOKENS = count(reduced=12, full=64)
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
PROMPT = "The capital of France is Paris. The capital of Italy is"


# Nothing is rounded to int8 on its way into a product, nor to bf16 in the cache.
FP32: dict[str, Any] = {"dtype": "float32", "activations": "float32", "kv_cache_dtype": "float32"}


def greedy(path: Path, device: str) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(str(path), device=device, max_model_len=256, max_num_seqs=2, **FP32) as llm:
        outs = llm.generate([PROMPT, "def fibonacci(n):\n"], params, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outs]


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("reference", marks=pytest.mark.torch)])
def test_greedy_tokens_equal_the_dequantised_twin(name, device, tmp_path):
    if device == "reference":
        pytest.importorskip("torch", reason="the reference backend needs torch")
    source = model_path(name)
    twin = write_twin(source, tmp_path / "twin.gguf")
    assert greedy(source, device) == greedy(twin, device)
    twin.unlink()  # half a gigabyte


@pytest.mark.torch
def test_smollm2_on_the_cpu_backend_is_the_references_model():
    """In fp32 the same greedy text; with int8 activations and a bf16 cache, a small KL."""
    pytest.importorskip("torch", reason="the reference backend needs torch")
    source = model_path("smollm2")
    assert greedy(source, "cpu") == greedy(source, "reference")

    def logprobs(**options: Any) -> np.ndarray:
        with LLM(str(source), max_model_len=1024, max_num_seqs=1, **options) as llm:
            rows = [rows for _, rows in llm.score_stream(TEXT[: 4 * count(reduced=120, full=900)])]
        return np.concatenate(rows).astype(np.float64)

    exact = logprobs(device="reference", kv_cache_dtype="float32")
    kl = (np.exp(exact) * (exact - logprobs(device="cpu"))).sum(1)
    assert 0 < kl.mean() < 0.002, kl.mean()  # measured: 0.0008


def test_smollm2_names_the_capital():
    with LLM(str(model_path("smollm2")), max_model_len=512, max_num_seqs=2) as llm:
        out = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=16),
        )[0]
    assert "Paris" in out.outputs[0].text
