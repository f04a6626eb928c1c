"""What a weight is before any backend has packed it: a format, a shape, and the bytes it came in.

Weights travel as `RawWeight` (views of the mapped file) from `engine.load` through `quant` to
`backend.pack`, the only way in. A fused weight is a `WeightGroup`: a list of row ranges, each with
its own format, because GGUF mixes types within a layer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Format:
    """How the elements of one row lie in bytes.

    A row of `K` elements is its header, of most formats empty, and `K / block_elements` blocks of
    `block_bytes` bytes; rows follow each other without padding. `layout` and `header` say what a
    block and a row's header hold, as data: (field, dtype, count).
    """

    name: str
    block_elements: int
    block_bytes: int
    layout: tuple[tuple[str, str, int], ...]
    header: tuple[tuple[str, str, int], ...] = ()

    def row_bytes(self, num_elements: int) -> int:
        """Bytes of one row of `num_elements`; ValueError where a row is not whole blocks."""
        blocks, rest = divmod(num_elements, self.block_elements)
        if rest:
            raise ValueError(
                f"{self.name} stores blocks of {self.block_elements} elements; "
                f"a row of {num_elements} is not a whole number of them"
            )
        return self.header_bytes + blocks * self.block_bytes

    @property
    def header_bytes(self) -> int:
        return sum(np.dtype(kind).itemsize * count for _, kind, count in self.header)

    @property
    def bits_per_element(self) -> float:
        """Of the blocks: what rows of any length come near to."""
        return 8 * self.block_bytes / self.block_elements

    @property
    def is_float(self) -> bool:
        """True for plain floats, False for block-quantised formats."""
        return self.block_elements == 1


# Block layouts of the GGUF formats: the ggml block structs, in file order (llama.cpp,
# ggml/src/ggml-common.h, MIT: facts of the file format). "nibbles" counts bytes.
F32 = Format("F32", 1, 4, (("value", "f4", 1),))
F16 = Format("F16", 1, 2, (("value", "f2", 1),))
BF16 = Format("BF16", 1, 2, (("value", "bf16", 1),))
Q4_0 = Format("Q4_0", 32, 18, (("d", "f2", 1), ("nibbles", "u1", 16)))
Q4_1 = Format("Q4_1", 32, 20, (("d", "f2", 1), ("m", "f2", 1), ("nibbles", "u1", 16)))
Q5_0 = Format("Q5_0", 32, 22, (("d", "f2", 1), ("high_bits", "u4", 1), ("nibbles", "u1", 16)))
Q5_1 = Format(
    "Q5_1", 32, 24, (("d", "f2", 1), ("m", "f2", 1), ("high_bits", "u4", 1), ("nibbles", "u1", 16))
)
Q8_0 = Format("Q8_0", 32, 34, (("d", "f2", 1), ("quants", "i1", 32)))
Q4_K = Format(
    "Q4_K",
    256,
    144,
    (("d", "f2", 1), ("dmin", "f2", 1), ("scales", "u1", 12), ("nibbles", "u1", 128)),
)
Q5_K = Format(
    "Q5_K",
    256,
    176,
    (
        ("d", "f2", 1),
        ("dmin", "f2", 1),
        ("scales", "u1", 12),
        ("high_bits", "u1", 32),
        ("nibbles", "u1", 128),
    ),
)
Q6_K = Format(
    "Q6_K",
    256,
    210,
    (("low_nibbles", "u1", 128), ("high_bits", "u1", 64), ("scales", "i1", 16), ("d", "f2", 1)),
)
# Blocks of 32 4-bit floats with an 8-bit exponent (OCP microscaling formats, version 1.0).
MXFP4 = Format("MXFP4", 32, 17, (("exponent", "u1", 1), ("nibbles", "u1", 16)))

# What quantising on load makes; quant/integers.py says what they mean. No file holds them.
INT8 = Format("INT8", 32, 32, (("quants", "i1", 32),), (("d", "f4", 1),))
INT4 = Format(
    "INT4",
    32,
    18,
    (("scale", "u1", 1), ("minimum", "u1", 1), ("nibbles", "u1", 16)),
    (("d", "f4", 1), ("dmin", "f4", 1)),
)

# Integers in groups, as GPTQ, AWQ and compressed-tensors checkpoints have them, here rows first and
# ascending; quant/groups.py says what they mean.
I4G32 = Format("I4G32", 32, 22, (("d", "f4", 1), ("zero", "f2", 1), ("nibbles", "u1", 16)))
I4G128 = Format("I4G128", 128, 70, (("d", "f4", 1), ("zero", "f2", 1), ("nibbles", "u1", 64)))
I8G32 = Format("I8G32", 32, 38, (("d", "f4", 1), ("zero", "f2", 1), ("quants", "i1", 32)))
# 4-bit floats with a scale for each 16, which a factor of the row multiplies and a divisor divides
# (of a tensor with one float, the same for each row). quant/fp4.py says what they mean.
NVFP4 = Format(
    "NVFP4",
    32,
    20,
    (("scale", "f2", 2), ("nibbles", "u1", 16)),
    (("factor", "f4", 1), ("divisor", "f4", 1)),
)

# 8-bit floats with a scale per row (of a tensor with one scale, the same for each), or per 128
# elements of a row (of a tensor scaled in blocks of 128 x 128, the same for 128 rows); and the
# 4-bit codebooks of bitsandbytes. quant/small_floats.py says what they mean.
FP8 = Format("FP8", 32, 32, (("values", "u1", 32),), (("scale", "f4", 1),))
FP8_128 = Format("FP8_128", 128, 132, (("scale", "f4", 1), ("values", "u1", 128)))
NF4 = Format("NF4", 64, 36, (("absmax", "f4", 1), ("nibbles", "u1", 32)))
FP4 = Format("FP4", NF4.block_elements, NF4.block_bytes, NF4.layout)
# Quantiles of a normal distribution: QLoRA (Dettmers et al., 2023), appendix E.
NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# 4-bit floats (a sign, 2 bits of exponent, 1 of significand) in bitsandbytes' order.
_FP4_MAGNITUDES = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4_CODEBOOK = _FP4_MAGNITUDES + tuple(-x for x in _FP4_MAGNITUDES)
CODEBOOKS: Mapping[str, tuple[float, ...]] = {"NF4": NF4_CODEBOOK, "FP4": FP4_CODEBOOK}

FILE_FORMATS: Mapping[str, Format] = {
    f.name: f for f in (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, MXFP4)
}
FORMATS: Mapping[str, Format] = {
    **FILE_FORMATS,
    **{f.name: f for f in (INT8, INT4, I4G32, I4G128, I8G32, NVFP4, FP8, FP8_128, NF4, FP4)},
}
# Codes of floats, made to be multiplied as the 16 bits that they stand for: results over them are
# rounded to the checkpoint's own dtype, where those over integers stay float32.
SMALL_FLOATS: Mapping[str, Format] = {f.name: f for f in (FP8, FP8_128, NF4, FP4)}


class WeightTooLarge(ValueError):
    """A weight that cannot be quantised: NaN, infinity, or 2^120 and more. `name` is the tensor."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, eq=False)
