"""Rows of x in 8 bits, integers or e4m3 floats, with one scale for each: the formulas, of which
every launch that quantises an input makes the same codes."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_int8(x):
    """Nearest integer, ties to even, of |x| <= 127: the rounding of a sum with 1.5 * 2^23."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def nearest_e4m3(x):
    """Nearest 8-bit float, ties to even, of |x| <= 448, as its code (uint8)."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a code counts steps of 2^-9, which is the last place of 2^14.
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (sign | tl.where(size < 0x3C800000, tiny, normal)).to(tl.uint8)


@triton.jit
def magnitudes(x):
    """|x| in fp32, infinity where x is NaN: a maximum of such is of every element."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def factor_and_scale(most, TO: tl.constexpr):
    """Of rows whose largest magnitudes are `most`: what multiplies them, and their scales. Rows of
    zeros, or below 2^-100, become zeros; the scale of one that is not finite is NaN."""
    largest: tl.constexpr = 127.0 if TO == "int8" else 448.0
    whole = tl.full(most.shape, largest, tl.float32)
    seen = most >= 2.0**-100
    factor = tl.where(seen, tl.div_rn(whole, tl.where(seen, most, 1.0)), 0.0)
    scale = tl.where(seen, tl.div_rn(most, whole), 0.0)
    return factor, tl.where(most < float("inf"), scale, float("nan"))


@triton.jit
def coded(x, factor, TO: tl.constexpr):
    """Codes of x: int8, or the bits of e4m3 (uint8); factor broadcasts."""
    largest: tl.constexpr = 127.0 if TO == "int8" else 448.0
    # Rounding may have made the product a little more than the most.
    x = tl.minimum(tl.maximum(x.to(tl.float32) * factor, -largest), largest)
    if TO == "int8":
        return nearest_int8(x)
    else:
        return nearest_e4m3(x)
