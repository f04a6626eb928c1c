"""Types of the native module; kernels/cpu/module.cpp and counter.cpp define it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def dequantise(
    format_name: str, data: NDArray[np.uint8], out: NDArray[np.float32], num_columns: int = 0
) -> None:
    """Write the float32 values of the rows in `data` (1-D) to `out` (1-D), without the GIL.

    `format_name` is a key of `kernels.weights.FORMATS`; the values are those of
    `quant/values.py`, bit for bit. `num_columns`: elements of a row; 0 takes all as one row.
    Errors: ValueError for an unknown format or sizes that do not match; TypeError for arrays of
    another dtype, rank or layout.
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
        """Write the values of row i to `out` (1-D), those of `quant/values.py` bit for bit.

        Errors: ValueError for a row or a length that does not fit.
        """

def pack(
    format_name: str,
    data: NDArray[np.uint8],
    num_rows: int,
    num_columns: int,
    threads: int,
    compact: bool = True,
) -> PackedMatrix:
    """Repack the blocks in `data` (1-D) into tiles on up to `threads` threads, without the GIL.

    compact: BF16 takes 12 bits an element, losing nothing, where that is 0.9 of the memory or less
    (few distinct exponents in a tile; num_columns a multiple of 8).

    Errors: ValueError for an unknown format or sizes that do not match; TypeError for another
    dtype, rank or layout of `data`; MemoryError.
    """

def pack_layer(
    pool: Pool,
    matrices: Sequence[tuple[str, NDArray[np.uint8], int, int]],
    paired: bool,
    compact: bool = True,
) -> list[PackedMatrix]:
    """`pack` of a linear layer's matrices (format, data, rows, columns).

    It takes as many threads as the pool has, at most; pinned ones pack the tiles that they will
    multiply by. paired: the matrices come in pairs of equal rows, as a step takes gate and up.
    Errors: as `pack`; ValueError for pairs that are none.
    """

def quantise(
    format_name: str,
    data: NDArray[np.uint8],
    num_rows: int,
    num_columns: int,
    to_format: str,
    out: NDArray[np.uint8],
    threads: int,
) -> int:
    """Quantise the rows in `data` (1-D) to INT8 or INT4 rows in `out` (1-D), without the GIL.

    The bytes are those of `quant/integers.py`. Returns -1, or the first row that holds a NaN,
    an infinity or 2^120 and more; `out` is then of no use. Errors: ValueError for an unknown format
    or sizes that do not match; TypeError for arrays of another dtype, rank or layout.
    """

class SampleParameters:
    """What `SamplingInputs` says of R rows but their position, checked by
    `kernels.sampling.check_rows`; the arrays are kept, not copied.

    Errors: ValueError for lengths that do not fit R, TypeError for another dtype, rank or layout.
    """

    def __init__(
        self,
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
    ) -> None: ...

