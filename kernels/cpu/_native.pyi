"""Types of the native module; kernels/cpu/module.cpp and counter.cpp define it."""

import numpy as np
from numpy.typing import NDArray

def dequantise(format_name: str, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Write the float32 values of the blocks in `data` (1-D) to `out` (1-D), without the GIL.

    `format_name` is a key of `kernels.weights.FORMATS`; the values are those of `quant/gguf.py`,
    bit for bit. Errors: ValueError for an unknown format or sizes that do not match; TypeError
    for arrays of another dtype, rank or layout.
    """

def cpu_features() -> dict[str, bool]:
    """Instruction set extensions by name, true where processor and operating system can run it."""

def philox_uniform(
    seed: int, sample_index: int, position: int, stream: int, out: NDArray[np.float32]
) -> None:
    """Write to out[i] the uniform in (0, 1) of token id i, without the GIL.

    Counter layout and arithmetic: `kernels.sampling.uniforms`, bit for bit. Errors: TypeError for
    a seed outside 0 .. 2^64 - 1, other numbers outside 0 .. 2^32 - 1, or an array that is not 1-D
    contiguous float32.
    """

def attention_units() -> list[str]:
    """Names of the instruction set units that this machine can run, fastest first."""

def rows_test(
    unit: str,
    op: str,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    out: NDArray[np.float32],
    a: float = 0.0,
    b: float = 0.0,
) -> None:
    """One row-wise operation on one row, for tests.

    `op`: rms_norm (weight y, eps a, offset b), add, scale (a), softcap (a), silu_mul,
    gelu_tanh_mul, or the dtype to round to. Errors: ValueError for an unknown unit or operation,
    or lengths that differ.
    """

def rope_test(
    unit: str,
    x: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    out: NDArray[np.float32],
    head_dim: int,
    interleaved: bool,
) -> None:
    """Rotates the heads of one row, for tests. Errors: ValueError for lengths that do not fit."""

def to_bf16_test(unit: str, x: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """A row as an operand of bf16 products, for tests; out is a multiple of 32 long."""

def to_int8_test(
    unit: str,
    x: NDArray[np.float32],
    q: NDArray[np.int8],
    scale: NDArray[np.float32],
    scaled_sum: NDArray[np.float32],
    sum16: NDArray[np.int32],
) -> None:
    """A row as an operand of int8 products, for tests; q is a multiple of 32 long."""

def attention_test(
    unit: str,
    cache_dtype: str,
    cache: NDArray[np.uint8],
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    positions: NDArray[np.int32],
    query_start: NDArray[np.int32],
    seq_len: NDArray[np.int32],
    block_table: NDArray[np.int32],
    slot: NDArray[np.int32],
    out: NDArray[np.float32],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dtype: str = "float32",
    threads: int = 1,
    repeats: int = 0,
) -> float:
    """Write a packed step's k and v to `cache` (one layer's blocks, end to end), run attention.

    For tests. Attention runs `repeats` times; returns the seconds of the fastest. Errors:
    ValueError for shapes that do not fit, or blocks and slots outside the cache.
    """
