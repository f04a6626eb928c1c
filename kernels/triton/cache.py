"""The paged KV cache in device memory, in its logical order, and the bytes of a cache in codes.

Codes become floats by operations on bits and exactly, those of 8 bits in units of 1 / unit(CODES):
a conversion from integers runs at a quarter of the rate or less, and one from e4m3 exists on few
cards. So caches in codes run wherever the kernels do. ops.kv_write says what they hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..backend import KV_CODES, KV_GROUP, KVSpec, kv_groups
from .numerics import TORCH_DTYPES


@dataclass(frozen=True, eq=False)
class Half:
    """The cached keys or values: data [num_blocks, layer, kv head, slot in block, row's elements].

    In codes data is bytes: of int8 and fp8 one a dim, and scales is fp32 [num_blocks, layer, kv
    head, slot, 1]. Of int4 byte i of a group's 16 has the codes of its dims i (the low half) and
    i + 16, and scales has the bits of bfloat16 (int16) [..., 2 * groups]: scales, then offsets.
    """

    codes: str  # the kernels' CODES: a dtype of codes, or nothing for floats
    data: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def zeros(cls, part: str, spec: KVSpec, num_blocks: int, device: torch.device) -> Half:
        slots = (num_blocks, spec.num_layers, spec.num_kv_heads, spec.block_size)

        def new(row: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((*slots, row), dtype=dtype, device=device)

        if part not in KV_CODES:
            return cls("", new(spec.head_dim, TORCH_DTYPES[part]), None)
        if part != "int4":
            return cls(part, new(spec.head_dim, torch.int8), new(1, torch.float32))
        groups = kv_groups(spec.head_dim)
        return cls(part, new(KV_GROUP // 2 * groups, torch.int8), new(2 * groups, torch.int16))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def decoded(self, head_dim: int) -> torch.Tensor:
        """What is read of it, fp64 [num_blocks, layer, kv head, slot, head_dim]; for checks."""
        if self.scales is None:
            return self.data.double()
        if self.codes != "int4":
            codes = self.data.view(torch.float8_e4m3fn) if self.codes == "fp8" else self.data
            return codes.double() * self.scales.double()
        groups = self.data.view(torch.uint8).unflatten(-1, (-1, KV_GROUP // 2))
        codes = torch.cat([groups & 15, groups >> 4], -1).double()
        scale, offset = self.scales.view(torch.bfloat16).double().chunk(2, -1)
        read = codes * scale[..., None] + offset[..., None]
        return read.flatten(-2)[..., :head_dim]


@dataclass(frozen=True, eq=False)
class KVCache:
    """The paged cache: a head's block of keys, and of values, is contiguous."""

    spec: KVSpec
    keys: Half
    values: Half

    @classmethod
    def zeros(cls, spec: KVSpec, num_blocks: int, device: torch.device) -> KVCache:
        return cls(spec, *(Half.zeros(part, spec, num_blocks, device) for part in spec.parts))

    @property
    def num_blocks(self) -> int:
        return self.keys.data.shape[0]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def codes(self) -> tuple[str, str]:
        """The kernels' K_CODES and V_CODES."""
        return self.keys.codes, self.values.codes

    @property
    def grouped(self) -> bool:
        """Whether keys or values have scales of groups of dims."""
        return "int4" in self.codes

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """What the kernels take of it: keys, their scales, values, theirs. What is absent is not
        read: any tensor stands for it."""
        halves = (self.keys, self.values)
        return tuple(x for h in halves for x in (h.data, h.data if h.scales is None else h.scales))

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether products with q of dtype can be of it: where it holds that, or codes."""
        return self.keys.codes != "" or self.keys.data.dtype == dtype


@triton.jit
def unit(CODES: tl.constexpr):
    """What a scale is multiplied by where codes are read with `decoded`."""
    return 64.0 if CODES == "int8" else 256.0


@triton.jit
def decoded(code, CODES: tl.constexpr, DTYPE: tl.constexpr):
    """Codes (int8) as floats of DTYPE divided by unit(CODES), exactly.

    int8: the seven low bits are put into the significand of 2^n, whose last place is 1/64, and
    2^n, or where the code is negative 2^n + 2, is subtracted. fp8: e4m3's bits in the places of
    DTYPE's, whose exponents are counted from another number; no case of zero or subnormals apart.
    """
    if CODES == "int8":
        if tl.float32 == DTYPE:
            bits = code.to(tl.int32)
            low = ((bits & 0x7F) | 0x48000000).to(tl.float32, bitcast=True)
            return low - ((bits & 0x80) | 0x48000000).to(tl.float32, bitcast=True)
        else:
            bits = code.to(tl.int16)
            power: tl.constexpr = 0x4C00 if tl.float16 == DTYPE else 0x4000
            low = ((bits & 0x7F) | power).to(DTYPE, bitcast=True)
            return low - ((bits & 0x80) | power).to(DTYPE, bitcast=True)
    else:
        bits = code.to(tl.int16)
        sign = (bits & 0x80) << 8
        if tl.bfloat16 == DTYPE:
            small = (sign | ((bits & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
            return small * tl.full((), 2.0**112, tl.bfloat16)
        else:
            return (sign | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def magnitude(x):
    """|x|, infinity where x is NaN: a maximum of such is of every element."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def factor_and_scale(most, CODES: tl.constexpr):
    """What multiplies a row whose largest magnitude is `most`, 0 where it has no codes; its scale.

    See ops.kv_write; `most` is fp32.
    """
    largest: tl.constexpr = 127.0 if CODES == "int8" else 448.0
    finite = most < float("inf")
    divisor = tl.where(most == 0.0, 1.0, most)
    factor = tl.div_rn(tl.full(most.shape, largest, tl.float32), divisor)
    usable = finite & (most > 0.0) & (factor < float("inf"))
    factor = tl.where(usable, factor, 0.0)
    scale = tl.div_rn(most, tl.full(most.shape, largest, tl.float32))
    return factor, tl.where(finite, scale, float("nan"))


@triton.jit
def encoded(x, factor, CODES: tl.constexpr):
    """x * factor, rounded to even, as codes (int8); zeros where the factor is 0."""
    x = tl.where(factor == 0.0, 0.0, x * factor)
    if CODES == "int8":
        # 2^23 * 1.5 has a last place of 1: the sum's low byte is the number's.
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        positive = bits & 0x7FFFFFFF
        normal = ((positive + 0x7FFFF + ((positive >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 steps are of 2^-9, the last place of 2^14.
        small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        return (sign | tl.where(positive < 0x3C800000, small, normal)).to(tl.int8)


@triton.jit
def row_of(CODES: tl.constexpr, D: tl.constexpr):
    """Elements of a slot's row of D dims."""
    if CODES == "int4":
        return (D + 31) // 32 * 16
    else:
        return D


@triton.jit
def scales_of(CODES: tl.constexpr, D: tl.constexpr):
    """Scales of a slot."""
    if CODES == "int4":
        return (D + 31) // 32 * 2
    else:
        return 1


@triton.jit
def _spread(x, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """x [ROWS, D_PAD / 32], or [ROWS, 1] of fewer dims, as [ROWS, D_PAD]."""
    if D_PAD <= 32:
        return tl.broadcast_to(x, (ROWS, D_PAD))
    else:
        each = tl.broadcast_to(x[:, :, None], (ROWS, D_PAD // 32, 32))
        return tl.reshape(each, (ROWS, D_PAD))


@triton.jit
def read(
    data_ptr,
    scales_ptr,
    row,
    exists,
    CODES: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Rows `row` [ROWS] of keys or values, zeros where they do not exist: what is multiplied, DTYPE
    [ROWS, D_PAD], and by what its products are multiplied afterwards, fp32 [ROWS], 1 of floats.

    Of int4 the values themselves are multiplied, rounded to DTYPE, and the factor is 1; where one
    of a row's groups is NaN the row is 0 and the factor NaN, which can be hidden.
    """
    d = tl.arange(0, D_PAD)
    inside = exists[:, None] & (d < D)[None, :]
    if CODES == "":
        at = data_ptr + row[:, None] * D + d[None, :]
        return tl.load(at, mask=inside, other=0.0).to(DTYPE), 1.0
    elif CODES == "int4":
        GROUPS: tl.constexpr = (D + 31) // 32
        element = d // 32 * 16 + d % 16
        at = data_ptr + row[:, None] * (16 * GROUPS) + element[None, :]
        code = tl.load(at, mask=inside, other=0).to(tl.int32) >> (d // 16 % 2 * 4)[None, :]
        # 2^23 has a last place of 1.
        code = ((code & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        g = tl.arange(0, (D_PAD + 31) // 32)
        at = scales_ptr + row[:, None] * (2 * GROUPS) + g[None, :]
        there = exists[:, None] & (g < GROUPS)[None, :]
        scale = _of_bits(tl.load(at, mask=there, other=0))
        offset = _of_bits(tl.load(at + GROUPS, mask=there, other=0))
        good = (
            tl.min(tl.where(scale == scale, 1.0, 0.0), 1) > 0.0
        )  # scale and offset are NaN at once
        x = tl.fma(code, _spread(scale, ROWS, D_PAD), _spread(offset, ROWS, D_PAD))
        if tl.float16 == DTYPE:  # an offset is rounded down
            x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        x = tl.where(inside & good[:, None], x, 0.0)
        return x.to(DTYPE), tl.where(good, 1.0, float("nan"))
    else:
        at = data_ptr + row[:, None] * D + d[None, :]
        code = tl.load(at, mask=inside, other=0)
        scale = tl.load(scales_ptr + row, mask=exists, other=0.0)
        return decoded(code, CODES, DTYPE), scale * unit(CODES)


@triton.jit
def _of_bits(x):
    """The bits of bfloat16 (int16) as fp32."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bfloat16(x, UP: tl.constexpr):
    """The bits (int32) of x as fp32, rounded to the bfloat16 that is not below (not above) it."""
    bits = x.to(tl.int32, bitcast=True)
    further = ((bits & 0xFFFF) != 0) & ((bits >= 0) == UP)  # away from zero
    return (bits & -65536) + further.to(tl.int32) * 65536


@triton.jit
def grouped(x, inside):
    """x fp32 [ROWS, 2, 16], the dims of groups, as int4: bytes [ROWS, 16], and the bits of the
    groups' scales and offsets, int16 [ROWS]. `inside`: which dims there are, as x or broadcast."""
    low = tl.min(tl.min(tl.where(inside, x, float("inf")), 2), 1)
    high = tl.max(tl.max(tl.where(inside, x, -float("inf")), 2), 1)
    most = tl.max(tl.max(tl.where(inside, magnitude(x), 0.0), 2), 1)
    finite = most < float("inf")
    offset_bits = _bfloat16(tl.where(finite, low, 0.0), False)
    offset = offset_bits.to(tl.float32, bitcast=True)
    span = tl.where(finite, high, 0.0) - offset
    finite = finite & (span < float("inf"))
    span = tl.where(finite, span, 0.0)
    scale_bits = _bfloat16(tl.div_rn(span, tl.full(span.shape, 15.0, tl.float32)), True)
    scale = scale_bits.to(tl.float32, bitcast=True)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    factor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor)
    usable = finite & (scale > 0.0) & (factor < float("inf"))
    usable = usable[:, None, None] & inside
    steps = tl.where(usable, (x - offset[:, None, None]) * factor[:, None, None], 0.0)
    # 2^23 * 1.5 has a last place of 1: the sum's low byte is the number's.
    code = (tl.minimum(steps, 15.0) + 12582912.0).to(tl.int32, bitcast=True) & 15
    half = tl.arange(0, 2)[None, :, None] * 4
    packed = tl.sum(code << half, 1).to(tl.int8)
    nan = tl.full(scale_bits.shape, 0x7FC0, tl.int32)
    scale_bits = tl.where(finite, scale_bits >> 16, nan)
    offset_bits = tl.where(finite, offset_bits >> 16, nan)
    return packed, scale_bits.to(tl.int16), offset_bits.to(tl.int16)
