"""Weights in device memory: floats as they are, quantised ones in codes that a kernel reads well.

A quantised weight is codes, a scale for each row or each group of a row, and perhaps a minimum:
value = scale * number(code) + minimum, where a code of kind "u" stands for itself less a zero, one
of "e4m3" for an 8-bit float, one of "table" for an entry of the layout's table. Rows are
zero-padded to whole steps of the kernels.

4 bits: planar. An int16 word holds four codes, one of each of four groups that follow each other:
word r of a step has element r of group j in bits 4j .. 4j+3, so that each plane is one group and no
lane has to move. 8 bits: one code a byte; so are held the formats of 5 and 6 bits,
and 4-bit floats as twice their values, which are integers.

Scales and minimums are [group, row], fp16 where the format's are, fp32 where it multiplies two.
Act-order: columns stay in the order that the checkpoint groups them in, and `columns` says which
column of the input each one multiplies. A gate's rows and those of the layer beside it are held in
turns of PAIR, so that one program has both (`paired`).
Formats: as told by quant/, which this has to give the same values as.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..cpu import _native
from ..cpu.quantise import as_packed
from ..weights import BF16, CODEBOOKS, F16, F32, Format, RawWeight

PAIR = 8  # rows of a gate, then as many of the other; the tensor core's threads hold rows 8 apart
GROUPS = 4  # of a row, in one step of the kernels, where they are small or in planes
_CHUNK = 1 << 15  # blocks unpacked at a time

FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class FloatMatrix:
    """data [N, K]. paired: see the top of this file."""

    data: torch.Tensor
    paired: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class Layout:
    """How a format's codes are held and multiplied.

    kind, bits, zero: of the codes. group: elements that are multiplied before a sum is scaled, or
    kept; per_row: one scale for the whole row, not one for each group. table: what codes of kind
    "table" stand for.
    """

    kind: str
    bits: int
    zero: int
    group: int
    minimum: bool
    scale_dtype: torch.dtype
    per_row: bool = False
    table: tuple[float, ...] = ()

    @property
    def step_groups(self) -> int:
        """Groups of one step of the kernels."""
        return GROUPS if self.bits == 4 or self.group < 64 else 1

    def groups(self, K: int) -> int:
        """Groups of a row, in whole steps."""
        return -(-K // (self.step_groups * self.group)) * self.step_groups

    def width(self, K: int) -> int:
        """Elements of a row, in whole steps."""
        return self.groups(K) * self.group

    def row_bytes(self, K: int) -> int:
        """Bytes of one packed row: codes, scales and minimums."""
        fields = (2 if self.minimum else 1) * (1 if self.per_row else self.groups(K))
        return self.width(K) * self.bits // 8 + fields * self.scale_dtype.itemsize

    @property
    def has_long_planes(self) -> bool:
        """More than 32 codes of 4 bits in a group, and so in a plane."""
        return self.bits == 4 and self.group > 32

    def multiplies(self, activations: str) -> bool:
        """Whether kernels multiply these codes by "int8" or "fp8" activations."""
        if activations == "int8":
            return self.kind == "u" and self.group >= 32  # the depth of the instruction
        return activations == "fp8" and self.kind == "e4m3"


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout("u", 4, 8, 32, False, torch.float16),
    "Q4_1": Layout("u", 4, 0, 32, True, torch.float16),
    "Q5_0": Layout("u", 8, 16, 32, False, torch.float16),
    "Q5_1": Layout("u", 8, 0, 32, True, torch.float16),
    "Q8_0": Layout("u", 8, 128, 32, False, torch.float16),
    "Q4_K": Layout("u", 4, 0, 32, True, torch.float32),
    "Q5_K": Layout("u", 8, 0, 32, True, torch.float32),
    "Q6_K": Layout("u", 8, 32, 16, False, torch.float32),
    "INT8": Layout("u", 8, 128, 64, False, torch.float32, per_row=True),
    "INT4": Layout("u", 4, 0, 32, True, torch.float32),
    "I4G32": Layout("u", 4, 8, 32, True, torch.float32),
    "I4G128": Layout("u", 4, 8, 64, True, torch.float32),
    "I8G32": Layout("u", 8, 128, 32, True, torch.float32),
    "MXFP4": Layout("u", 8, 12, 32, False, torch.float32),
    "NVFP4": Layout("u", 8, 12, 16, False, torch.float32),
    "FP8": Layout("e4m3", 8, 0, 128, False, torch.float32, per_row=True),
    "FP8_128": Layout("e4m3", 8, 0, 128, False, torch.float32),
    **{
        name: Layout("table", 4, 0, 64, False, torch.float32, table=table)
        for name, table in CODEBOOKS.items()
    },
}


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A weight [N, K] in codes; see the top of this file."""

    shape: tuple[int, int]
    layout: Layout
    codes: torch.Tensor  # 4 bits: int16 [N, padded K / 4]; 8 bits: uint8 [N, padded K]
    scale: torch.Tensor  # [groups or 1, N]
    minimum: torch.Tensor | None  # [groups, N]
    activations: str = ""  # that multiply it: "int8" or "fp8"; the layer's input itself where ""
    columns: torch.Tensor | None = None  # int32 [K]
    paired: bool = False

    @property
    def nbytes(self) -> int:
        more = sum(t.nbytes for t in (self.minimum, self.columns) if t is not None)
        return self.codes.nbytes + self.scale.nbytes + more


