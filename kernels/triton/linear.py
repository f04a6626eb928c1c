"""linear: y = x W^T + bias, its result rounded once; then, where fused, an addition or a gate.

The product is taken transposed, y^T = W x^T: the weight's rows fill the tensor core's fixed side
(64 to a warpgroup) and tokens its free one, so that one token and a thousand go through one family
of instructions. K is walked in steps fixed by the weight alone and never split (law 2). Tokens come
in tiles of TOKENS[i]; a tile's width changes no bit of a token's result.

Quantised weights stay in their own bits (packing: quantised.py). The numbers that codes stand for
are multiplied exactly, group by group or over the whole row, and the scale is applied to the fp32
sum: what is multiplied is the dequantised value (but that NF4's table is rounded to the dtype of
x). A format with minimums takes the sums of x over groups from `sums_kernel`.

Weights and activations of one 16-bit dtype meet in the tensor core; where the two differ, or are
fp32, products are fp32. Where asked for, a quantised weight is multiplied by x in 8 bits instead,
integers or floats with one scale for each token (`activations_kernel`): sums of integers are exact
within a group, or a row that has one scale; sums of 8-bit floats go to fp32 every 128 elements,
the tensor core's own being of fewer bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from ..weights import NF4_CODEBOOK
from .numerics import OPTIONS, gated
from .quantised import LAYOUTS, FloatMatrix, Layout, Matrix, QuantisedMatrix
from .tuned import UNTUNED, Tuned

ROWS = 64  # of the weight, in one program: the height of a warpgroup's instruction
TOKENS = (16, 32, 64, 128)  # widths of a tile of tokens


TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def store(
    acc,
    row,
    token,
    num_rows,
    there,
    bias_ptr,
    other_ptr,
    out_ptr,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Bias, rounding, and what follows the layer; acc [ROWS, TOKENS] is transposed. there [TOKENS]:
    the tokens that are stored."""
    inside = (row < num_rows)[:, None] & there[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    if AFTER != "":
        at = token.to(tl.int64)[None, :] * other_stride + row[:, None]
        other = tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
        acc = acc.to(ROUND).to(tl.float32)
        if AFTER == "add":
            acc = other + acc
        else:
            acc = gated(other, acc, AFTER)
    out = out_ptr + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def float_product(
    x_ptr,
    w_ptr,
    row,
    token,
    K,
    x_stride,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W x^T [ROWS, TOKENS] of rows of W, in floats, and of x; WHOLE: K is whole steps."""
    k = tl.arange(0, STEP)
    w_at = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, STEP):
        if WHOLE:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start)
        else:
            inside = (k < K - start)[None, :]
            w = tl.load(w_at + start, mask=inside, other=0.0)
            x = tl.load(x_at + start, mask=inside, other=0.0)
        acc = tl.dot(w.to(PRODUCT), tl.trans(x.to(PRODUCT)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def float_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    num_rows,
    num_tokens,
    K,
    x_stride,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W [num_rows, K] in floats."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows and tokens past the end repeat the last one, and are not stored.
    acc = float_product(
        x_ptr,
        w_ptr,
        tl.minimum(row, num_rows - 1),
        tl.minimum(token, num_tokens - 1),
        K,
        x_stride,
        PRODUCT,
        ROWS,
        TOKENS,
        STEP,
        WHOLE,
    )
    store(
        acc,
        row,
        token,
        num_rows,
        token < num_tokens,
        bias_ptr,
        other_ptr,
        out_ptr,
        other_stride,
        out_stride,
        HAS_BIAS,
        AFTER,
        ROUND,
    )


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
    if KIND == "nf4":
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
    row,
    token,
    all_rows,
    K,
    words,
    x_stride,
    scratch_stride,
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
    WHOLE: tl.constexpr,
):
    """W x^T [ROWS, TOKENS] of rows of W and of x: W in codes [all_rows, words], scales (and
    minimums) [groups, all_rows], or scales [all_rows].

    scratch: sums of x over groups; where PRODUCT is int8 or float8e4nv, and x whole steps of it,
    the scale of each token.
    """
    token = token.to(tl.int64)
    k = tl.arange(0, GROUP)
    code_at = codes_ptr + row.to(tl.int64)[:, None] * words + k[None, :]
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    INTEGERS: tl.constexpr = tl.int8 == PRODUCT
    FLOAT8: tl.constexpr = tl.float8e4nv == PRODUCT
    KEPT: tl.constexpr = tl.int32 if INTEGERS and PER_ROW else tl.float32
    acc = tl.zeros((ROWS, TOKENS), KEPT)
    for start in range(0, K, GROUPS * GROUP):
        if BITS == 4:
            word = tl.load(code_at + start // 4)
        for j in tl.static_range(GROUPS):
            if BITS == 8:
                word = tl.load(code_at + start + j * GROUP)
            w = factors(word, table_ptr, j, KIND, BITS, ZERO, PRODUCT)
            if WHOLE:
                x = tl.load(x_at + start + j * GROUP)
            else:
                x = tl.load(x_at + start + j * GROUP, mask=(k < K - start - j * GROUP)[None, :])
                x = tl.where((k < K - start - j * GROUP)[None, :], x, 0.0)
            x = tl.trans(x.to(PRODUCT, bitcast=FLOAT8))
            if PER_ROW and not FLOAT8:
                acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=KEPT)
            else:
                if INTEGERS:
                    # Below 2^22 in size: put into the significand of 1.5 * 2^23 it is exact.
                    part = tl.dot(w, x, out_dtype=tl.int32) + 0x4B400000
                    part = part.to(tl.float32, bitcast=True) - 12582912.0
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
                        sums = tl.load(scratch_ptr + token * scratch_stride + group)
                        acc = tl.fma(
                            tl.broadcast_to(least[:, None], (ROWS, TOKENS)),
                            tl.broadcast_to(sums[None, :], (ROWS, TOKENS)),
                            acc,
                        )
    if PER_ROW:
        acc = acc.to(tl.float32) * tl.load(scale_ptr + row)[:, None]
    if INTEGERS or FLOAT8:
        acc *= tl.load(scratch_ptr + token * scratch_stride)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def quantised_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    scratch_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    num_rows,
    num_tokens,
    K,
    words,
    x_stride,
    scratch_stride,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
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
    WHOLE: tl.constexpr,
):
    """W in codes of num_rows rows; see quantised_product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    acc = quantised_product(
        x_ptr,
        codes_ptr,
        scale_ptr,
        minimum_ptr,
        table_ptr,
        scratch_ptr,
        tl.minimum(row, num_rows - 1),
        tl.minimum(token, num_tokens - 1),
        num_rows,
        K,
        words,
        x_stride,
        scratch_stride,
        PRODUCT,
        ROWS,
        TOKENS,
        KIND,
        BITS,
        ZERO,
        GROUP,
        GROUPS,
        PER_ROW,
        HAS_MINIMUM,
        WHOLE,
    )
    store(
        acc,
        row,
        token,
        num_rows,
        token < num_tokens,
        bias_ptr,
        other_ptr,
        out_ptr,
        other_stride,
        out_stride,
        HAS_BIAS,
        AFTER,
        ROUND,
    )


@triton.jit
def sums_kernel(
    x_ptr, sums_ptr, K, num_groups, x_stride, sums_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of x over groups of GROUP, fp32, 0 past K; BLOCK groups of one token."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + token * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(sums_ptr + token * sums_stride + group, tl.sum(x, 1), mask=group < num_groups)


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
def activations_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    K,
    width,
    x_stride,
    codes_stride,
    scratch_stride,
    TO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of x in 8 bits: code = nearest(x * (most / largest)), 0 from K to width; its scale
    largest / most. A row of zeros, or below 2^-100, becomes zeros; the
    scale of one that holds a NaN or an infinity is NaN."""
    MOST: tl.constexpr = 127.0 if TO == "int8" else 448.0
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        inside = at < K - start
        x = tl.load(x_ptr + token * x_stride + start + at, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        wrong += x * 0.0
    most = tl.max(largest, 0)
    seen = most >= 2.0**-100
    up = tl.where(seen, tl.div_rn(MOST, tl.where(seen, most, 1.0)), 0.0)
    scale = tl.where(seen, tl.div_rn(most, MOST), 0.0) + tl.sum(wrong, 0)
    tl.store(scale_ptr + token * scratch_stride, scale)
    for start in range(0, width, BLOCK):
        inside = at < K - start
        x = tl.load(x_ptr + token * x_stride + start + at, mask=inside, other=0.0).to(tl.float32)
        # Rounding may have made the product a little more than the most.
        x = tl.minimum(tl.maximum(x * up, -MOST), MOST)
        code = nearest_int8(x) if TO == "int8" else nearest_e4m3(x)
        tl.store(codes_ptr + token * codes_stride + start + at, code, mask=at < width - start)


SUMS_BLOCK = 16  # groups of one program of sums_kernel
ACTIVATIONS_BLOCK = 1024  # elements of a token at a time in activations_kernel
_ALIGNED = 32  # fp32 columns of scratch


def most_tokens(amd: bool) -> int:
    """The widest tile; AMD's 64 KB of shared memory hold half of what NVIDIA's cards do."""
    return TOKENS[-2] if amd else TOKENS[-1]


def tokens_of(num_tokens: int, weight: Matrix) -> int:
    """Width of the tile that serves so many tokens.

    A step over planes of more than 32 codes is long: its wider tiles run out of registers.
    """
    long = isinstance(weight, QuantisedMatrix) and weight.layout.has_long_planes
    most = TOKENS[1] if long else most_tokens(amd=torch.version.hip is not None)
    return min(next((width for width in TOKENS if num_tokens <= width), most), most)


def float_tile(K: int, tokens: int, product: torch.dtype) -> dict[str, Any]:
    """Constants of float_kernel that follow from shapes."""
    step = 32 if product == torch.float32 else 64
    return {"ROWS": ROWS, "TOKENS": tokens, "STEP": step, "WHOLE": K % step == 0}


def float_options(product: torch.dtype) -> dict[str, Any]:
    """Launch options of float_kernel."""
    return OPTIONS | {"num_stages": 2 if product == torch.float32 else 4}


def quantised_tile(w: QuantisedMatrix, tokens: int) -> dict[str, Any]:
    """Constants of quantised_kernel that follow from the weight."""
    layout, K = w.layout, w.shape[1]
    return {
        "ROWS": ROWS,
        "TOKENS": tokens,
        "KIND": layout.kind,
        "BITS": layout.bits,
        "ZERO": layout.zero,
        "GROUP": layout.group,
        "GROUPS": layout.step_groups,
        "PER_ROW": layout.per_row,
        "HAS_MINIMUM": layout.minimum,
        "WHOLE": bool(w.activations) or layout.width(K) == K,
    }


def product_of(w: QuantisedMatrix, dtype: torch.dtype) -> Any:
    """What is multiplied where a layer's input has this dtype."""
    return {"int8": tl.int8, "fp8": tl.float8e4nv, "": TL[dtype]}[w.activations]


@functools.cache
def codebook(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What NF4's codes stand for."""
    return torch.tensor(NF4_CODEBOOK, device=device).to(dtype)


def quantised_options(w: QuantisedMatrix, tokens: int) -> dict[str, Any]:
    """Launch options of quantised_kernel; a wide tile is shared by two warpgroups.

    Three stages, or two where x of a step would not fit into shared memory three times.
    """
    step = w.layout.step_groups * w.layout.group
    stages = 2 if step > 128 and not w.activations else 3
    return OPTIONS | {"num_stages": stages, "num_warps": 8 if tokens == 128 else 4}


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Scratch:
    """Columns (fp32) of a token's scratch: sums of its groups, or its scale and its codes."""

    sums: int
    codes: int

    @classmethod
    def of(cls, layout: Layout, K: int, activations: str) -> Scratch:
        sums = layout.groups(K) if layout.minimum else 0
        return cls(sums, layout.width(K) // 4 if activations else 0)

    @property
    def code_column(self) -> int:
        return _aligned(1)

    @property
    def width(self) -> int:
        if self.codes:
            return self.code_column + _aligned(self.codes)
        return _aligned(self.sums)


def scratch_width(weight: Matrix) -> int:
    """Columns of scratch that a weight needs, 0 for none."""
    if isinstance(weight, FloatMatrix):
        return 0
    return Scratch.of(weight.layout, weight.shape[1], weight.activations).width


def most_scratch(K: int, activations: str) -> int:
    """The most that a quantised weight of rows of K may need."""
    return max(
        Scratch.of(layout, K, activations if layout.multiplies(activations) else "").width
        for layout in LAYOUTS.values()
    )


def launch(
    x: torch.Tensor,
    weight: Matrix,
    out: torch.Tensor,
    *,
    round_to: torch.dtype,
    bias: torch.Tensor | None = None,
    after: str = "",
    other: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    tuned: Tuned = UNTUNED,
) -> None:
    """out = x W^T + bias, then `after`: "add": other + that; a gate of ops.py: gate(other) * that.

    x [M, K], out and other [M, N], each with its own row stride; bias fp32 [N]. `round_to`: what
    the layer's result is rounded to before `after`. scratch: fp32 [at least M, at least
    scratch_width(W)]. tuned: options of this card, in place of the defaults.
    """
    num_tokens = x.shape[0]
    if not num_tokens:
        return
    num_rows, K = weight.shape
    dtype = x.dtype
    tokens = tokens_of(num_tokens, weight)
    other = out if other is None else other
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_tokens, tokens))
    shared = {
        "HAS_BIAS": bias is not None,
        "AFTER": after,
        "ROUND": TL[round_to],
    }
    ends = (out if bias is None else bias, other, out, num_rows, num_tokens, K)
    strides = (other.stride(0), out.stride(0))
    if isinstance(weight, FloatMatrix):
        product = float_dtype(x, weight)
        float_kernel[grid](
            x,
            weight.data,
            *ends,
            x.stride(0),
            *strides,
            PRODUCT=TL[product],
            **shared,
            **float_tile(K, tokens, product),
            **(float_options(product) | tuned.options(weight, dtype, tokens)),
        )
        return
    scratch = out if scratch is None else scratch
    x = prepare(x, weight, scratch)
    quantised_kernel[grid](
        x,
        *tables(weight, dtype),
        scratch,
        *ends,
        weight.codes.shape[1],
        x.stride(0),
        scratch.stride(0),
        *strides,
        PRODUCT=product_of(weight, dtype),
        **shared,
        **quantised_tile(weight, tokens),
        **(quantised_options(weight, tokens) | tuned.options(weight, dtype, tokens)),
    )


def float_dtype(x: torch.Tensor, weight: FloatMatrix) -> torch.dtype:
    """What x and a weight in floats are multiplied as."""
    return x.dtype if x.dtype == weight.data.dtype else torch.float32


def tables(weight: QuantisedMatrix, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Codes, scales, minimums and codebook, for x of `dtype`; what the format lacks is not read."""
    minimum = weight.scale if weight.minimum is None else weight.minimum
    nf4 = weight.layout.kind == "nf4"
    book = codebook(dtype, weight.codes.device) if nf4 else weight.scale
    return weight.codes, weight.scale, minimum, book


def prepare(x: torch.Tensor, weight: QuantisedMatrix, scratch: torch.Tensor) -> torch.Tensor:
    """What is multiplied in place of x [M, K]; beside it in the scratch, scales or sums of x."""
    num_tokens, K = x.shape
    plan = Scratch.of(weight.layout, K, weight.activations)
    if weight.activations:
        return _in_8_bits(x, weight, scratch, plan)
    if plan.sums:
        sums_kernel[(num_tokens, triton.cdiv(plan.sums, SUMS_BLOCK))](
            x,
            scratch,
            K,
            plan.sums,
            x.stride(0),
            scratch.stride(0),
            GROUP=weight.layout.group,
            BLOCK=SUMS_BLOCK,
            **OPTIONS,
        )
    return x


def _in_8_bits(
    x: torch.Tensor, weight: QuantisedMatrix, scratch: torch.Tensor, plan: Scratch
) -> torch.Tensor:
    """x as codes in the scratch, its scales and sums beside them."""
    num_tokens, K = x.shape
    kind = torch.int8 if weight.activations == "int8" else torch.uint8
    codes = scratch.view(kind)[:num_tokens, 4 * plan.code_column :]
    activations_kernel[(num_tokens,)](
        x,
        codes,
        scratch,
        K,
        4 * plan.codes,
        x.stride(0),
        codes.stride(0),
        scratch.stride(0),
        TO=weight.activations,
        BLOCK=ACTIVATIONS_BLOCK,
        **OPTIONS,
    )
    return codes
