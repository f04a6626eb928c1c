"""The loops of linear layers: W x^T over rows of W, in floats or in codes, and rows of x.

The product is taken transposed: the weight's rows fill the tensor core's fixed side (64 to a
warpgroup) and tokens its free one, so that one token and a thousand go through one family of
instructions. K is walked in steps fixed by the weight alone and never split (law 2). A tile's width
changes no bit of a token's result.

Codes become the numbers that they stand for exactly, group by group or over the whole row, and the
scale is applied to the fp32 sum: what is multiplied is the dequantised value (but that a table of
NF4's or FP4's is rounded to the dtype of x).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .rms_norm import normed
from .rounding import coded, magnitudes


@triton.jit
def rows_of(
    x_at,
    k,
    K,
    columns_ptr,
    norm_ptr,
    root,
    offset,
    ORDERED: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Elements k [STEP] of rows of x, whose beginnings are x_at [TOKENS, 1]; 0 from K on, where
    not WHOLE. ORDERED: element k is that of column columns[k]. NORM: of rms_norm(x), see there."""
    if ORDERED:
        at = tl.load(columns_ptr + k, mask=k < K, other=0)
    else:
        at = k
    if WHOLE:
        x = tl.load(x_at + at[None, :])
        if NORM:
            weight = tl.load(norm_ptr + at)
            x = normed(x, root[:, None], weight[None, :], offset, x.dtype)
    else:
        inside = (k < K)[None, :]
        x = tl.load(x_at + at[None, :], mask=inside, other=0)
        if NORM:
            weight = tl.load(norm_ptr + at, mask=k < K, other=0.0)
            x = normed(x, root[:, None], weight[None, :], offset, x.dtype)
            x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def largest(
    x_at,
    K,
    norm_ptr,
    root,
    offset,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Largest magnitudes [TOKENS] of rows of x, or of rms_norm(x), infinite where one is not
    finite; in any order, since a maximum has none."""
    at = tl.arange(0, BLOCK)
    most = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        x = rows_of(x_at, start + at, K, x_at, norm_ptr, root, offset, False, NORM, False)
        most = tl.maximum(most, magnitudes(x))
    return tl.max(most, 1)


@triton.jit
def float_product(
    x_ptr,
    w_ptr,
    columns_ptr,
    norm_ptr,
    row,
    token,
    root,
    K,
    x_stride,
    offset,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    ORDERED: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W x^T [ROWS, TOKENS] of rows of W, in floats, and of x; WHOLE: K is whole steps."""
    k = tl.arange(0, STEP)
    w_at = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, STEP):
        if WHOLE:
            w = tl.load(w_at + start)
        else:
            w = tl.load(w_at + start, mask=(k < K - start)[None, :], other=0.0)
        x = rows_of(x_at, start + k, K, columns_ptr, norm_ptr, root, offset, ORDERED, NORM, WHOLE)
        acc = tl.dot(w.to(PRODUCT), tl.trans(x.to(PRODUCT)), acc, input_precision="ieee")
    return acc


@triton.jit
def small_to_float(x):
    """int32 below 2^22 in size as floats, exactly, by the significand of 1.5 * 2^23."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def group_sums(x, PRODUCT: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Sums of x [GROUP, tokens] as [ROWS, tokens], every row alike: by products with 1, so in the
    order of the instruction that multiplies, whatever the layout of x among threads."""
    return tl.dot(tl.full((ROWS, GROUP), 1.0, PRODUCT), x, input_precision="ieee")


@triton.jit
def codes_to_float(word, PLANE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, DTYPE):
    """Codes minus ZERO as floats, exactly, without a conversion of integers.

    A code is put into the lowest bits of the significand of 2^n, and 2^n + ZERO is subtracted.
    word: 4 bits: int16 with 4 codes, of which PLANE is wanted; 8 bits: uint8.
    """
    if BITS == 4:
        code = (word >> (4 * PLANE)) & 0xF
        if tl.bfloat16 == DTYPE:
            return (code | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full((), 128 + ZERO, DTYPE)
        elif tl.float16 == DTYPE:
            return (code | 0x6400).to(tl.float16, bitcast=True) - tl.full((), 1024 + ZERO, DTYPE)
    else:
        code = word
    wide = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
    return wide.to(DTYPE)


@triton.jit
def e4m3_to_float(code, DTYPE):
    """Finite 8-bit floats (uint8) as wider ones, exactly.

    Sign, exponent and significand are put where DTYPE has its own: the value is then too small by
    a power of two, the difference of the exponents' biases. Subnormals come out right as well.
    """
    sign, rest = code & 0x80, code & 0x7F
    if tl.float16 == DTYPE:
        bits = (sign.to(tl.int16) << 8) | (rest.to(tl.int16) << 7)
        return bits.to(tl.float16, bitcast=True) * tl.full((), 2.0**8, DTYPE)
    elif tl.bfloat16 == DTYPE:
        bits = (sign.to(tl.int16) << 8) | (rest.to(tl.int16) << 4)
        return bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0**120, DTYPE)
    else:
        bits = (sign.to(tl.int32) << 24) | (rest.to(tl.int32) << 20)
        return bits.to(tl.float32, bitcast=True) * (2.0**120)