Matrix = FloatMatrix | QuantisedMatrix


def alike(parts: Sequence[RawWeight]) -> bool:
    """Whether parts can be one matrix. Errors: ValueError for a format without a kernel."""
    orders = {None if p.columns is None else p.columns.tobytes() for p in parts}
    return len(orders) == 1 and len({form(p.packed_format) for p in parts}) == 1


def form(fmt: Format) -> object:
    """What the formats of one matrix need to have in common. Errors: ValueError: no kernel."""
    if fmt in FLOATS:
        return fmt
    if fmt.name not in LAYOUTS:
        known = ", ".join([*(f.name for f in FLOATS), *LAYOUTS])
        raise ValueError(
            f"format {fmt.name} has no kernel in the Triton backend; it has {known}. "
            "device='cpu' or another file of the model may serve"
        )
    return LAYOUTS[fmt.name]


def packed_bytes(weight: RawWeight) -> int:
    """Device memory of a 2-D weight. Errors: ValueError for a format without a kernel."""
    fmt = weight.packed_format
    form(fmt)
    if fmt in FLOATS:
        return weight.nbytes
    return weight.shape[0] * LAYOUTS[fmt.name].row_bytes(weight.shape[1])


def pack(parts: list[RawWeight], device: torch.device, activations: str = "") -> Matrix:
    """Parts of one form, stacked by rows, in device memory; quantised before where they ask for it.

    activations: "int8" or "fp8" for kernels that take them so. Errors: WeightTooLarge; ValueError
    for a NaN among FP8's codes.
    """
    num_rows, K = sum(p.shape[0] for p in parts), parts[0].shape[1]
    fmt = parts[0].packed_format
    if fmt in FLOATS:
        data = torch.empty((num_rows, K), dtype=FLOATS[fmt], device=device)
        start = 0
        for part in parts:
            rows = _bytes(part).view(data.dtype).view(part.shape)
            data[start : start + part.shape[0]] = rows.to(device)
            start += part.shape[0]
        return FloatMatrix(data)
    layout = LAYOUTS[fmt.name]
    width, four = layout.width(K), layout.bits == 4
    codes = torch.zeros(
        (num_rows, width // 4 if four else width),
        dtype=torch.int16 if four else torch.uint8,
        device=device,
    )
    groups = 1 if layout.per_row else layout.groups(K)
    scale = torch.zeros((groups, num_rows), dtype=layout.scale_dtype, device=device)
    minimum = torch.zeros_like(scale) if layout.minimum else None
    start = 0
    for asked in parts:
        part = as_packed(asked, _native.usable_cores())
        step = max(1, _CHUNK * part.format.block_elements // K)
        for first in range(0, part.shape[0], step):
            count = min(step, part.shape[0] - first)
            raw = _bytes(part.rows(first, first + count)).to(device)
            q, d, m = _unpack(raw.view(count, part.row_bytes), part.format)
            if layout.kind == "e4m3" and bool(((q & 0x7F) == 0x7F).any()):
                raise ValueError(f"weight {part.name!r} holds a NaN in {part.format.name}")
            here = slice(start + first, start + first + count)
            padded = torch.zeros((count, width), dtype=torch.uint8, device=device)
            padded[:, :K] = q.reshape(count, K)
            codes[here] = _planes(padded, layout.group) if four else padded
            d = d.reshape(count, -1).t()
            scale[: len(d), here] = d
            if minimum is not None and m is not None:
                minimum[: len(d), here] = m.reshape(count, -1).t()
        start += part.shape[0]
    takes = activations if layout.multiplies(activations) else ""
    order = parts[0].columns
    columns = None if order is None else torch.tensor(order, dtype=torch.int32, device=device)
    return QuantisedMatrix((num_rows, K), layout, codes, scale, minimum, takes, columns)


def paired(matrix: Matrix) -> Matrix:
    """A gate's rows, and behind them those of the layer beside it, in turns of PAIR."""
    if isinstance(matrix, FloatMatrix):
        return FloatMatrix(in_turns(matrix.data), paired=True)
    minimum = matrix.minimum
    return replace(
        matrix,
        codes=in_turns(matrix.codes),
        scale=in_turns(matrix.scale.t()).t().contiguous(),
        minimum=None if minimum is None else in_turns(minimum.t()).t().contiguous(),
        paired=True,
    )


def in_turns(rows: torch.Tensor) -> torch.Tensor:
    """Rows [2N, ...], the second N of which take turns with the first; N is whole turns."""
    turns = rows.reshape(2, -1, PAIR, rows.shape[-1]).transpose(0, 1)
    return turns.reshape(rows.shape).contiguous()


@functools.cache
def codebook(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A layout's table, in device memory."""
    return torch.tensor(table, device=device).to(dtype)


def vector(parts: tuple[RawWeight, ...], device: torch.device) -> torch.Tensor:
    """A 1-D weight, fp32. Errors: ValueError for one that is not of floats."""
    for part in parts:
        if part.format not in FLOATS:
            raise ValueError(
                f"weight {part.name!r} of one dimension is {part.format.name}; norms and biases "
                "are floats"
            )
    return torch.cat([_bytes(p).view(FLOATS[p.format]).float() for p in parts]).to(device)


def _bytes(part: RawWeight) -> torch.Tensor:
    """The part's bytes; a copy, since a file's pages are mapped for reading alone."""
    return torch.from_numpy(part.data.copy())


def _planes(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Codes uint8 [rows, K] -> int16 words [rows, K / 4], a group to each plane."""
    four = codes.view(codes.shape[0], -1, GROUPS, group).to(torch.int32)
    shift = torch.arange(0, 16, 4, dtype=torch.int32, device=codes.device)[:, None]
    return (four << shift).sum(2).to(torch.int16).view(codes.shape[0], -1)


# Each takes blocks uint8 [n, block_bytes] and gives codes uint8 [n, elements], scales and minimums
# [n, groups] (minimums None where the format has none). Those of formats whose rows have a header
# take the headers uint8 [rows, header_bytes] as well, and give scales [rows, groups].
_Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _unpack(rows: torch.Tensor, fmt: Format) -> _Unpacked:
    """Rows uint8 [n, row bytes]."""
    header = rows[:, : fmt.header_bytes]
    blocks = rows[:, fmt.header_bytes :].reshape(-1, fmt.block_bytes)
    if fmt.header:
        return _UNPACK_ROWS[fmt.name](blocks, header)
    return _UNPACK[fmt.name](blocks)


def _q4_0(b: torch.Tensor) -> _Unpacked:
    return _nibbles(b[:, 2:18], 16), _half(b[:, 0:2]), None


def _q4_1(b: torch.Tensor) -> _Unpacked:
    return _nibbles(b[:, 4:20], 16), _half(b[:, 0:2]), _half(b[:, 2:4])


def _q5_0(b: torch.Tensor) -> _Unpacked:
    return _five_bits(b[:, 6:22], b[:, 2:6]), _half(b[:, 0:2]), None


def _q5_1(b: torch.Tensor) -> _Unpacked:
    return _five_bits(b[:, 8:24], b[:, 4:8]), _half(b[:, 0:2]), _half(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> _Unpacked:
    return b[:, 2:34] ^ 0x80, _half(b[:, 0:2]), None


def _q4_k(b: torch.Tensor) -> _Unpacked:
    return _nibbles(b[:, 16:144], 32), *_six_bit_scales(b)


def _q5_k(b: torch.Tensor) -> _Unpacked:
    group = torch.arange(8, dtype=torch.uint8, device=b.device)[:, None]
    high = (b[:, None, 16:48] >> group) & 1
    return _nibbles(b[:, 48:176], 32) | (high << 4).reshape(len(b), -1), *_six_bit_scales(b)


def _q6_k(b: torch.Tensor) -> _Unpacked:
    low = _nibbles(b[:, 0:128], 64)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 3
    scale = _half(b[:, 208:210]).float() * b[:, 192:208].contiguous().view(torch.int8).float()
    return low | (high << 4).reshape(len(b), -1), scale, None


def _int8(b: torch.Tensor, header: torch.Tensor) -> _Unpacked:
    return b ^ 0x80, _single(header), None


def _int4(b: torch.Tensor, header: torch.Tensor) -> _Unpacked:
    fields = b[:, :2].reshape(len(header), -1, 2).float()
    scale, least = (_single(header)[:, None, :] * fields).unbind(2)
    return _nibbles(b[:, 2:18], 16), scale, -least


def _i4g32(b: torch.Tensor) -> _Unpacked:
    return _pairs(b[:, 6:22]), *_zero(b)


def _i4g128(b: torch.Tensor) -> _Unpacked:
    scale, minimum = _zero(b)
    return _pairs(b[:, 6:70]), scale.repeat(1, 2), minimum.repeat(1, 2)


def _i8g32(b: torch.Tensor) -> _Unpacked:
    return b[:, 6:38] ^ 0x80, *_zero(b)


def _zero(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and minimums made of them and the zero points."""
    scale = _single(b[:, 0:4])
    return scale, -(scale * _half(b[:, 4:6]).float())


def _mxfp4(b: torch.Tensor) -> _Unpacked:
    code = b[:, 0:1].to(torch.int32)
    bits = torch.where(code < 2, 0x00200000 << (code & 1), (code - 1).clamp(min=0) << 23)
    return _doubled(_nibbles(b[:, 1:17], 16)), bits.view(torch.float32), None


def _nvfp4(b: torch.Tensor, header: torch.Tensor) -> _Unpacked:
    by = _single(header)
    scale = _half(b[:, :4]).float().reshape(len(header), -1) * by[:, :1] / by[:, 1:]
    return _doubled(_pairs(b[:, 4:20])), scale, None


def _doubled(codes: torch.Tensor) -> torch.Tensor:
    """Twice the value of each 4-bit float, and 12."""
    units = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0]
    return torch.tensor(units, dtype=torch.uint8, device=codes.device)[codes.int()]


def _fp8(b: torch.Tensor, header: torch.Tensor) -> _Unpacked:
    return b, _single(header), None


def _fp8_128(b: torch.Tensor) -> _Unpacked:
    return b[:, 4:132], _single(b[:, 0:4]), None


def _codes(b: torch.Tensor) -> _Unpacked:
    pairs = torch.stack([b[:, 4:36] >> 4, b[:, 4:36] & 0x0F], dim=2)
    return pairs.reshape(len(b), 64), _single(b[:, 0:4]), None


_UNPACK_ROWS: dict[str, Callable[[torch.Tensor, torch.Tensor], _Unpacked]] = {
    "INT8": _int8,
    "INT4": _int4,
    "NVFP4": _nvfp4,
    "FP8": _fp8,
}
_UNPACK: dict[str, Callable[[torch.Tensor], _Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "I4G32": _i4g32,
    "I4G128": _i4g128,
    "I8G32": _i8g32,
    "MXFP4": _mxfp4,
    "FP8_128": _fp8_128,
    **dict.fromkeys(CODEBOOKS, _codes),
}


def _half(b: torch.Tensor) -> torch.Tensor:
    return _packed(b).view(torch.float16)


def _single(b: torch.Tensor) -> torch.Tensor:
    return _packed(b).view(torch.float32)


def _packed(b: torch.Tensor) -> torch.Tensor:
    """A copy without gaps; `contiguous` keeps the stride of a single row."""
    return b.clone(memory_format=torch.contiguous_format)


def _pairs(b: torch.Tensor) -> torch.Tensor:
    """Of each byte the low nibble, then the high one."""
    return torch.stack([b & 0x0F, b >> 4], dim=2).reshape(len(b), -1)


def _nibbles(b: torch.Tensor, run: int) -> torch.Tensor:
    """Per run of bytes, their low nibbles, then their high ones."""
    runs = b.reshape(len(b), -1, 1, run)
    return torch.cat([runs & 0x0F, runs >> 4], dim=2).reshape(len(b), -1)


def _five_bits(nibbles: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bit j of the four bytes `high` is the fifth bit of element j."""
    bit = torch.arange(8, dtype=torch.uint8, device=high.device)
    bits = ((high[:, :, None] >> bit) & 1).reshape(len(high), -1)
    return _nibbles(nibbles, 16) | (bits << 4)


def _six_bit_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K and Q5_K: d * scale and -(dmin * min) of 8 groups, from 12 bytes of 6-bit numbers."""
    s = b[:, 4:16]
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=1)
    least = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], dim=1)
    d, dmin = _half(b[:, 0:2]).float(), _half(b[:, 2:4]).float()
    return d * scale.float(), -(dmin * least.float())
