"""`engineroom doctor --quant`: each CPU kernel of each weight format against its specification.

A random matrix of the format multiplies random rows, among them one with outliers. Every product is
held to the float64 product of the specification's values (quant/values.py), within the error that
the kernel's way of multiplying allows; and a row alone must give the bits that it gives among
others.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...kernels import ops
from ...kernels.backend import StepInputs
from ...kernels.cpu import _native
from ...kernels.cpu.backend import BFLOAT16, TABLE_ROUNDING, UNVERIFIED, CpuBackend
from ...kernels.ops import StepHandles
from ...kernels.program import Program
from ...kernels.weights import FORMATS, Format, RawWeight
from ...quant.values import dequantise, row_dtype
from .calibration import float_weight

_ROWS, _OUTPUTS, _COLUMNS = 9, 101, 512  # no multiple of a tile's height; whole blocks of each
_EPS = 2.0**-24
# How inputs may be multiplied: the backend's options for it.
_FORMS: dict[str, dict[str, str]] = {
    "float32": {"activations": "float32"},
    "int8": {"activations": "int8"},
    "bfloat16": {"activations": "float32", "activation_dtype": "bfloat16"},
}


def check_formats() -> list[dict[str, Any]]:
    """A row for each kernel: format, bits, inputs, isa, the largest error as a share of what is
    allowed, whether rows are independent, whether it passed, and its seconds."""
    x = _inputs()
    found = []
    for fmt, form in _cases():
        weight = random_weight(fmt, _OUTPUTS, _COLUMNS)
        for isa in _native.kernel_tables():
            started = time.perf_counter()
            row: dict[str, Any] = {
                "format": fmt.name,
                "bits": fmt.bits_per_element,
                "inputs": form,
                "isa": f"{isa} (unverified on hardware)" if isa in UNVERIFIED else isa,
            }
            try:
                backend = CpuBackend(isa=isa, threads=2, **_FORMS[form])  # type: ignore[arg-type]
                error, independent = _compare(backend, weight, x, form)
                row |= {"error": error, "independent": independent, "why": ""}
            except Exception as error:  # a kernel that breaks is a kernel that failed
                row |= {"error": None, "independent": False}
                row["why"] = f"{type(error).__name__}: {error}"
            passed = row["error"] is not None and row["error"] <= 1 and row["independent"]
            found.append({**row, "passed": passed, "seconds": time.perf_counter() - started})
    return found


def _cases() -> Iterator[tuple[Format, str]]:
    for fmt in FORMATS.values():
        yield fmt, "float32"
        if fmt in BFLOAT16:
            yield fmt, "bfloat16"
        elif not fmt.is_float:
            yield fmt, "int8"


def random_weight(fmt: Format, num_rows: int, columns: int) -> RawWeight:
    """Random quants of ordinary scales, [num_rows, columns]."""
    rng = np.random.default_rng(31)
    data = rng.integers(0, 256, num_rows * fmt.row_bytes(columns), np.uint8)
    if fmt.is_float:
        floats = rng.standard_normal((num_rows, columns), np.float32)
        if fmt.name == "F32":
            return float_weight(fmt.name, floats)
        bits = floats.view(np.uint32) >> 16 if fmt.name == "BF16" else floats.astype("<f2")
        data = bits.astype("<u2" if fmt.name == "BF16" else "<f2").reshape(-1).view(np.uint8)
        return RawWeight(fmt.name, fmt, (num_rows, columns), {"data": data})
    rows = data.view(row_dtype(fmt, columns))
    for where, layout in ((rows, fmt.header), (rows["blocks"], fmt.layout)):
        for field, kind, _ in layout:
            values: Any = where[field]
            if field == "zero":
                values[:] = rng.integers(-8, 8, values.shape)
            elif kind in ("f2", "f4"):
                values[:] = rng.uniform(0.5, 1, values.shape) / 64
            elif field == "values":
                values[:] = values & np.uint8(0xF7)  # no NaN among codes of floats
            elif field == "exponent":
                values[:] = rng.integers(112, 120, values.shape)  # of a power of two
    return RawWeight(fmt.name, fmt, (num_rows, columns), {"data": data})


def _inputs() -> np.ndarray:
    x = np.random.default_rng(32).standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
    x[3, 7::64] *= 50
    x[5] = 0
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bfloat16 numbers


def _compare(
    backend: CpuBackend, weight: RawWeight, x: np.ndarray, form: str
) -> tuple[float, bool]:
    program = Program()
    step = StepHandles.of(program)
    rows = ops.embedding(program.weight("x", x.shape), step.token_ids)
    made = ops.linear(rows, program.weight("w", weight.shape))
    program.finish(ops.select_rows(made, step.logit_rows))
    packed = {"x": backend.pack(float_weight("x", x)), "w": backend.pack(weight)}
    executable = backend.lower(program, packed, None)
    together = np.array(executable.run(_step(np.arange(len(x)))).numpy())
    alone = [executable.run(_step(np.array([i]))).numpy()[0] for i in range(len(x))]
    wrong = np.abs(together - x.astype(np.float64) @ _wanted(weight).T)
    share = float((wrong / _allowed(_wanted(weight), x, form, weight)).max())
    return share, np.array_equal(together, np.stack(alone))


def _wanted(weight: RawWeight) -> np.ndarray:
    return dequantise(weight).astype(np.float64)


def _allowed(w: np.ndarray, x: np.ndarray, form: str, weight: RawWeight) -> np.ndarray:
    """The error bound of each product [rows, outputs].

    A float32 sum of K products moves by at most K eps of the sum of their sizes. int8 inputs move
    by at most half a step, 1/254 of their group's largest, and values of a table by one part in
    TABLE_ROUNDING of their block's scale. (Inputs are bfloat16 numbers, and the product is the
    program's result, not rounded.)
    """
    size = np.abs(x).astype(np.float64)
    bound = 2 * _COLUMNS * _EPS * (size @ np.abs(w).T)
    if form == "int8":
        largest = size.reshape(len(x), -1, 32).max(axis=2).repeat(32, axis=1)
        bound += (largest / 254) @ np.abs(w).T * 1.01
    if form == "int8" and weight.format.name in TABLE_ROUNDING:
        absmax = weight.data.view(row_dtype(weight.format, _COLUMNS))["blocks"]["absmax"]
        absmax = np.repeat(absmax.reshape(len(w), -1).astype(np.float64), 64, axis=1)
        moved = 1.01 / TABLE_ROUNDING[weight.format.name]  # of inputs that are rounded themselves
        bound += moved * (size @ absmax.T)
    return bound + 1e-30


def _step(ids: np.ndarray) -> StepInputs:
    at = np.arange(len(ids), dtype=np.int32)
    ends = np.array([0, len(ids)], np.int32)
    table = np.zeros((1, 1), np.int32)
    return StepInputs(ids.astype(np.int32), at, ends, ends[1:], table, at, at)


def render(rows: list[dict[str, Any]]) -> str:
    """The table as text for a terminal."""
    lines = ["  format   bits  inputs    kernels    error, of what is allowed"]
    for row in rows:
        state = "ok" if row["passed"] else "FAILED"
        shown = row["why"] or f"{row['error']:.3f}"
        alone = "" if row["independent"] or row["why"] else "; a row alone has other bits"
        lines.append(
            f"  {row['format']:<8} {row['bits']:>4.1f}  {row['inputs']:<9} {row['isa']:<10} "
            f"{shown} {state}{alone}"
        )
    passed = sum(row["passed"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    lines.append(f"{passed} of {len(rows)} kernels passed, in {seconds:.1f} s")
    return "\n".join(lines)


__all__ = ["check_formats", "random_weight", "render"]
