"""Makes the assertions of helper modules hold under `python -O`, as those of test files do."""

import os

import pytest

# Triton's kernels run on its interpreter, on the CPU; read when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

# Several test processes share the cores: torch's own threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_ROOMS = ("batch", "core", "engine", "house", "kernels", "load", "models", "quant")
pytest.register_assert_rewrite(*(f"tests.{room}" for room in _ROOMS))
