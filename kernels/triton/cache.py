"""The paged KV cache in device memory, in its logical order, and the bytes of a cache in codes.

Codes become floats by operations on bits and exactly, in units of 1 / unit(CODES): a conversion
from integers runs at a quarter of the rate or less, and one from e4m3 exists on few cards. So int8
and fp8 caches run wherever the kernels do. ops.kv_write says what they hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..backend import KV_CODES, KVSpec
from .numerics import TORCH_DTYPES


@dataclass(frozen=True, eq=False)
class KVCache:
    """data [num_blocks, layer, 2, kv head, slot in block, dim]: a head's block is contiguous.

    In codes (int8, fp8) data is bytes, and scales is fp32 [num_blocks, layer, 2, kv head, slot].
    """

    spec: KVSpec
    data: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def zeros(cls, spec: KVSpec, num_blocks: int, device: torch.device) -> KVCache:
        rows = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size)
        coded = spec.dtype in KV_CODES
        dtype = torch.int8 if coded else TORCH_DTYPES[spec.dtype]
        data = torch.zeros((*rows, spec.head_dim), dtype=dtype, device=device)
        return cls(spec, data, torch.zeros(rows, device=device) if coded else None)

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def block_stride(self) -> int:
        """Elements from one block to the next."""
        return self.data.stride(0)

    @property
    def scales_stride(self) -> int:
        """Scales from one block to the next."""
        return 0 if self.scales is None else self.scales.stride(0)

    @property
    def codes(self) -> str:
        """The kernels' CODES: one of KV_CODES, or nothing for a cache of floats."""
        return "" if self.scales is None else self.spec.dtype


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
