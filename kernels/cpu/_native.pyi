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

class RowSampler:
    """The sampling program of `kernels/sampling.py` for one vocabulary size, with its threads."""

    def __init__(self, vocab_size: int, threads: int) -> None: ...
    def run(
        self,
        logits: NDArray[np.float32],
        *,
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        min_p: NDArray[np.float32],
        typical_p: NDArray[np.float32],
        top_n_sigma: NDArray[np.float32],
        xtc_probability: NDArray[np.float32],
        xtc_threshold: NDArray[np.float32],
        repetition_penalty: NDArray[np.float32],
        presence_penalty: NDArray[np.float32],
        frequency_penalty: NDArray[np.float32],
        seed: NDArray[np.uint64],
        sample_index: NDArray[np.uint32],
        position: NDArray[np.uint32],
        target: NDArray[np.int32],
        num_logprobs: NDArray[np.int32],
        history_start: NDArray[np.int32],
        history_ids: NDArray[np.int32],
        history_count: NDArray[np.int32],
        bias_start: NDArray[np.int32],
        bias_ids: NDArray[np.int32],
        bias_values: NDArray[np.float32],
        ban_start: NDArray[np.int32],
        ban_ids: NDArray[np.int32],
        mask_row: NDArray[np.int32],
        mask_table: NDArray[np.uint32],
        tokens: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int32],
        top_ids: NDArray[np.int32],
        top_logprobs: NDArray[np.float32],
    ) -> None:
        """Answer each row of `logits` [R, V] into the last five arrays, without the GIL.

        The others are those of `SamplingInputs`, checked by `kernels.sampling.check_rows`. Errors:
        ValueError for lengths that do not fit R, TypeError for another dtype, rank or layout.
        """

    def log_softmax(self, logits: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write the natural logprobs of `logits` [R, V] to `out`, without the GIL."""
