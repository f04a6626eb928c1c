"""Checkpoints as people publish them, from the folder to the answer, beside a twin of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM
from engineroom.engine.config import EngineConfig
from engineroom.engine.tools.inspect import inspect_model, render
from engineroom.kernels.weights import CODEBOOKS
from tests.data import data_path
from tests.load.published import KINDS, write_model
from tests.load.stories260k import convert

EXACT: dict[str, Any] = {
    "dtype": "float32",
    "activations": "float32",
    "kv_cache_dtype": "float32",
}
TEXT = "Once upon a time there was a little girl who had a red ball and a dog."
kinds = pytest.mark.parametrize("kind", KINDS)
# Those read in the 16 bits that the checkpoint names; the values of the others stay as they are.
ROUNDED = [k for k, v in KINDS.items() if v[2] == "BF16"]
# MXFP4's tensors hold 2^127, which no model survives: their values are compared in tests/quant.
OWN = [k for k, v in KINDS.items() if k not in ROUNDED and v[2] != "MXFP4"]
# Kinds whose checkpoints ask for activations of 8 or 4 bits.
SMALL_ACTIVATIONS = ("FP8 of tensors, ModelOpt", "MXFP4", "NVFP4", "NVFP4, ModelOpt")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = data_path("stories260K/stories260K.bin").parent
    return convert(folder, tmp_path_factory.mktemp("stories260K"))["hf"]


def logprobs(path: Path, **options: Any) -> np.ndarray:
    with LLM(str(path), max_num_seqs=2, max_model_len=128, **options) as llm:
        return np.concatenate([rows for _, rows in llm.score_stream(TEXT)])


def largest_step(values: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(values - other).max())


@pytest.mark.parametrize("kind", OWN)
def test_as_its_twin(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """The same values multiply the same activations: a few roundings of float32 apart."""
    small, wide = write_model(kind, tokenizer, tmp_path)
    want = logprobs(wide, device="cpu", **EXACT)
    got = logprobs(small, device="cpu", **EXACT)
    assert largest_step(got, want) <= 1e-3 * float(want.std())


@pytest.mark.parametrize("kind", OWN)
def test_int8_activations_cost_what_they_round(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """The default on the CPU.

    Of 32 activations the largest becomes 127, and each moves by at most half a step: by a variance
    of step^2 / 12. Of normal ones the largest is about 2.1 deviations, so a product's relative
    error is about 2.1 / 127 / sqrt(12) = 0.5 %. Each layer has four products in a row: 8 of them
    add up to sqrt(8) * 0.5 % = 1.4 % of the logits' deviation, half of the errors below 0.67 of it.
    Four times that is allowed for what multiplies them (gate by up, scores), and for a table,
    whose rounding moves NF4's values by 0.4 % of their deviation. FP8's inputs are not rounded. The
    largest error says nothing: random scores are so large that a token's attention may turn to
    another.
    """
    small, wide = write_model(kind, tokenizer, tmp_path)
    options = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32"}
    want = logprobs(wide, **options)
    got = logprobs(small, **options)
    error = np.abs(got - want) / want.std()
    assert np.median(error) <= 4 * 0.0094


@pytest.mark.parametrize("options", [EXACT, {"dtype": "float32", "kv_cache_dtype": "bfloat16"}])
@pytest.mark.parametrize("kind", ROUNDED)
def test_what_is_read_in_16_bits_is_multiplied_so(
    kind: str, options: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    """On the CPU, with whatever activations: bit for bit the twin whose values were rounded so."""
    small, rounded = write_model(kind, tokenizer, tmp_path, rounded=True)
    want = logprobs(rounded, device="cpu", **options)
    np.testing.assert_array_equal(logprobs(small, device="cpu", **options), want)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["gptq 4 bits, 128, act-order", "FP8 of blocks", "NF4, double"])
def test_the_reference_backend_keeps_every_value(
    kind: str, tokenizer: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    small, wide = write_model(kind, tokenizer, tmp_path)
    want = logprobs(wide, device="reference", **EXACT)
    got = logprobs(small, device="reference", **EXACT)
    assert largest_step(got, want) <= 1e-3


@pytest.mark.parametrize(
    "kind",
    ["gptq 4 bits, 128, act-order", "W8A8, channel", "FP8 of blocks", "FP8, row", "NF4, double"],
)
def test_a_row_is_its_own_function(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """Law 2: threads and chunks leave every bit as it is."""
    small, _ = write_model(kind, tokenizer, tmp_path)
    want = logprobs(small, device="cpu", threads=1)
    for options in ({"threads": 2}, {"max_num_batched_tokens": 16}, {"block_size": 32}):
        got = logprobs(small, device="cpu", **options)
        np.testing.assert_array_equal(got, want)


@kinds
def test_inspect_shows_it(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    small, _ = write_model(kind, tokenizer, tmp_path)
    report = inspect_model(EngineConfig(model=str(small), device="cpu"))
    name = KINDS[kind][2]
    rows = {row["format"]: row for row in report["formats"]}
    assert rows[name]["tensors"] == 14
    said = render(report)
    assert ("table rounded to 8 bits" in said) == (name in CODEBOOKS)
    assert ("activations= decides" in said) == (
        kind.startswith(("W8A8", "FP8, ")) or kind in SMALL_ACTIVATIONS
    )
