"""Triton's interpreter, mended where it is no model of a card: for rehearsals and for tests."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (the interpreter's own functions have no types)

from __future__ import annotations

import functools

import numpy as np
from triton.language import float8e4nv
from triton.runtime import interpreter

from ....quant.small_floats import e4m3_values


@functools.cache
def mend() -> None:
    """Change the interpreter of this process, once."""
    _mend_index()
    _fix_columns()


def _mend_index() -> None:
    """Triton before 3.9 turns arrays of one element into int, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def mended(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = mended


def _fix_columns() -> None:
    """Multiply so that a column's bits do not depend on how many there are: true of the
    instructions that the kernels are compiled to, false of numpy's products. Numbers of 16 bits are
    summed in fp64, where their products are exact; others go in blocks of 16 columns."""
    e4m3 = e4m3_values()

    def create_dot(self, a, b, d, *precision):
        left, right = values(a), values(b)
        if a.data.dtype == b.data.dtype == np.float16:
            out = (left.astype(np.float64) @ right.astype(np.float64)).astype(d.data.dtype) + d.data
            return interpreter.TensorHandle(out, d.dtype.scalar)
        blocks = [
            left @ np.ascontiguousarray(right[:, i : i + 16]) for i in range(0, right.shape[1], 16)
        ]
        # Integers are exact in fp32 as far as shapes go here.
        out = np.concatenate(blocks, axis=1).astype(d.data.dtype) + d.data
        return interpreter.TensorHandle(out, d.dtype.scalar)

    def values(operand):
        if operand.dtype.scalar == float8e4nv:  # held as codes
            return e4m3[operand.data.view(np.uint8)]
        return np.ascontiguousarray(operand.data, dtype=np.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot
