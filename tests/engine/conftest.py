"""Models that several engine tests share; loading is cheap, but not free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import golden


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def make_llm(golden_model: Path) -> Iterator[Callable[..., Any]]:
    """make_llm(**options) -> an LLM of the golden model; all are closed at the end."""
    from engineroom import LLM

    made: list[Any] = []

    def make(model: str | Path = golden_model, **options: Any) -> Any:
        made.append(LLM(str(model), **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
