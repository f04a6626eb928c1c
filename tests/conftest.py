"""Makes the assertions of helper modules hold under `python -O`, as those of test files do."""

import os

import pytest

# Triton's kernels run on its interpreter, on the CPU; read when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

# Each of several test processes keeps to one core, with all that it starts: threads that spin for
# each other would wait for other processes' turns. Tests of threads (marked `cores`) run alone.
if hasattr(os, "sched_setaffinity") and "PYTEST_XDIST_WORKER" in os.environ:
    _CORES = sorted(os.sched_getaffinity(0))
    _NUMBER = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {_CORES[_NUMBER % len(_CORES)]})

_ROOMS = ("batch", "core", "engine", "house", "kernels", "load", "models", "quant")
pytest.register_assert_rewrite(*(f"tests.{room}" for room in _ROOMS))
