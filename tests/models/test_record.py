"""Recording: every family's Program uses all its weights, has no T in it, and ends in logits."""

import math
import struct
from pathlib import Path

import pytest

from engineroom.engine import models
from engineroom.engine.models.gemma2 import embedding_scale
from engineroom.kernels.program import R, T
from tests.models.published import CONFIGS

FAMILIES = (
    *("gemma2", "gemma3", "gpt_oss", "llama", "mistral", "mixtral", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)


def test_the_folder_is_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuple(models.supported()) == FAMILIES
    (tmp_path / "newcomer.py").write_text(
        "from engineroom.engine.models.llama import *\n"
        "HF_ARCHITECTURES = ('NewcomerForCausalLM',)\nGGUF_ARCHITECTURES = ()\n"
    )
    models.families.cache_clear()
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    try:
        assert models.find_by_hf("NewcomerForCausalLM").__name__.endswith(".newcomer")
    finally:
        monkeypatch.undo()
        models.families.cache_clear()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_uses_every_weight_and_ends_in_logits(name: str) -> None:
    values = CONFIGS[name]
    family = models.find_by_hf(values["architectures"][0])
    config = family.config_from_hf(values)
    specs = family.weights(config)
    assert len({s.name for s in specs}) == len(specs)
    program = models.record(family, config)
    assert {name: h.shape for name, h in program.weights.items()} == {
        s.name: s.shape for s in specs
    }
    assert set(program.inputs) == {"token_ids", "positions", "logit_rows"}
    assert program.result is not None and program.result.shape == (R, config.vocab_size)
    rows = [program.handles[op.output].shape[0] for op in program if op.name != "kv_write"]
    selected = [op.name for op in program].index("select_rows")
    before = sum(op.name != "kv_write" for op in program.ops[:selected])
    assert set(rows[:before]) == {T} and set(rows[before:]) == {R}
    layers = [op.attrs["layer"] for op in program if op.name == "attention"]
    assert layers == list(range(config.num_layers))


def test_tied_and_untied_heads() -> None:
    values = CONFIGS["Llama-2-7b"]
    family = models.find_by_hf("LlamaForCausalLM")
    for tied in (True, False):
        config = family.config_from_hf({**values, "tie_word_embeddings": tied})
        assert ("lm_head" in models.record(family, config).weights) == (not tied)


def test_embedding_scale_is_rounded_to_the_activation_dtype() -> None:
    """Gemma multiplies in its own dtype: sqrt(3072) = 55.4256 becomes 55.5 in bfloat16."""
    family = models.find_by_hf("Gemma2ForCausalLM")
    config = family.config_from_hf(CONFIGS["gemma-2-2b"])
    exact = config.replace(embedding_scale=math.sqrt(3072))
    assert embedding_scale(exact.replace(dtype="bfloat16")) == 55.5
    assert embedding_scale(exact.replace(dtype="float16")) == 55.4375
    assert embedding_scale(exact.replace(dtype="float32")) == math.sqrt(3072)
    for hidden in range(1, 4000, 7):  # half to even: the upper 16 bits of the nearest
        scale = embedding_scale(exact.replace(dtype="bfloat16", embedding_scale=hidden**0.5))
        (bits,) = struct.unpack("<I", struct.pack("<f", scale))
        assert bits & 0xFFFF == 0 and abs(scale - hidden**0.5) <= hidden**0.5 / 256
    program = models.record(family, config.replace(dtype="bfloat16"))
    assert [op.attrs["factor"] for op in program if op.name == "scale"] == [48.0]
