"""linear: y = x W^T + bias, its result rounded once; then, where fused, an addition or a gate.

The product is taken transposed, y^T = W x^T: the weight's rows fill the tensor core's fixed side
(64 to a warpgroup) and tokens its free one, so that one token and a thousand go through one family
of instructions. K is walked in steps fixed by the weight alone and never split (law 2). Tokens come
in tiles of TOKENS[i]; a tile's width changes no bit of a token's result.

Quantised weights stay in their own bits (packing: quantised.py). Each group of a row is multiplied
as integers, exactly, and its scale is applied to the fp32 sum: what is multiplied is the
dequantised value. A format with minimums takes the sums of x over groups from `sums_kernel`.

Weights and activations of one 16-bit dtype meet in the tensor core; where the two differ, or are
fp32, products are fp32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl

from .numerics import OPTIONS, gated
from .quantised import GROUPS, FloatMatrix, Matrix, QuantisedMatrix

ROWS = 64  # of the weight, in one program: the height of a warpgroup's instruction
TOKENS = (16, 32, 64, 128)  # widths of a tile of tokens


_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _store(
    acc,
    row,
    token,
    num_rows,
    num_tokens,
    bias_ptr,
    other_ptr,
    out_ptr,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Bias, rounding, and what follows the layer; acc [ROWS, TOKENS] is transposed."""
    inside = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
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
    """W [num_rows, K] in floats; WHOLE: K is whole steps."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows and tokens past the end repeat the last one, and are not stored.
    k = tl.arange(0, STEP)
    w_at = w_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
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
    _store(
        acc,
        row,
        token,
        num_rows,
        num_tokens,
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


@triton.jit(do_not_specialize=["num_tokens"])
def quantised_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    sums_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    num_rows,
    num_tokens,
    K,
    words,
    x_stride,
    sums_stride,
    other_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W in codes [num_rows, words], scales (and minimums) [groups, num_rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    safe_row = tl.minimum(row, num_rows - 1)
    safe_token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    k = tl.arange(0, GROUP)
    code_at = codes_ptr + safe_row.to(tl.int64)[:, None] * words + k[None, :]
    x_at = x_ptr + safe_token[:, None] * x_stride + k[None, :]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, GROUPS * GROUP):
        if BITS == 4:
            word = tl.load(code_at + start // 4)
        for j in tl.static_range(GROUPS):
            if BITS == 8:
                word = tl.load(code_at + start + j * GROUP)
            w = codes_to_float(word, j, BITS, ZERO, PRODUCT)
            if WHOLE:
                x = tl.load(x_at + start + j * GROUP)
            else:
                x = tl.load(x_at + start + j * GROUP, mask=(k < K - start - j * GROUP)[None, :])
                x = tl.where((k < K - start - j * GROUP)[None, :], x, 0.0)
            part = tl.dot(w, tl.trans(x.to(PRODUCT)), input_precision="ieee")
            group = start // GROUP + j
            scale = tl.load(scale_ptr + group * num_rows + safe_row).to(tl.float32)
            acc = tl.fma(part, tl.broadcast_to(scale[:, None], (ROWS, TOKENS)), acc)
            if HAS_MINIMUM:
                least = tl.load(minimum_ptr + group * num_rows + safe_row).to(tl.float32)
                sums = tl.load(sums_ptr + safe_token * sums_stride + group)
                acc = tl.fma(
                    tl.broadcast_to(least[:, None], (ROWS, TOKENS)),
                    tl.broadcast_to(sums[None, :], (ROWS, TOKENS)),
                    acc,
                )
    _store(
        acc,
        row,
        token,
        num_rows,
        num_tokens,
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


SUMS_BLOCK = 16  # groups of one program of sums_kernel


def most_tokens(amd: bool) -> int:
    """The widest tile; AMD's 64 KB of shared memory hold half of what NVIDIA's cards do."""
    return TOKENS[-2] if amd else TOKENS[-1]


def tokens_of(num_tokens: int) -> int:
    """Width of the tile that serves so many tokens."""
    most = most_tokens(amd=torch.version.hip is not None)
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
    return {
        "ROWS": ROWS,
        "TOKENS": tokens,
        "BITS": w.bits,
        "ZERO": w.zero,
        "GROUP": w.group,
        "GROUPS": GROUPS,
        "HAS_MINIMUM": w.minimum is not None,
        "WHOLE": w.shape[1] % (GROUPS * w.group) == 0,
    }


def quantised_options(tokens: int) -> dict[str, Any]:
    """Launch options of quantised_kernel; a wide tile is shared by two warpgroups."""
    return OPTIONS | {"num_stages": 3, "num_warps": 8 if tokens == 128 else 4}


def padded_groups(K: int) -> int:
    """Groups of 32, in whole steps, of a row of K."""
    return -(-K // (GROUPS * 32)) * GROUPS


def sums_width(weight: Matrix) -> int:
    """Columns of the sums that a weight needs, 0 for none."""
    has_minimum = isinstance(weight, QuantisedMatrix) and weight.minimum is not None
    return padded_groups(weight.shape[1]) if has_minimum else 0


def launch(
    x: torch.Tensor,
    weight: Matrix,
    out: torch.Tensor,
    *,
    round_to: torch.dtype,
    bias: torch.Tensor | None = None,
    after: str = "",
    other: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """out = x W^T + bias, then `after`: "add": other + that; a gate of ops.py: gate(other) * that.

    x [M, K], out and other [M, N], each with its own row stride; bias fp32 [N]. `round_to`: what
    the layer's result is rounded to before `after`. sums: fp32 scratch [M, at least sums_width(W)].
    """
    num_tokens = x.shape[0]
    if not num_tokens:
        return
    num_rows, K = weight.shape
    tokens = tokens_of(num_tokens)
    other = out if other is None else other
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_tokens, tokens))
    shared = {
        "HAS_BIAS": bias is not None,
        "AFTER": after,
        "ROUND": _TL[round_to],
    }
    ends = (out if bias is None else bias, other, out, num_rows, num_tokens, K)
    strides = (other.stride(0), out.stride(0))
    if isinstance(weight, FloatMatrix):
        product = x.dtype if x.dtype == weight.data.dtype else torch.float32
        float_kernel[grid](
            x,
            weight.data,
            *ends,
            x.stride(0),
            *strides,
            PRODUCT=_TL[product],
            **shared,
            **float_tile(K, tokens, product),
            **float_options(product),
        )
        return
    if weight.minimum is not None:
        assert sums is not None
        groups = sums_width(weight)
        sums_kernel[(num_tokens, triton.cdiv(groups, SUMS_BLOCK))](
            x,
            sums,
            K,
            groups,
            x.stride(0),
            sums.stride(0),
            GROUP=weight.group,
            BLOCK=SUMS_BLOCK,
            **OPTIONS,
        )
    quantised_kernel[grid](
        x,
        weight.codes,
        weight.scale,
        weight.scale if weight.minimum is None else weight.minimum,
        out if sums is None else sums,
        *ends,
        weight.codes.shape[1],
        x.stride(0),
        0 if sums is None else sums.stride(0),
        *strides,
        PRODUCT=_TL[x.dtype],
        **shared,
        **quantised_tile(weight, tokens),
        **quantised_options(tokens),
    )