@triton.jit
def factors(
    word,
    table_ptr,
    PLANE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """What codes stand for, in the dtype that is multiplied."""
    if KIND == "table":
        return tl.load(table_ptr + ((word >> (4 * PLANE)) & 0xF))
    elif KIND == "e4m3":
        if tl.float8e4nv == PRODUCT:
            return word.to(tl.float8e4nv, bitcast=True)
        else:
            return e4m3_to_float(word, PRODUCT)
    elif tl.int8 == PRODUCT:
        if BITS == 4:
            return ((word >> (4 * PLANE)) & 0xF).to(tl.int8) - ZERO
        elif ZERO == 128:
            return (word ^ 0x80).to(tl.int8, bitcast=True)
        else:
            return word.to(tl.int8, bitcast=True) - ZERO
    else:
        return codes_to_float(word, PLANE, BITS, ZERO, PRODUCT)


@triton.jit
def quantised_product(
    x_ptr,
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    scratch_ptr,
    columns_ptr,
    norm_ptr,
    row,
    token,
    root,
    factor,
    token_scale,
    all_rows,
    K,
    words,
    x_stride,
    scratch_stride,
    offset,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    ORDERED: tl.constexpr,
    NORM: tl.constexpr,
    CODED: tl.constexpr,
    SUMMED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W x^T [ROWS, TOKENS] of rows of W and of x: W in codes [all_rows, words], scales (and
    minimums) [groups, all_rows], or scales [all_rows].

    scratch: sums of x over groups; where PRODUCT is int8 or float8e4nv, and x whole steps of it,
    the scale of each token, and sums of its codes SUMS columns behind. SUMMED: sums are made here.
    CODED ("int8" or "fp8"): so are the codes, by each token's factor and token_scale.
    """
    token = token.to(tl.int64)
    k = tl.arange(0, GROUP)
    code_at = codes_ptr + row.to(tl.int64)[:, None] * words + k[None, :]
    x_at = x_ptr + token[:, None] * x_stride
    INTEGERS: tl.constexpr = tl.int8 == PRODUCT
    FLOAT8: tl.constexpr = tl.float8e4nv == PRODUCT
    SUMS: tl.constexpr = 1 if INTEGERS else 0
    KEPT: tl.constexpr = tl.int32 if INTEGERS and PER_ROW else tl.float32
    acc = tl.zeros((ROWS, TOKENS), KEPT)
    for start in range(0, K, GROUPS * GROUP):
        if BITS == 4:
            word = tl.load(code_at + start // 4)
        for j in tl.static_range(GROUPS):
            if BITS == 8:
                word = tl.load(code_at + start + j * GROUP)
            w = factors(word, table_ptr, j, KIND, BITS, ZERO, PRODUCT)
            at = start + j * GROUP + k
            x = rows_of(x_at, at, K, columns_ptr, norm_ptr, root, offset, ORDERED, NORM, WHOLE)
            if CODED != "":
                x = coded(x, factor[:, None], CODED)
                if SUMMED:
                    sums = small_to_float(tl.sum(x.to(tl.int32), 1))[None, :]
            x = tl.trans(x.to(PRODUCT, bitcast=FLOAT8))
            if PER_ROW and not FLOAT8:
                acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=KEPT)
            else:
                if INTEGERS:
                    part = small_to_float(tl.dot(w, x, out_dtype=tl.int32))
                else:
                    part = tl.dot(w, x, input_precision="ieee")
                if PER_ROW:
                    acc += part
                else:
                    group = start // GROUP + j
                    scale = tl.load(scale_ptr + group * all_rows + row).to(tl.float32)
                    acc = tl.fma(part, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), acc)
                    if HAS_MINIMUM:
                        least = tl.load(minimum_ptr + group * all_rows + row).to(tl.float32)
                        if not SUMMED:
                            at = scratch_ptr + token * scratch_stride + SUMS + group
                            sums = tl.load(at)[None, :]
                        elif not INTEGERS:
                            sums = group_sums(x, PRODUCT, ROWS, GROUP)
                        acc = tl.fma(
                            tl.broadcast_to(least[:, None], (ROWS, TOKENS)),
                            tl.broadcast_to(sums, (ROWS, TOKENS)),
                            acc,
                        )
    if PER_ROW:
        acc = acc.to(tl.float32) * tl.load(scale_ptr + row)[:, None]
    if CODED != "":
        acc *= token_scale[None, :]
    elif INTEGERS or FLOAT8:
        acc *= tl.load(scratch_ptr + token * scratch_stride)[None, :]
    return acc
