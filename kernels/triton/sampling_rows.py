"""What the kernels of sampling read of a row: its parameters, its logits, what others found.

Parameters are int32 [R, FIELDS], floats by their bits, so that a step brings them in one copy and
no kernel depends on the number of rows. A row's vocabulary is cut into chunks of CHUNK tokens, and
a launch over [R, chunks] leaves what it finds in each in `found`, int64 [R, SLOTS, chunks]: largest
scores (packed) and exact sums, of which the next launch takes the largest or the sum.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import numpy as np

import triton
import triton.language as tl

from ..backend import SamplingInputs
from .sampling_numerics import LOWEST, NEG_INF, id_of

CHUNK = 2048  # tokens of a program

_COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "sample_index",
    "position",
    "target",
    "num_logprobs",
    "mask_row",
)
(
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    TYPICAL_P,
    TOP_N_SIGMA,
    XTC_PROBABILITY,
    XTC_THRESHOLD,
    REPETITION,
    PRESENCE,
    FREQUENCY,
    SAMPLE_INDEX,
    POSITION,
    TARGET,
    NUM_LOGPROBS,
    MASK_ROW,
) = (tl.constexpr(i) for i in range(len(_COLUMNS)))
SEED = tl.constexpr(16)  # low word, high word
HISTORY = tl.constexpr(18)  # first entry, end of entries; none where nothing is penalised
BIAS = tl.constexpr(20)
BAN = tl.constexpr(22)
EDITED = tl.constexpr(24)  # place among the rows whose logits are changed, or -1
FILTERED = tl.constexpr(25)  # place among the rows that are filtered, or -1
FIELDS = tl.constexpr(32)

LIMITS = tl.constexpr(8)  # distances |z| up to which tokens are counted: 1/2, 1, 2, .. 32, any
RAW = tl.constexpr(0)  # largest logit as the program receives it
BEST = tl.constexpr(1)  # largest logit after bias, bans, mask and penalties
WEIGHT = tl.constexpr(2)  # weights of the raw logits
SCORE = tl.constexpr(3)  # largest z + noise
LEAST = tl.constexpr(4)  # top-n-sigma's threshold, a float's bits, in the first chunk
COUNT = tl.constexpr(5)  # tokens within each limit
MASS = tl.constexpr(5 + 8)  # their weights
SLOTS = tl.constexpr(5 + 8 + 8)


class Packed:
    """A step's rows, packed on the host, and which launches they need."""

    def __init__(self, rows: SamplingInputs) -> None:
        count = rows.num_rows
        table = np.zeros((count, FIELDS.value), dtype=np.int32)
        for field, name in enumerate(_COLUMNS):
            table[:, field] = getattr(rows, name).view(np.int32)
        table[:, SEED.value : SEED.value + 2] = (
            np.ascontiguousarray(rows.seed, dtype="<u8").view(np.int32).reshape(count, 2)
        )
        samples = rows.target < 0
        penalised = samples & (
            (rows.repetition_penalty != 1)
            | (rows.presence_penalty != 0)
            | (rows.frequency_penalty != 0)
        )
        lengths = {}
        for field, name, wanted in (
            (HISTORY, "history", penalised),
            (BIAS, "bias", samples),
            (BAN, "ban", samples),
        ):
            start = getattr(rows, f"{name}_start")
            length = np.where(wanted, start[1:] - start[:-1], 0)
            table[:, field.value] = start[:-1]
            table[:, field.value + 1] = start[:-1] + length
            lengths[name] = length
        self.masked = bool((samples & (rows.mask_row != 0)).any())
        self.entries = {name: int(length.max(initial=0)) for name, length in lengths.items()}
        edited = samples & (sum(lengths.values()) + rows.mask_row != 0)
        random = samples & (rows.temperature != 0)
        filtered = random & (
            (rows.top_n_sigma > 0)
            | (rows.top_k > 0)
            | (rows.typical_p < 1)
            | (rows.top_p < 1)
            | (rows.min_p > 0)
            | (rows.xtc_probability > 0)
        )
        self.edited, self.filtered = int(edited.sum()), int(filtered.sum())
        table[:, EDITED.value] = np.where(edited, np.cumsum(edited) - 1, -1)
        table[:, FILTERED.value] = np.where(filtered, np.cumsum(filtered) - 1, -1)
        self.drawn = bool((random & ~filtered).any())
        self.spread = bool((filtered & (rows.top_n_sigma > 0)).any())
        self.scored = bool((rows.num_logprobs >= 0).any())
        self.width = max(0, int(rows.num_logprobs.max(initial=0)))
        self.table = table


def scoring(count: int) -> np.ndarray:
    """The table of rows of which logprobs are wanted alone."""
    table = np.zeros((count, FIELDS.value), dtype=np.int32)
    table[:, [EDITED.value, FILTERED.value]] = -1
    return table


@triton.jit
def number(row_ptr, FIELD: tl.constexpr):
    """A parameter that is a float."""
    return tl.load(row_ptr + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def word(row_ptr, FIELD: tl.constexpr):
    """A parameter that is a uint32."""
    return tl.load(row_ptr + FIELD).to(tl.uint32, bitcast=True)


@triton.jit
def adjusted(x_ptr, work_ptr, edited, at, mask, vocab):
    """Logits that bias, bans, mask and penalties have changed, of x_ptr's row; -inf outside."""
    raw = tl.load(x_ptr + at, mask=mask & (edited < 0), other=NEG_INF)
    work = tl.load(
        work_ptr + edited.to(tl.int64) * vocab + at, mask=mask & (edited >= 0), other=NEG_INF
    )
    return tl.where(edited < 0, raw, work)


@triton.jit
def tempered(x, highest, least, temperature):
    """z of adjusted logits; -inf where a token is out, by top-n-sigma or from the start."""
    d = x - highest
    return tl.where(d >= least, tl.div_rn(d, temperature), NEG_INF)


@triton.jit
def place_in_found(found_ptr, row, slot, chunks):
    return found_ptr + (row * SLOTS + slot) * chunks


@triton.jit
def largest(found_ptr, row, SLOT: tl.constexpr, chunks, CHUNKS: tl.constexpr):
    """Of a slot's packed scores."""
    at = tl.arange(0, CHUNKS)
    there = place_in_found(found_ptr, row, SLOT, chunks) + at
    return tl.max(tl.load(there, mask=at < chunks, other=LOWEST), 0)


@triton.jit
def summed(found_ptr, row, slot, upto, chunks, CHUNKS: tl.constexpr):
    """Of a slot's first `upto` chunks."""
    at = tl.arange(0, CHUNKS)
    there = place_in_found(found_ptr, row, slot, chunks) + at
    return tl.sum(tl.load(there, mask=at < upto, other=0), 0)


@triton.jit
def highest_raw(x_ptr, found_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The largest logit of x_ptr's row, with its own sign where it is zero."""
    return tl.load(x_ptr + id_of(largest(found_ptr, row, RAW, chunks, CHUNKS)))


@triton.jit
def highest_adjusted(x_ptr, work_ptr, edited, found_ptr, row, vocab, chunks, CHUNKS: tl.constexpr):
    at = id_of(largest(found_ptr, row, BEST, chunks, CHUNKS))
    return adjusted(x_ptr, work_ptr, edited, at, at < vocab, vocab)