class RawWeight:
    """One tensor as its checkpoint holds it.

    `shape` is row-major, rows first: a linear layer is [out_features, in_features], a norm [n].
    `buffers` maps a part's name to its bytes (uint8, 1-D, C-contiguous, usually a view of the
    mapped file; never copied before `pack`). The part "data" has the rows of the format, or `make`
    makes them of the others: make(start, stop) gives the bytes of rows [start, stop) anew, each
    time that `data` is asked for. `name` is the checkpoint's own name, for messages. `pack_as`: the
    format that the backend shall quantise it to as it packs, None for its own. `columns`: column k
    of the rows multiplies column columns[k] of a linear layer's input (int32 [K]); None: column k.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    buffers: Mapping[str, np.ndarray]
    pack_as: Format | None = None
    columns: np.ndarray | None = None
    make: Callable[[int, int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.make is not None:
            return
        have = int(self.data.nbytes)
        if have != self.nbytes:
            raise ValueError(
                f"tensor {self.name!r}: {self.format.name} of shape {list(self.shape)} takes "
                f"{self.nbytes} bytes, its data has {have}"
            )

    @property
    def data(self) -> np.ndarray:
        if self.make is None:
            return self.buffers["data"]
        return self.make(0, self.num_rows if len(self.shape) > 1 else self.shape[0])

    def made(self) -> RawWeight:
        """The same weight with its rows as they are in `format`."""
        return self if self.make is None else replace(self, buffers={"data": self.data}, make=None)

    @property
    def is_as_stored(self) -> bool:
        """Whether a backend reads the checkpoint's own bytes."""
        return self.make is None and self.pack_as is None

    @property
    def packed_format(self) -> Format:
        """The format that a backend holds it in."""
        return self.pack_as or self.format

    @property
    def packed_nbytes(self) -> int:
        """Its bytes as rows of that format."""
        return self.num_rows * self.packed_format.row_bytes(self.shape[-1])

    @property
    def num_rows(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_bytes

    def rows(self, start: int, stop: int) -> RawWeight:
        """Rows [start, stop) of a 2-D weight (or elements of a 1-D float one), sharing its bytes.

        Errors: ValueError where the range does not lie within the weight.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(
                f"tensor {self.name!r} has {self.shape[0]} rows; "
                f"[{start}, {stop}) does not lie in it"
            )
        name, shape = f"{self.name}[{start}:{stop}]", (stop - start, *self.shape[1:])
        if self.make is not None:
            make = self.make
            return replace(
                self, name=name, shape=shape, make=lambda a, b: make(start + a, start + b)
            )
        step = self.nbytes // self.shape[0]
        data = self.data[start * step : stop * step]
        return replace(self, name=name, shape=shape, buffers={"data": data})


@dataclass(frozen=True, eq=False)
class WeightGroup:
    """Row ranges that one operation multiplies together, each with its own format (fused q/k/v)."""

    parts: tuple[RawWeight, ...]

    def __post_init__(self) -> None:
        order = self.parts[0].columns
        if any(not _same_order(p.columns, order) for p in self.parts):
            raise ValueError(
                "a weight group needs one order of columns: "
                + ", ".join(p.name for p in self.parts)
            )
        if len({p.shape[1:] for p in self.parts}) != 1:
            raise ValueError(
                "a weight group needs one row length: "
                + ", ".join(f"{p.name} {list(p.shape)}" for p in self.parts)
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    def split(self, count: int) -> tuple[WeightGroup, ...]:
        """`count` groups of equally many rows, in order: the experts of a mixture.

        Errors: ValueError where the rows are no multiple of `count`.
        """
        size, rest = divmod(self.shape[0], count)
        if rest:
            raise ValueError(f"{self.shape[0]} rows are not {count} equal groups")
        spans = list(zip(self.parts, self.row_starts, strict=True))
        groups = []
        for begin in range(0, self.shape[0], size):
            pieces = [
                part.rows(max(begin - start, 0), min(begin + size - start, part.shape[0]))
                for part, start in spans
                if start < begin + size and start + part.shape[0] > begin
            ]
            groups.append(WeightGroup(tuple(pieces)))
        return tuple(groups)

    @property
    def row_starts(self) -> tuple[int, ...]:
        starts, at = [], 0
        for part in self.parts:
            starts.append(at)
            at += part.shape[0]
        return tuple(starts)


def _same_order(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def mapping_of(data: np.ndarray) -> tuple[mmap.mmap, int] | None:
    """The mapped file that `data` is a view of and where in it `data` begins, or None."""
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap):
        return None
    first = np.frombuffer(base, np.uint8, 1).ctypes.data
    return base, data.ctypes.data - first


def release_pages(data: np.ndarray) -> None:
    """Let go of a mapped file's pages that lie wholly within `data`; they are read again if need
    be. Does nothing to what is no view of a map."""
    mapping = mapping_of(data)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    mapped, start = mapping
    page = mmap.PAGESIZE
    begin, end = -(-start // page) * page, (start + data.nbytes) // page * page
    if end > begin:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
