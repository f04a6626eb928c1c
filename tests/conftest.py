"""Makes the assertions of helper modules hold under `python -O`, as those of test files do."""

import os

import pytest

# Triton's kernels run on its interpreter, on the CPU; read when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

_ROOMS = ("batch", "core", "engine", "house", "kernels", "load", "models", "quant")
pytest.register_assert_rewrite(*(f"tests.{room}" for room in _ROOMS))
