"""What an engine says of itself reaches the dashboard whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")


def test_the_dashboard_of_a_real_engine(make_llm: Callable[..., Any]) -> None:
    from engineroom.engine.client import plain
    from engineroom.engine.serve.dashboard import _engine

    llm = make_llm(device="cpu")
    llm.generate([[1, 2, 3] * 20], use_tqdm=False)
    told = _engine(plain(llm.stats()))
    assert None not in told.values() and told["num_generated_tokens"] >= 1
    assert 0 < told["step_p50_ms"] <= told["step_p99_ms"] and told["tokens_per_step"] >= 1
