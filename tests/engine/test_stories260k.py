"""A trained model's exact text: stories260K in every form that the test data converts to."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from engineroom import LLM, SamplingParams
from tests.counts import count
from tests.data import data_path
from tests.engine.twins import write_twin
from tests.load.stories260k import convert


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = data_path("stories260K/stories260K.bin").parent
    return convert(folder, tmp_path_factory.mktemp("stories260K"))


@pytest.fixture(scope="module")
def expected() -> str:
    """The greedy story as stories260K.md shows it."""
    page = data_path("stories260K/stories260K.md").read_text()
    return re.search(r"-t 0\.0\n(.*?)\n```", page, re.S)[1]


DEVICES = ["cpu", pytest.param("reference", marks=pytest.mark.torch)]


def greedy(
    path: Path, device: str, max_tokens: int = 256, cache: str = "float32"
) -> tuple[str, tuple[int, ...]]:
    fp32 = {"dtype": "float32", "activations": "float32", "kv_cache_dtype": cache}
    if device == "cuda":
        pytest.importorskip("tests.kernels.triton_device")  # skips where triton is missing
    if device == "reference":
        pytest.importorskip("torch", reason="the reference backend needs torch")
    with LLM(str(path), device=device, max_num_seqs=4, **fp32) as llm:
        out = llm.generate(
            "", SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
        )[0]
        return out.outputs[0].text, out.outputs[0].token_ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["hf", "F32", "F16"])
def test_the_exact_story(form, device, forms, expected):
    text, _ = greedy(forms[form], device)
    assert text.strip() == expected.strip()


@pytest.mark.torch
@pytest.mark.parametrize(
    "cache, max_tokens", [("int8", 256), ("fp8", 24), ("k8v4", 128), ("int4", 24)]
)
def test_a_cache_of_codes_tells_the_same_story_on_either_backend(
    cache, max_tokens, forms, expected
):
    """A last bit of a key may round to the next code: in time to another word where steps are wide,
    and the sooner as the CPU multiplies codes of 4 bits and fp8 by numbers rounded to bfloat16."""
    ours, tokens = greedy(forms["F32"], "cpu", max_tokens, cache)
    theirs, same = greedy(forms["F32"], "reference", max_tokens, cache)
    assert tokens == same and ours == theirs
    assert ours.strip()[:40] == expected.strip()[:40]


def test_an_int4_cache_shares_beginnings_and_changes_no_bit(forms):
    """Alone and whole, or in chunks beside others over blocks of an earlier request: one answer."""
    beginning = "Once upon a time, there was a little girl named Lily. " * 2
    prompts = [beginning + more for more in ("She", "One day, the cat", "")]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=24, logprobs=2)
    alone, together = (
        {"max_num_seqs": 1, "enable_prefix_caching": False, "threads": 1},
        {"max_num_seqs": 4, "max_num_batched_tokens": 16, "threads": 2},
    )

    def answers(options):
        with LLM(str(forms["F32"]), device="cpu", kv_cache_dtype="int4", **options) as llm:
            for _ in range(2):
                outs = llm.generate(prompts, params, use_tqdm=False)
            return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outs], [
                o.usage.cached_tokens for o in outs
            ]

    want, cached = answers(alone)
    assert cached == [0, 0, 0]
    got, cached = answers(together)
    assert got == want and min(cached) >= 16


@pytest.mark.torch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["hf", "Q8_0"])
def test_the_story_begins_so_on_tritons_interpreter(form, forms, expected):
    """The whole engine on the GPU's kernels, steps overlapping and sampling launched behind them;
    the interpreter takes half a second a token."""
    reduced, full = (12, 256) if form == "hf" else (5, 60)
    text, tokens = greedy(forms[form], "cuda", count(reduced=reduced, full=full))
    if form == "hf":
        assert len(text) > 20
        assert expected.strip().startswith(text.strip())
    else:
        assert greedy(forms[form], "cpu", len(tokens))[1] == tokens


@pytest.mark.parametrize("device", DEVICES)
def test_q8_0_equals_its_own_dequantised_twin(device, forms, tmp_path):
    _, quantised = greedy(forms["Q8_0"], device)
    _, twin = greedy(write_twin(forms["Q8_0"], tmp_path / "twin.gguf"), device)
    assert quantised == twin
    assert len(quantised) > 100


def test_packed_cache_changes_no_token(forms, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ENGINEROOM_CACHE", str(tmp_path))
    params = SamplingParams(temperature=0, max_tokens=64)

    def tokens(path: Path, **options: bool) -> tuple[int, ...]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "engineroom"), LLM(str(path), **options) as llm:
            return llm.generate("", params, use_tqdm=False)[0].outputs[0].token_ids

    want = tokens(forms["Q8_0"])
    assert not (tmp_path / "packed").exists()
    assert tokens(forms["Q8_0"], packed_cache=True) == want
    assert "written to" in caplog.text
    assert tokens(forms["Q8_0"], packed_cache=True) == want
    assert "mapped from" in caplog.text
    # The same bytes with another time of change may be another checkpoint.
    other = tmp_path / "other.gguf"
    other.write_bytes(forms["Q8_0"].read_bytes())
    for _ in range(2):
        assert tokens(other, packed_cache=True) == want
        assert "written to" in caplog.text
        other.touch()
