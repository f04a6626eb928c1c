"""`engineroom eval`, what `inspect` tells of its results, and `doctor --quant`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom import LLM
from engineroom.engine.cli import main
from engineroom.engine.config import ConfigError, EngineConfig
from engineroom.engine.tools import measured, quantcheck
from engineroom.engine.tools.choices import list_choices, recommend
from engineroom.engine.tools.evaluate import (
    Scores,
    against_config,
    cut,
    evaluate,
    mean,
    percentile,
    perplexity,
)
from engineroom.engine.tools.inspect import inspect_model
from engineroom.engine.tools.texts import Text, calibration_text, evaluation_text
from tests.data import data_path
from tests.load.published import write_model
from tests.load.stories260k import convert

STORY = Text("a story", "Once upon a time there was a little girl who had a red ball. " * 20)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = data_path("stories260K/stories260K.bin").parent
    return convert(folder, tmp_path_factory.mktemp("eval"))["hf"]


@pytest.fixture
def wide(stories: Path, tmp_path: Path) -> Path:
    """A random Llama in bf16, whose rows are whole groups."""
    return write_model("FP8 of tensors", stories, tmp_path / "made", rounded=True)[1]


def test_perplexity_is_of_the_second_half_of_each_chunk(stories: Path) -> None:
    """Held to the logprobs of score(), token by token, chunks beginning with BOS."""
    report = evaluate(EngineConfig(model=str(stories)), None, STORY, context=32)
    with LLM(str(stories), max_num_seqs=2, max_model_len=64) as llm:
        ids = llm.tokenizer.encode(STORY.text)
        chunks = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
        chunks = [[llm.tokenizer.bos_token_id, *chunk[1:]] for chunk in chunks]
        scored = [out.logprobs[16:31] for out in llm.score(chunks)]
    assert report["chunks"] == len(chunks) > 5
    assert report["scored_tokens"] == 15 * len(chunks)
    nll = -np.concatenate(scored)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    error = nll.std(ddof=1) / math.sqrt(len(nll)) * math.exp(nll.mean())
    assert report["perplexity"]["error"] == pytest.approx(error, rel=1e-4)
    assert "mean_kl" not in report


def test_a_model_is_at_no_distance_from_itself(stories: Path) -> None:
    config = EngineConfig(model=str(stories))
    report = evaluate(config, config, STORY, context=64, most_chunks=2)
    assert report["mean_kl"] == {"value": 0, "error": 0}
    assert report["top1"]["value"] == 1
    assert report["perplexity"] == report["against_perplexity"]
    assert report["chunks"] == 2


def test_scores_are_the_divergence_of_the_other_from_the_model() -> None:
    rng = np.random.default_rng(1)
    q, p = (rng.standard_normal(50) for _ in range(2))
    q, p = (x - np.log(np.exp(x).sum()) for x in (q, p))
    q[3] = p[3] = -np.inf  # impossible in both: adds nothing
    scores = Scores()
    with np.errstate(invalid="ignore"):
        expected = np.nansum(np.exp(p) * (p - q))
    scores.add(7, q.astype(np.float32), p.astype(np.float32))
    assert scores.kl[0] == pytest.approx(expected, rel=1e-5)
    assert scores.nll == [pytest.approx(-q[7], rel=1e-6)]
    assert scores.against_nll == [pytest.approx(-p[7], rel=1e-6)]
    assert scores.same == [bool(q.argmax() == p.argmax())]


def test_standard_errors() -> None:
    """Of means by their formula; of the percentile as often as it says, over many samples."""
    values = [0.0, 1.0, 2.0, 5.0]
    assert mean(values).error == pytest.approx(np.std(values, ddof=1) / 2)
    assert perplexity(values).value == pytest.approx(math.exp(2))
    rng = np.random.default_rng(2)
    drawn = [percentile(rng.exponential(size=5000)) for _ in range(30)]
    spread = np.std([d.value for d in drawn])
    assert 0.5 < np.mean([d.error for d in drawn]) / spread < 2


@pytest.mark.parametrize(
    ("text", "context", "why"),
    [(Text("a word", "word"), 64, "fewer than the 64 of one chunk"), (STORY, 33, "even number")],
)
def test_a_text_that_does_not_do(stories: Path, text: Text, context: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        evaluate(EngineConfig(model=str(stories), max_num_seqs=1), None, text, context=context)


def test_models_of_other_tokens_are_refused(stories: Path, wide: Path) -> None:
    """The same tokenizer, another vocabulary of the model's."""
    config = json.loads((wide / "config.json").read_text())
    ours, theirs = EngineConfig(model=str(stories)), EngineConfig(model=str(wide))
    if config["vocab_size"] == json.loads((stories / "config.json").read_text())["vocab_size"]:
        assert evaluate(ours, theirs, STORY, context=32, most_chunks=1)["mean_kl"]["value"] > 0
        (wide / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    with pytest.raises(ConfigError, match="cannot be compared"):
        evaluate(ours, theirs, STORY, context=32, most_chunks=1)


def test_what_against_means() -> None:
    config = EngineConfig(model="a", quantization="int8", threads=1, max_num_seqs=2)
    assert against_config(config, {"against": None}) is None
    other = against_config(config, {"against": "b"})
    assert other == EngineConfig(model="b", threads=1)
    itself = against_config(config, {"against": None, "against_quantization": "none"})
    assert itself == EngineConfig(model="a", threads=1)
    with pytest.raises(ConfigError, match="quantization"):
        against_config(config, {"against": None, "against_quantization": "int9"})


def test_the_texts_are_long_and_share_nothing() -> None:
    one, other = evaluation_text().text, calibration_text().text
    assert min(len(one), len(other)) > 60_000
    lines = {line for line in one.splitlines() if len(line) > 60}
    shared = lines.intersection(other.splitlines())
    assert len(shared) < len(lines) / 50


def test_a_loss_is_told_only_where_it_was_measured(
    wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By eval --keep, for the same weights: a changed file has no measurements."""
    text = wide / "text.txt"
    text.write_text(STORY.text)
    config = EngineConfig(model=str(wide), device="cpu")
    choices = list_choices(config)
    assert [c["quantization"] for c in choices[:3]] == [None, "int8", "int4"]
    assert all(c["kl"] is None for c in choices)
    assert recommend(choices)[0] is None
    arguments = ["eval", str(wide), "--text", str(text), "--context", "32", "--keep", "--json"]
    assert main([*arguments, "--quantization", "int8", "--against-quantization", "none"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["bits_per_weight"] < 17 / 2 < report["against"]["bits_per_weight"]
    own, int8, int4 = list_choices(config)[:3]
    assert (own["kl"], int4["kl"]) == (None, None)
    assert int8["kl"] == report["mean_kl"]
    assert main(["inspect", str(wide)]) == 0
    shown = capsys.readouterr().out
    assert f"KL {int8['kl']['value']:.4f}" in shown
    assert "not measured" in shown
    weights = wide / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert list_choices(config)[1]["kl"] is None
    measured.file_of(wide).write_text("{}")
    with pytest.raises(ConfigError, match="holds no measurements that can be read"):
        list_choices(config)


def test_choices_tell_what_the_backend_holds_and_reads(wide: Path) -> None:
    """Tiles as they are packed: FP8 takes what INT8 does, and NF4 half."""
    rows = {c["quantization"]: c for c in list_choices(EngineConfig(model=str(wide), device="cpu"))}
    assert rows["int8"]["token_bytes"] < 0.6 * rows[None]["token_bytes"]
    assert 1 <= rows["fp8"]["token_bytes"] / rows["int8"]["token_bytes"] < 1.05
    assert rows["nf4"]["token_bytes"] < rows["int8"]["token_bytes"]
    assert rows["nf4"]["bits_per_weight"] < rows["fp8"]["bits_per_weight"] < 10
    for method, choice in rows.items():
        plan = inspect_model(EngineConfig(model=str(wide), device="cpu", quantization=method))
        assert choice["bytes"] == plan["memory"]["weights"] >= choice["token_bytes"]


def row(quantization: str | None, size: int, kl: float | None, fits: bool = True) -> dict[str, Any]:
    loss = None if kl is None else {"value": kl, "error": 0.0}
    return {
        "quantization": quantization,
        "token_bytes": size,
        "bits_per_weight": size,
        "fits": fits,
        "kl": loss,
    }


@pytest.mark.parametrize(
    ("choices", "best", "why"),
    [
        ([row(None, 16, None), row("int8", 8, None)], None, "int8 not measured"),
        ([row(None, 16, None), row("int8", 8, 0.01), row("int4", 4, 0.3)], "int8", "0.0100"),
        ([row(None, 16, None), row("int8", 8, 0.01), row("int4", 4, 0.011)], "int4", "0.0110"),
        ([row(None, 16, None, False), row("int8", 8, None)], "int8", "most bits of those that fit"),
        ([row(None, 16, None, False)], None, "none of them fits"),
    ],
)
def test_what_is_recommended(choices: list[dict[str, Any]], best: str | None, why: str) -> None:
    found, reason = recommend(choices)
    assert found == best
    assert why in reason


def test_doctor_checks_each_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--quant", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["kernels"]
    assert all(r["passed"] for r in rows)
    assert {"Q4_K", "INT4", "I4G128", "NF4", "FP8"} <= {r["format"] for r in rows}
    original = quantcheck._wanted
    monkeypatch.setattr(
        quantcheck, "_cases", lambda: [(quantcheck.FORMATS[n], "int8") for n in ("Q4_0", "INT8")]
    )
    monkeypatch.setattr(quantcheck, "_wanted", lambda w: original(w) * (1 + (w.name == "Q4_0") / 8))
    assert main(["doctor", "--quant"]) == 9
    shown = capsys.readouterr().out
    assert shown.count("FAILED") == shown.count("Q4_0") > 0


def test_a_chunk_begins_with_bos_in_place_of_its_first_token() -> None:
    class Letters:
        add_bos, bos_token_id = True, 7

        def encode(self, text: str, **options: Any) -> list[int]:
            return [7, *map(ord, text)]

    chunks = cut(Letters(), Text("t", "abcdefghi"), 4, None)  # type: ignore[arg-type]
    assert chunks == [[7, *map(ord, "abc")], [7, *map(ord, "efg")]]
