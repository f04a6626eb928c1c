"""Weights in device memory: floats as they are, quantised ones in codes that a kernel reads well.

A quantised weight is codes, a scale for each group of a row, and perhaps a minimum:
value = scale * (code - zero) + minimum. Rows are zero-padded to whole steps of four groups.

4 bits: planar. An int16 word holds four codes, one of each of four groups that follow each other:
word r of a step has element r of group j in bits 4j .. 4j+3, so that each plane is one group and no
lane has to move. 8 bits: one code a byte; so are held the formats of 5 and 6 bits.

Scales and minimums are [group, row], fp16 where the format's are, fp32 where it multiplies two.
Formats: as told by quant/gguf.py, which this has to give the same values as.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..weights import BF16, F16, F32, Format, RawWeight

GROUPS = 4  # of a row, in one step of the kernels
_CHUNK = 1 << 15  # blocks unpacked at a time

FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class FloatMatrix:
    """data [N, K]."""

    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class Layout:
    """How a format's codes are held: bits of each, its zero, elements of a group, its fields."""

    bits: int
    zero: int
    group: int
    minimum: bool
    scale_dtype: torch.dtype

    def row_bytes(self, K: int) -> int:
        """Bytes of one packed row: codes, scales and minimums."""
        groups = -(-K // (GROUPS * self.group)) * GROUPS
        fields = 2 if self.minimum else 1
        return groups * (self.group * self.bits // 8 + fields * self.scale_dtype.itemsize)


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(4, 8, 32, False, torch.float16),
    "Q4_1": Layout(4, 0, 32, True, torch.float16),
    "Q5_0": Layout(8, 16, 32, False, torch.float16),
    "Q5_1": Layout(8, 0, 32, True, torch.float16),
    "Q8_0": Layout(8, 128, 32, False, torch.float16),
    "Q4_K": Layout(4, 0, 32, True, torch.float32),
    "Q5_K": Layout(8, 0, 32, True, torch.float32),
    "Q6_K": Layout(8, 32, 16, False, torch.float32),
}


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A weight [N, K] in codes; see the top of this file."""

    shape: tuple[int, int]
    layout: Layout
    codes: torch.Tensor  # 4 bits: int16 [N, padded K / 4]; 8 bits: uint8 [N, padded K]
    scale: torch.Tensor  # [groups, N]
    minimum: torch.Tensor | None  # [groups, N]

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def zero(self) -> int:
        return self.layout.zero

    @property
    def group(self) -> int:
        return self.layout.group

    @property
    def nbytes(self) -> int:
        minimum = 0 if self.minimum is None else self.minimum.nbytes
        return self.codes.nbytes + self.scale.nbytes + minimum


Matrix = FloatMatrix | QuantisedMatrix


def form(fmt: Format) -> object:
    """What two weights need to have in common to be one matrix. Errors: ValueError: no kernel."""
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
    form(weight.format)
    if weight.format in FLOATS:
        return weight.nbytes
    return weight.shape[0] * LAYOUTS[weight.format.name].row_bytes(weight.shape[1])


def pack(parts: list[RawWeight], device: torch.device) -> Matrix:
    """Parts of one form, stacked by rows, in device memory."""
    num_rows, K = sum(p.shape[0] for p in parts), parts[0].shape[1]
    if parts[0].format in FLOATS:
        data = torch.empty((num_rows, K), dtype=FLOATS[parts[0].format], device=device)
        start = 0
        for part in parts:
            rows = _bytes(part).view(data.dtype).view(part.shape)
            data[start : start + part.shape[0]] = rows.to(device)
            start += part.shape[0]
        return FloatMatrix(data)
    layout = LAYOUTS[parts[0].format.name]
    groups = -(-K // (GROUPS * layout.group)) * GROUPS
    width = groups * layout.group
    four = layout.bits == 4
    codes = torch.zeros(
        (num_rows, width // 4 if four else width),
        dtype=torch.int16 if four else torch.uint8,
        device=device,
    )
    scale = torch.zeros((groups, num_rows), dtype=layout.scale_dtype, device=device)
    minimum = torch.zeros_like(scale) if layout.minimum else None
    start = 0
    for part in parts:
        step = max(1, _CHUNK * part.format.block_elements // K)
        for first in range(0, part.shape[0], step):
            count = min(step, part.shape[0] - first)
            raw = _bytes(part.rows(first, first + count)).to(device)
            q, d, m = _UNPACK[part.format.name](raw.view(-1, part.format.block_bytes))
            here = slice(start + first, start + first + count)
            padded = torch.zeros((count, width), dtype=torch.uint8, device=device)
            padded[:, :K] = q.reshape(count, K)
            codes[here] = _planes(padded, layout.group) if four else padded
            scale[: K // layout.group, here] = d.reshape(count, -1).t()
            if minimum is not None and m is not None:
                minimum[: K // layout.group, here] = m.reshape(count, -1).t()
        start += part.shape[0]
    return QuantisedMatrix((num_rows, K), layout, codes, scale, minimum)


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
# [n, groups] (minimums None where the format has none).
_Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


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


_UNPACK: dict[str, Callable[[torch.Tensor], _Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _half(b: torch.Tensor) -> torch.Tensor:
    return b.contiguous().view(torch.float16)


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
