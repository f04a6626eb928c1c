"""A model computes the same from its GGUF form, whose layouts differ, as transformers does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.models.test_logits import TOLERANCE
from tests.models.tiny import PROMPT, Made, prompt

torch = pytest.importorskip("torch", reason="the reference backend needs torch")
pytest.importorskip("gguf", reason="tensor names come from the gguf package, which is absent")
Tiny = Callable[[str], Made]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-bias",
        "llama-linear",
        "llama3",
        "llama-yarn",
        "mistral-window",
        "qwen2",
        "qwen3",
        "mixtral-window",
        "qwen2-moe",
        "qwen3-moe",
        "gpt-oss",
        "gemma2",
        "gemma3",
        "gemma3-scaled",
        "phi3-partial-window",
        "phi3-long",
        "phi3-short",
    ],
)
def test_logits_from_gguf(tiny: Tiny, name: str, tmp_path: Path) -> None:
    from tests.models.gguf_twin import convert
    from tests.models.harness import Model

    made = tiny(name)
    # What this case's config says and the format's own defaults do not.
    scaled = {"gemma3.attention.sliding_window_pattern": 2, "gemma3.rope.freq_base_swa": 500.0}
    file = convert(made.path, tmp_path / "m.gguf", **(scaled if name == "gemma3-scaled" else {}))
    model = Model(file, max_position=made.case.max_position)
    ours = model.prompt(prompt(made.case.only or PROMPT))
    np.testing.assert_allclose(ours, made.logits, rtol=0, atol=TOLERANCE)
