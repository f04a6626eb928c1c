"""Receipts: answers computed again to the last bit beside other work, or what changed, named."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engineroom import LLM, SamplingParams
from engineroom.engine import cli, receipts
from engineroom.engine.receipts import Receipt, ReceiptError
from engineroom.engine.tools.replay import options, read_receipts, replay
from tests.counts import count
from tests.engine.test_overlap import draw

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def llm(make_llm: Any) -> LLM:
    return make_llm(device="cpu", max_num_seqs=8)


def some(llm: LLM, seeds: int) -> list[Receipt]:
    """Receipts of random requests, which ran together."""
    asked = [a for seed in range(seeds) for a in draw(random.Random(seed))]
    asked = [a for a in asked if a.params.replayable]
    params = [a.params for a in asked]
    outputs = llm.generate([a.prompt for a in asked], params, use_tqdm=False)
    return [llm.receipt(o, p) for o, p in zip(outputs, params, strict=True)]


@pytest.fixture(scope="module")
def kept(llm: LLM) -> list[Receipt]:
    made = some(llm, count(reduced=12, full=60))
    assert len(made) >= count(reduced=40, full=200)
    return [receipts.read(r.to_json()) for r in made]


@pytest.mark.parametrize(
    "other",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 8, "enable_prefix_caching": False},
        {"max_num_seqs": 32, "block_size": 4, "threads": 1},
    ],
)
def test_receipts_are_repeated_under_any_load(
    other: dict[str, Any], kept: list[Receipt], golden_model: Path
) -> None:
    with LLM(str(golden_model), **{**options(kept), **other}) as again:
        beside = other["max_num_seqs"] // 2
        found = list(replay(again.engine, kept, beside=beside, seed=1))
        assert not again.engine.has_work
    assert sorted(v.number for v in found) == list(range(1, len(kept) + 1))
    for verdict in found:
        assert verdict.difference is None and verdict.changes == [], verdict


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def judged(model: Path, kept: list[Receipt], **more: Any) -> list[Any]:
    with LLM(str(model), **{**options(kept), **more}) as llm:
        return list(replay(llm.engine, kept))


def names(changes: list[str]) -> list[str]:
    return [change.partition(":")[0] for change in changes]


def test_one_flipped_bit_of_the_weights_is_named(
    kept: list[Receipt], golden_model: Path, tmp_path: Path
) -> None:
    model = copied(golden_model, tmp_path)
    (weights,) = model.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-2] ^= 0x40  # of an exponent in the last tensor
    weights.write_bytes(data)
    found = judged(model, kept)
    assert all(names(v.changes) == ["weights"] for v in found)
    assert any(v.difference is not None for v in found)


def test_a_changed_tokenizer_template_or_option_is_named(
    kept: list[Receipt], golden_model: Path, tmp_path: Path
) -> None:
    model = copied(golden_model, tmp_path)
    few = kept[:3]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    (verdict, *_) = judged(model, few, chat_template=str(template))
    assert verdict.difference is None and names(verdict.changes) == ["template"]
    (verdict, *_) = judged(model, few, kv_cache_dtype="float16")
    assert "kv_cache_dtype" in names(verdict.changes)
    config = model / "tokenizer_config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**known, "clean_up_tokenization_spaces": False}))
    (verdict, *_) = judged(model, few)
    assert names(verdict.changes) == ["tokenizer"]


def test_a_changed_parameter_and_the_first_difference_are_named(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=3, temperature=1.0, logprobs=1, ignore_eos=True)
    (one,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    kept = llm.receipt(one, params)
    warm = params.replace(temperature=1.4)
    (other,) = llm.generate([[1, 2, 3]], warm, use_tqdm=False)
    now = llm.receipt(other, warm)
    assert names(receipts.changes(kept, now)) == ["params.temperature"]
    (first,) = kept.answers
    tokens = [*first.token_ids]
    tokens[7] += 1
    changed = replace(kept, answers=[replace(first, token_ids=tokens)])
    said = receipts.first_difference(kept, changed)
    assert said == f"token 7 is {tokens[7]}, not {first.token_ids[7]}"
    short = replace(kept, answers=[replace(first, token_ids=first.token_ids[:5])])
    assert receipts.first_difference(kept, short) == f"token 5 is none, not {first.token_ids[5]}"
    assert first.logprobs is not None
    logprobs = [*first.logprobs[:-1], 0.5]
    changed = replace(kept, answers=[replace(first, logprobs=logprobs)])
    assert "the logprob of token 11 is 0.5, not" in str(receipts.first_difference(kept, changed))
    changed = replace(kept, answers=[replace(first, finish_reason="stop")])
    assert "ended by stop None, not by length" in str(receipts.first_difference(kept, changed))
    changed = replace(kept, answers=[replace(first, sha256="0")])
    assert "text or an alternative's" in str(receipts.first_difference(kept, changed))
    assert receipts.first_difference(kept, replace(kept, prompt_logprobs="0")) is not None
    assert receipts.first_difference(kept, replace(kept, answers=[first] * 2)) is not None


def test_a_drawn_seed_and_an_echoed_text_are_no_obstacle(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.3, echo=True)
    (out,) = llm.generate(["a <|user|> b"], params, use_tqdm=False)
    assert out.outputs[0].text.startswith("a <|user|> b")
    receipt = llm.receipt(out, params)
    assert receipt.sampling_params.seed == out.outputs[0].seed
    (verdict,) = replay(llm.engine, [receipt])
    assert verdict.difference is None


def test_what_did_not_end_by_itself_has_none(llm: LLM) -> None:
    engine, params = llm.engine, SamplingParams(max_tokens=50, ignore_eos=True)
    engine.add_request("a", [1, 2], params)
    (out,) = engine.step()
    with pytest.raises(ReceiptError, match="a has no receipt: it ended by not yet"):
        llm.receipt(out, params)
    engine.abort("a")
    (out,) = engine.step()
    with pytest.raises(ReceiptError, match="it ended by abort"):
        llm.receipt(out, params)
    with pytest.raises(ReceiptError, match="logits_processor"):
        llm.receipt(out, params.replace(logits_processor=lambda ids, logits: logits))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t[:-9], "not JSON"),
        (lambda t: "[1]", "no receipt in it"),
        (lambda t: t.replace('"receipt":1', '"receipt":2'), "its format is 2"),
        (lambda t: t.replace('"prompt_token_ids":[', '"prompt_token_ids":[7,'), "damaged"),
    ],
)
def test_what_is_no_receipt_is_refused(
    spoil: Any, why: str, kept: list[Receipt], tmp_path: Path
) -> None:
    path = tmp_path / "receipts.jsonl"
    path.write_text(f"{kept[0].to_json()}\n\n{spoil(kept[1].to_json())}\n")
    with pytest.raises(ReceiptError, match=rf"receipts.jsonl line 3: .*{why}"):
        read_receipts([str(path)])


def test_receipts_of_two_configurations_are_not_replayed_together(kept: list[Receipt]) -> None:
    other = replace(kept[1], model={**kept[1].model, "quantization": "int8"})
    with pytest.raises(ReceiptError, match="replay them apart"):
        options([kept[0], other])


def test_the_command(
    golden_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """complete --receipt and batch run --receipts give them, replay takes them."""
    model = ["-m", str(golden_model)]
    one, batch = str(tmp_path / "one.jsonl"), str(tmp_path / "batch.jsonl")
    assert cli.main(["complete", *model, "hi", "--max-tokens", "5", "--receipt", one]) == 0
    lines = tmp_path / "in.txt"
    lines.write_text("one\ntwo\n")
    run = ["batch", "run", str(lines), "--format", "text", "-o", batch, *model]
    assert cli.main([*run, "--receipts", "--max-tokens", "6"]) == 0
    capsys.readouterr()
    assert cli.main(["replay", one, *model, "--beside", "2"]) == 0
    assert capsys.readouterr().out == "1 of 1 receipts repeated to the last bit\n"
    assert cli.main(["replay", batch, *model, "--beside", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["receipts"] == told["same"] == 2
    other = receipts.read(Path(one).read_text())
    (answer,) = other.answers
    wrong = replace(other, answers=[replace(answer, token_ids=[0, *answer.token_ids[1:]])])
    Path(one).write_text(wrong.to_json())
    assert cli.main(["replay", one, *model]) == 11
    assert f"receipt 1: token 0 is {answer.token_ids[0]}, not 0" in capsys.readouterr().out
    assert cli.main(["replay", str(lines), *model]) == 2
