"""Each transformers model is built once per session."""

from collections.abc import Callable

import pytest

from tests.models.tiny import Made, make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """tiny(name) -> the model of that name in tests/models/tiny.py."""
    pytest.importorskip("torch", reason="the oracle is transformers on torch; torch is absent")
    transformers = pytest.importorskip(
        "transformers", reason="the oracle is transformers, which is absent"
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
