"""What the tests of the Triton backend share: it on the interpreter, beside the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs torch")
triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")
interpreter = pytest.importorskip("triton.runtime.interpreter")

from engineroom.kernels.backend import KVSpec, StepInputs  # noqa: E402
from engineroom.kernels.program import Program  # noqa: E402
from engineroom.kernels.triton import TritonBackend  # noqa: E402
from engineroom.kernels.weights import RawWeight, WeightGroup  # noqa: E402
from engineroom.quant.small_floats import e4m3_values  # noqa: E402
from tests.kernels.packed_steps import raw  # noqa: E402

E4M3 = e4m3_values()


def _mend_index() -> None:
    """Triton before 3.9 turns arrays of one element into int, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = mended


def _fix_columns() -> None:
    """Multiply in blocks of 16 columns, so that a column's bits do not depend on how many there
    are: true of the instructions that the kernels are compiled to, false of numpy's products."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        left, right = values(a), values(b)
        blocks = [
            left @ np.ascontiguousarray(right[:, i : i + 16]) for i in range(0, right.shape[1], 16)
        ]
        # Integers are exact in fp32 as far as tests go.
        out = np.concatenate(blocks, axis=1).astype(d.data.dtype) + d.data
        return interpreter.TensorHandle(out, d.dtype.scalar)

    def values(operand: Any) -> np.ndarray:
        if operand.dtype.scalar == triton.language.float8e4nv:  # held as codes
            return E4M3[operand.data.view(np.uint8)]
        return np.ascontiguousarray(operand.data, dtype=np.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot


_mend_index()
_fix_columns()

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
