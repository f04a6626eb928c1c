"""What a backend is: it packs weights, holds the KV cache, lowers Programs and runs them.

The engine's runner speaks to this interface alone; `choose.py` picks a backend.
All arrays that cross the seam are numpy; what a backend holds inside is its own affair.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from .program import Program
from .weights import RawWeight, WeightGroup

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of the KV cache, which has codes with scales as well: ops.kv_write says what those hold.
KV_CODES = ("int8", "fp8", "int4", "k8v4")
KV_DTYPES = (*DTYPE_BYTES, *KV_CODES)
KV_SCALE_BYTES = 4  # of a row of bytes: fp32
KV_GROUP = 32  # numbers of a row of int4 that share a scale and an offset, bfloat16 both
KV_GROUP_BYTES = KV_GROUP // 2 + 4


@dataclass(frozen=True)
class KVSpec:
    """The paged KV cache: its logical shape [num_blocks, layer, 2, kv head, slot in block, dim].

    The backend owns the physical order inside one block of one head. `dtype` is one of KV_DTYPES;
    int8 and fp8 have one scale beside the `head_dim` bytes of each token and kv head, of K and V;
    int4 has whole groups of KV_GROUP numbers, two to a byte, with a scale and an offset each; k8v4
    has keys of int8 and values of int4.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def parts(self) -> tuple[str, str]:
        """The dtypes of keys and of values."""
        return ("int8", "int4") if self.dtype == "k8v4" else (self.dtype, self.dtype)

    @property
    def bytes_per_token(self) -> int:
        row = sum(_kv_row_bytes(part, self.head_dim) for part in self.parts)
        return self.num_layers * self.num_kv_heads * row

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token


