"""Logits equal transformers' for a tiny random model of every family, and law 2 holds.

TOLERANCE: both sides compute in float32 and sum in different orders. A product of K terms of size
s differs by about sqrt(K) * 2^-24 * s; K is at most 101 here, logits have size 1 to 10, and 2 to 7
layers pass the difference on with gains near 1: a few 1e-6 in all. Measured: 2.4e-6 (gemma3-scaled)
to 1.33e-5 (llama-yarn). A wrong formula shows at 1e-3 and above.
"""

from collections.abc import Callable

import numpy as np
import pytest

from tests.models.tiny import CASES, PROMPT, Made, prompt

torch = pytest.importorskip("torch", reason="the reference backend needs torch")
Tiny = Callable[[str], Made]
TOLERANCE = 5e-5
LENGTHS = (1, 15, 16, 17, PROMPT)  # block_size is 16
FAMILIES = (
    "llama",
    "mistral-window",
    "qwen2-window",
    "qwen3-bias-window",
    "mixtral-window",
    "qwen2-moe-mixed",
    "qwen3-moe",
    "gpt-oss",
    "gemma2",
    "gemma3",
    "phi3-partial-window",
)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tiny: Tiny, name: str) -> None:
    from tests.models.harness import Model

    made = tiny(name)
    model = Model(made.path, max_position=made.case.max_position)
    for length in [made.case.only] if made.case.only else LENGTHS:
        ours = model.prompt(prompt(made.case.only or PROMPT)[:length])
        np.testing.assert_allclose(ours, made.logits[:length], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_continues_from_the_cache(tiny: Tiny, name: str) -> None:
    """Chunks across block borders, then one token at a time, are the whole prompt bit for bit."""
    from tests.models.harness import Model

    made = tiny(name)
    model = Model(made.path)
    tokens = prompt()
    whole = model.prompt(tokens)
    np.testing.assert_allclose(whole, made.logits, rtol=0, atol=TOLERANCE)
    chunks = [15, 2, 13] + [1] * 10
    assert model.prompt(tokens, chunks).tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_program_at_many_token_counts(tiny: Tiny, name: str) -> None:
    """Recorded once, replayed at T = 1, 7, 64 with several sequences: rows bit-equal to alone."""
    from tests.models.harness import Model, Piece

    model = Model(tiny(name).path)
    tables = [[40, 3, 17], [5, 41, 2], [30, 1, 9], [8, 7, 6]]
    lengths = (40, 12, 1, 11)  # 64 tokens
    tokens = [prompt(n, seed) for seed, n in enumerate(lengths)]
    alone = [model.step(Piece(t, b)) for t, b in zip(tokens, tables, strict=True)]

    def packed(spans: list[tuple[int, int]]) -> list[np.ndarray]:
        pieces = [
            Piece(t[a:b], table, a)
            for t, table, (a, b) in zip(tokens, tables, spans, strict=True)
            if b > a
        ]
        rows = iter(model.step(*pieces))
        return [np.array([next(rows) for _ in range(b - a)]) for a, b in spans]

    for spans in (
        [(0, n) for n in lengths],  # T = 64
        [(35, 40), (11, 12), (0, 1), (0, 0)],  # T = 7
        [(0, 0), (0, 0), (0, 0), (10, 11)],  # T = 1
    ):
        assert sum(b - a for a, b in spans) in (64, 7, 1)
        for got, expected, (a, b) in zip(packed(spans), alone, spans, strict=True):
            assert got.tobytes() == expected[a:b].tobytes()


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_the_window_is_smaller_than_the_prompt(tiny: Tiny, name: str) -> None:
    """The windowed cases mean something: without the window the logits are others."""
    from tests.models.harness import Model

    made = tiny(name)
    model = Model(made.path)
    window = max(model.config.windows)
    assert 0 < window < PROMPT
    tokens = prompt()
    changed = [prompt(seed=2)[0], *tokens[1:]]
    full = {i for i, w in enumerate(model.config.windows) if not w}
    differs = np.abs(model.prompt(tokens) - model.prompt(changed)).max(axis=1) > 0
    reach = (window - 1) * model.config.num_layers
    assert differs[0]
    assert full or not differs[reach + 1 :].any()
