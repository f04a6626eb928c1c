"""Real quantised checkpoints against their own dequantised fp32 twins, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest

from engineroom import LLM, SamplingParams
from tests.counts import count
from tests.data import model_path
from tests.engine.twins import write_twin

pytestmark = pytest.mark.torch
TOKENS = count(reduced=12, full=64)
PROMPT = "The capital of France is Paris. The capital of Italy is"


def greedy(path: Path) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(str(path), dtype="float32", max_model_len=256, max_num_seqs=2) as llm:
        outs = llm.generate([PROMPT, "def fibonacci(n):\n"], params, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outs]


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_greedy_tokens_equal_the_dequantised_twin(name, tmp_path):
    pytest.importorskip("torch", reason="the reference backend needs torch")
    source = model_path(name)
    twin = write_twin(source, tmp_path / "twin.gguf")
    assert greedy(source) == greedy(twin)
    twin.unlink()  # half a gigabyte


def test_smollm2_names_the_capital():
    pytest.importorskip("torch", reason="the reference backend needs torch")
    with LLM(str(model_path("smollm2")), max_model_len=512, max_num_seqs=2) as llm:
        out = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=16),
        )[0]
    assert "Paris" in out.outputs[0].text