def kv_groups(head_dim: int) -> int:
    """Groups of a row of int4."""
    return -(-head_dim // KV_GROUP)


def _kv_row_bytes(part: str, head_dim: int) -> int:
    if part == "int4":
        return KV_GROUP_BYTES * kv_groups(head_dim)
    if part in KV_CODES:
        return head_dim + KV_SCALE_BYTES
    return head_dim * DTYPE_BYTES[part]


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One packed step: T tokens of S sequences. All int32 unless said.

    Sequence s owns tokens query_start[s] .. query_start[s+1]; after the step it has seq_len[s]
    tokens in the cache; block_table[s, i] is the block of its positions i*block_size onward.
    `slot[t]` = block * block_size + offset, or -1 for a padding row.

    Where the step before is still on its way, a backend that overlaps is given its `sampled`
    tokens, and token id -1 - r is the one that row r of that step's sampling program drew.
    """

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    query_start: np.ndarray  # [S + 1]
    seq_len: np.ndarray  # [S]
    block_table: np.ndarray  # [S, max_blocks]
    slot: np.ndarray  # [T]
    logit_rows: np.ndarray  # [R]  indices into T
    sampled: Any = None  # Sampling.tokens of the step before


@dataclass(frozen=True, eq=False)
class SamplingInputs:
    """Per-row parameters of the sampling program over [R, V] logits; see kernels/sampling.py.

    A row with target >= 0 samples nothing: its token is `target` and its logprob is reported
    (prompt logprobs and scoring). "CSR" triples give, for row r, entries start[r] .. start[r+1].
    """

    temperature: np.ndarray  # [R] f32   0 = greedy
    top_k: np.ndarray  # [R] i32   0 = off
    top_p: np.ndarray  # [R] f32   1 = off
    min_p: np.ndarray  # [R] f32   0 = off
    typical_p: np.ndarray  # [R] f32   1 = off
    top_n_sigma: np.ndarray  # [R] f32   0 = off
    xtc_probability: np.ndarray  # [R] f32   0 = off
    xtc_threshold: np.ndarray  # [R] f32
    repetition_penalty: np.ndarray  # [R] f32   1 = off
    presence_penalty: np.ndarray  # [R] f32   0 = off
    frequency_penalty: np.ndarray  # [R] f32   0 = off
    seed: np.ndarray  # [R] u64
    sample_index: np.ndarray  # [R] u32   which of the n samples
    position: np.ndarray  # [R] u32   position of the token being sampled
    target: np.ndarray  # [R] i32   -1 = sample
    num_logprobs: np.ndarray  # [R] i32   -1 = none wanted, 0 = chosen only, k = top k as well
    history_start: np.ndarray  # [R + 1] i32   CSR: distinct tokens seen so far, for penalties
    history_ids: np.ndarray  # i32   ascending within a row
    history_count: np.ndarray  # i32   occurrences in the OUTPUT (0: prompt only)
    bias_start: np.ndarray  # [R + 1] i32   CSR: added to logits (logit_bias, DRY)
    bias_ids: np.ndarray  # i32   ascending within a row
    bias_values: np.ndarray  # f32
    ban_start: np.ndarray  # [R + 1] i32   CSR: forbidden tokens (bad_words, n-grams, min_tokens)
    ban_ids: np.ndarray  # i32
    mask_row: np.ndarray  # [R] i32   row of mask_table; row 0 = everything allowed
    mask_table: np.ndarray  # [M, ceil(V/32)] u32   bit set = allowed

    # Whose at() made them, as good as every array but the position; None: nobody's.
    lasting: ClassVar[SamplingInputs | None] = None

    @property
    def num_rows(self) -> int:
        return len(self.temperature)

    def at(self, position: np.ndarray) -> SamplingInputs:
        """The same rows at another `position`; all other arrays are shared."""
        rows = object.__new__(SamplingInputs)  # the constructor would set every field anew
        rows.__dict__.update(self.__dict__, position=position, lasting=self)
        return rows


@dataclass(frozen=True, eq=False)
class SampleResult:
    """What the sampling program returns for R rows. Logprobs are of the RAW logits (before bias,
    penalties, temperature), natural log. K = max(num_logprobs, 0); unused places hold id -1.

    A row that cannot be answered has token -1, and its caller ends that request with an error;
    other rows are not affected. Two causes: the raw logits hold NaN or +inf, or nothing finite
    (then a row with a target fails too, and every number of the row is unset); or bias, bans, mask
    and penalties left nothing finite (then top_ids and top_logprobs are still the raw logits')."""

    tokens: np.ndarray  # [R] i32   -1: the row failed
    logprobs: np.ndarray  # [R] f32   NaN where num_logprobs is -1 or the row failed
    ranks: np.ndarray  # [R] i32   1 + number of tokens with a higher raw logit; 0 where no logprob
    top_ids: np.ndarray  # [R, K] i32   descending raw logit, ties by ascending id
    top_logprobs: np.ndarray  # [R, K] f32   NaN in unused places


class Logits(Protocol):
    """[R, V] fp32 logits, wherever the backend keeps them."""

    def numpy(self) -> np.ndarray: ...  # [R, V] f32 copy on the host

    def wait(self) -> None: ...  # until the step that makes them is over


class Executable(Protocol):
    """A lowered model Program."""

    def run(self, step: StepInputs) -> Logits:
        """Compute one step; a backend that overlaps returns before it is over."""
        ...


@runtime_checkable
class PreparedExecutable(Executable, Protocol):
    """An executable that has something to do before its first step."""

    def prepare(self, max_tokens: int, max_rows: int, max_context: int) -> None:
        """Make ready for steps within these limits; the arguments are workspace_bytes' own."""
        ...


class Sampler(Protocol):
    """The lowered sampling program."""

    def run(self, logits: Logits, rows: SamplingInputs) -> SampleResult: ...

    def from_numpy(self, logits: np.ndarray) -> Logits: ...  # after a host-side logits processor

    def log_softmax(self, logits: Logits) -> np.ndarray: ...  # [R, V] f32, same numerics as run()


class Sampling(Protocol):
    """A sampling program that may still be running."""

    tokens: Any  # [R] as the backend's next step reads them, see StepInputs.sampled

    def result(self) -> SampleResult: ...  # waits for it


@runtime_checkable
class LaunchingSampler(Sampler, Protocol):
    """A sampler that works where the logits lie, behind the step that makes them."""

    def launch(self, logits: Logits, rows: SamplingInputs) -> Sampling:
        """As run(), without waiting; keeps neither argument's arrays."""
        ...


class Backend(Protocol):
    """One way of computing. Constructed by `choose(...).create(...)`."""

    name: str
    overlaps: bool  # a step may be launched while the one before is still running

    def pack(self, weight: RawWeight | WeightGroup) -> Any:
        """Take one weight in; the only way in. The result is opaque and goes to `lower`.

        A weight with `pack_as` is quantised here or there. Errors: WeightTooLarge.
        """
        ...

    def weights_bytes(
        self, program: Program, weights: Mapping[str, RawWeight | WeightGroup]
    ) -> int:
        """Memory that a Program's weights take once lowered, mapped pages of the file included."""
        ...

    def packing_notes(self, weights: Mapping[str, RawWeight | WeightGroup]) -> tuple[str, ...]:
        """What packing changes of these weights' values, beyond what `pack_as` asks for."""
        ...

    def kv_dtype(self, activation_dtype: str, quantised: bool) -> str:
        """The cache's dtype where none is asked for; `quantised` tells of the checkpoint."""
        ...

    def allocate_kv(self, spec: KVSpec, num_blocks: int) -> Any:
        """A zeroed cache of num_blocks; opaque."""
        ...

    def workspace_bytes(
        self,
        program: Program,
        max_tokens: int,
        max_rows: int,
        max_context: int,
        *,
        weights: Mapping[str, RawWeight | WeightGroup] | None = None,
        kv: KVSpec | None = None,
    ) -> int:
        """Upper bound of scratch that a step of max_tokens tokens and max_rows logit rows takes,
        of at most max_rows sequences of at most max_context tokens.

        weights, kv: what the program will be lowered to, for a tighter bound where it is known.
        """
        ...

    def lower(self, program: Program, weights: Mapping[str, Any], kv: Any) -> Executable: ...

    def sampler(self, vocab_size: int) -> Sampler: ...

    def available_memory(self) -> int | None:
        """Bytes free now where weights and cache are held; None where that is the host's memory."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for `doctor` and the step log: numerics class, threads, versions."""
        ...


class BackendUnavailable(RuntimeError):
    """No backend can serve the asked device; the message says what was tried and how to mend it."""


def check_program(
    backend: str,
    program: Program,
    weights: Mapping[str, Any],
    cache: KVSpec | None,
    operations: Collection[str],
) -> None:
    """What every backend's `lower` holds its arguments to; `weights` are whatever has a shape.

    Errors: ValueError that names what is unfinished, missing, unknown, or does not fit together.
    """
    if program.result is None:
        raise ValueError("the program is not finished: call program.finish(result) first")
    missing = sorted(set(program.weights) - set(weights))
    if missing:
        raise ValueError(f"the program reads weights that were not given: {', '.join(missing)}")
    for name, handle in program.weights.items():
        if tuple(weights[name].shape) != handle.shape:
            raise ValueError(
                f"weight {name!r} is {list(weights[name].shape)}, "
                f"the program reads it as {list(handle.shape)}"
            )
    for op in program:
        if op.name not in operations:
            raise ValueError(
                f"the {backend} backend has no operation {op.name!r}; "
                f"it has {', '.join(sorted(operations))}"
            )
        if op.name not in ("kv_write", "attention"):
            continue
        if cache is None:
            raise ValueError(f"the program has {op.name} but no KV cache was given")
        want = (op.attrs["num_kv_heads"], op.attrs["head_dim"])
        have = (cache.num_kv_heads, cache.head_dim)
        layer = op.attrs["layer"]
        if want != have or not 0 <= layer < cache.num_layers:  # type: ignore[operator]
            raise ValueError(
                f"{op.name} of layer {layer} has {want[0]} kv heads of {want[1]}; the KV cache "
                f"has {cache.num_layers} layers of {have[0]} kv heads of {have[1]}"
            )
