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

class PackedMatrix:
    """A weight in the tiles of kernels/cpu/kernels.hpp; made by `pack`, owns its memory."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
    @property
    def format(self) -> str:
        """A key of `kernels.weights.FORMATS`."""
    def row(self, i: int, out: NDArray[np.float32]) -> None:
        """Write the values of row i to `out` (1-D), those of `quant/gguf.py` bit for bit.

        Errors: ValueError for a row or a length that does not fit.
        """

def pack(
    format_name: str, data: NDArray[np.uint8], num_rows: int, num_columns: int, threads: int
) -> PackedMatrix:
    """Repack the blocks in `data` (1-D) into tiles on up to `threads` threads, without the GIL.

    Errors: ValueError for an unknown format or sizes that do not match; TypeError for another
    dtype, rank or layout of `data`; MemoryError.
    """

def kernel_tables() -> list[str]:
    """Names of the kernels that this machine can run, fastest first."""

def linear_test(
    isa_name: str,
    weights: list[PackedMatrix],
    x: NDArray[np.float32],
    form: str = "f32",
    epilogue: str = "store",
    dtype: str = "float32",
    biases: list[NDArray[np.float32] | None] = ...,
    residual: NDArray[np.float32] | None = None,
    norm_weight: NDArray[np.float32] | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    threads: int = 1,
    *,
    outs: list[NDArray[np.float32]],
) -> None:
    """One linear layer by itself, as a step runs it; kernels/cpu/linear.hpp. For tests.

    x [M, K], weights [N, K] each, outs [M, N] each: one per weight, or one per pair of weights for
    `silu_mul` and `gelu_mul`. Errors: ValueError for unknown names and shapes that do not fit.
    """