class RowSampler:
    """The sampling program of `kernels/sampling.py` for one vocabulary size, with its threads."""

    def __init__(self, vocab_size: int, pool: Pool) -> None: ...
    def run(
        self,
        logits: NDArray[np.float32],
        parameters: SampleParameters,
        position: NDArray[np.uint32],
        tokens: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int32],
        top_ids: NDArray[np.int32],
        top_logprobs: NDArray[np.float32],
    ) -> None:
        """Answer each row of `logits` [R, V] into the last five arrays, without the GIL.

        Errors: ValueError for lengths that do not fit R, TypeError for another dtype, rank or
        layout.
        """

    def log_softmax(self, logits: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write the natural logprobs of `logits` [R, V] to `out`, without the GIL."""

class Pool:
    """Threads that run one function together; the caller is the first of them.

    Where this process has cores of several memory nodes each thread is pinned to a core, the caller
    only while it runs: to `places`, by default `place_threads` of its cores. Errors: ValueError for
    places that are not one a thread.
    """

    def __init__(self, threads: int, places: Sequence[tuple[int, list[int]]] = ...) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def places(self) -> list[tuple[int, list[int]]]:
        """Each thread's memory node and the CPUs of its core; empty where nothing is pinned."""
    def cpus(self) -> list[list[int]]:
        """The CPUs that each thread may run on, asked of each."""

class KVCache:
    """A zeroed cache of every layer. Errors: ValueError for sizes that are not positive,
    or for dtypes that are no pair of KVSpec.parts."""

    def __init__(
        self,
        key_dtype: str,
        value_dtype: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        num_blocks: int,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

_Place = tuple[int, int, bool]  # first column, width, one row per logit row

class StepProgram:
    """A lowered Program. Operations are appended in order by the methods named as they are in
    `kernels/ops.py`; `barrier` says that the operation reads what other threads wrote."""

    def __init__(
        self,
        isa: str,
        pool: Pool,
        cache: KVCache | None,
        vocab_size: int,
        token_columns: int,
        row_columns: int,
        result: _Place,
    ) -> None: ...
    def embedding(
        self,
        barrier: bool,
        out: _Place,
        parts: Sequence[tuple[str, NDArray[np.uint8], int] | PackedMatrix],
        dtype: str,
    ) -> None: ...
    def rms_norm(
        self,
        barrier: bool,
        x: _Place,
        out: _Place,
        weight: NDArray[np.float32],
        eps: float,
        offset: float,
        dtype: str,
    ) -> None: ...
    def map(
        self,
        barrier: bool,
        name: str,
        a: _Place,
        b: _Place,
        out: _Place,
        parameter: float,
        dtype: str,
    ) -> None: ...
    def select_rows(self, barrier: bool, x: _Place, out: _Place) -> None: ...
    def rotations(
        self, barrier: bool, out: _Place, inv_freq: list[float], factor: float
    ) -> None: ...
    def rope(
        self,
        barrier: bool,
        x: _Place,
        rotations: _Place,
        out: _Place,
        head_dim: int,
        interleaved: bool,
        dtype: str,
    ) -> None: ...
    def kv_write(self, barrier: bool, k: _Place, v: _Place, layer: int) -> None: ...
    def attention(
        self,
        barrier: bool,
        q: _Place,
        out: _Place,
        layer: int,
        num_heads: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: NDArray[np.float32] | None,
        dtype: str,
    ) -> None: ...
    def linear(
        self,
        barrier: bool,
        x: _Place,
        form: str,
        norm: NDArray[np.float32] | None,
        eps: float,
        offset: float,
        weights: list[tuple[PackedMatrix, NDArray[np.float32] | None, _Place, int]],
        epilogue: str,
        residual: _Place | None,
        norm_dtype: str,
        dtype: str,
        order: NDArray[np.int32] | None = None,
    ) -> None:
        """Errors: ValueError for shapes that differ, or an order that is none of x's columns."""
    @property
    def workspace_bytes(self) -> int: ...
    def top_experts(self, barrier: bool, logits: _Place, out: _Place) -> None: ...
    def expert_weights(
        self,
        barrier: bool,
        logits: _Place,
        experts: _Place,
        out: _Place,
        renormalise: bool,
        dtype: str,
    ) -> None: ...
    def expert_linear(
        self,
        barrier: bool,
        x: _Place,
        experts: _Place,
        out: _Place,
        form: str,
        matrices: Sequence[PackedMatrix],
        biases: Sequence[NDArray[np.float32]],
        epilogue: str,
        dtype: str,
    ) -> None:
        """matrices: one an expert or, where the epilogue is a gate, gate and up of each in turn;
        biases: none, or as many as an expert has matrices, each of all experts' rows."""

    def expert_sum(
        self, barrier: bool, x: _Place, weights: _Place, out: _Place, dtype: str
    ) -> None: ...
    def sigmoid_scale(
        self, barrier: bool, x: _Place, gate: _Place, out: _Place, dtype: str
    ) -> None: ...
    def run(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        query_start: NDArray[np.int32],
        seq_len: NDArray[np.int32],
        block_table: NDArray[np.int32],
        slot: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
    ) -> NDArray[np.float32] | None:
        """Logits [R, V] in the program's own memory, overwritten by the next run; None where they
        lie where the last run's lay.

        Errors: ValueError for ids, rows, slots or blocks outside of what there is.
        """

def find_cores(sys: str, allowed: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The cores of the CPUs `allowed` (ascending), as the folder `sys` (/sys) tells.

    Each is its memory node and its CPUs of those allowed; they come by node, then by CPU. Where the
    folder does not tell, a CPU is a core by itself and of node 0.
    """

def place_threads(
    cores: Sequence[tuple[int, list[int]]], threads: int
) -> list[tuple[int, list[int]]]:
    """The core of each thread, spread evenly over `cores` in their order.

    Empty where they are of one memory node or there is one thread: then nothing is pinned.
    """

def usable_cores() -> int:
    """Physical cores that this process may use, within its affinity and its cgroup's quota."""

def probe_read(pool: Pool, num_bytes: int, repeats: int = 8) -> float:
    """Bytes a second that the pool's threads read together, each its part of num_bytes; the fastest
    of `repeats` readings. Errors: ValueError for less than 256 bytes a thread."""

def probe_dots(pool: Pool, kind: str, repeats: int = 10) -> float:
    """Operations a second (a product and a sum are two) of the widest dot instruction of "int8",
    "bf16" or "f32" operands; 0 where this processor has none that the probe knows.
    Errors: ValueError for another kind."""

def packed_bytes(format_name: str, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix in tiles. Errors: ValueError for an unknown format or odd columns."""

def workspace_bound(
    token_columns: int,
    row_columns: int,
    inputs: Sequence[tuple[str, int, bool]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_tokens: int,
    max_rows: int,
    max_context: int,
    threads: int,
    expert_columns: int,
    top_k: int,
    num_experts: int,
) -> int:
    """What a StepProgram takes for steps of those sizes at most, in bytes.

    inputs: of each linear layer its form, its columns, and whether it has a row a logit row."""

def tiles_layout(matrix: PackedMatrix) -> list[int]:
    """Elements, scaling, bias, rows, columns, bytes of a tile's scales and of a tile."""

def tiles_of(matrix: PackedMatrix) -> NDArray[np.uint8]:
    """The bytes of a matrix's tiles: a read-only view that keeps the matrix alive."""

def map_tiles(
    fd: int, num_bytes: int, entries: Sequence[tuple[str, Sequence[int], int]]
) -> list[PackedMatrix]:
    """Matrices in an open file of num_bytes: (format, tiles_layout, offset of its tiles) each.

    The file is mapped whole, read-only and shared, and stays mapped while a matrix lives.
    Errors: ValueError for another size or tiles beyond the end; RuntimeError where it cannot be
    mapped.
    """

def kernel_tables() -> list[str]:
    """Names of the kernels that this machine can run, fastest first."""

def absent_tables() -> dict[str, str]:
    """Kernels of this build that this machine cannot run: name -> the features that it lacks."""

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

def layer_share(
    weights: Sequence[PackedMatrix], paired: bool, thread: int, threads: int
) -> list[tuple[int, int, int]]:
    """The tiles of a linear layer that are a thread's: (part, first, behind the last). For tests.

    paired: of each pair of weights, `part` being the first of the two.
    """

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
    gelu_tanh_mul, clamped_silu_mul, or the dtype to round to. Errors: ValueError for an unknown
    unit or operation, or lengths that differ.
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
    sum16: NDArray[np.int32],
    scaled_sum: NDArray[np.float32],
    fine_group: NDArray[np.int32],
    fine_q: NDArray[np.int8],
    fine_scale: NDArray[np.float32],
    fine_sum16: NDArray[np.int32],
) -> int:
    """A row as an operand of int8 products, for tests; q is a multiple of 32 long.

    Returns how many groups have a second digit.
    """

def attention_test(
    unit: str,
    key_dtype: str,
    value_dtype: str,
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
