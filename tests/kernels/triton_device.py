"""What the tests of the Triton backend share: it on the interpreter, beside the reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs torch")
triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")
interpreter = pytest.importorskip("triton.runtime.interpreter")

from engineroom.engine.bench.gpu.interpreter import mend  # noqa: E402
from engineroom.kernels.backend import KVSpec, StepInputs  # noqa: E402
from engineroom.kernels.program import Program  # noqa: E402
from engineroom.kernels.triton import TritonBackend  # noqa: E402
from engineroom.kernels.weights import RawWeight, WeightGroup  # noqa: E402
from tests.kernels.packed_steps import raw  # noqa: E402

mend()

DTYPES = ("float32", "float16")  # the interpreter's bf16 arithmetic is wrong


def run(
    program: Program,
    weights: Mapping[str, np.ndarray | RawWeight | WeightGroup],
    step: StepInputs,
    *,
    dtype: str = "float32",
    kv: KVSpec | None = None,
    activations: str = "auto",
) -> np.ndarray:
    """Pack, lower and run once on the Triton backend; returns the result, fp32."""
    backend = TritonBackend(activation_dtype=dtype, threads=1, activations=activations)
    packed = {
        name: backend.pack(raw(w, name=name) if isinstance(w, np.ndarray) else w)
        for name, w in weights.items()
    }
    cache = backend.allocate_kv(kv, 64) if kv is not None else None
    return backend.lower(program, packed, cache).run(step).numpy()
