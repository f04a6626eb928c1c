"""Makes the assertions of helper modules hold under `python -O`, as those of test files do."""

import pytest

_ROOMS = ("core", "engine", "house", "kernels", "load", "models", "quant")
pytest.register_assert_rewrite(*(f"tests.{room}" for room in _ROOMS))
