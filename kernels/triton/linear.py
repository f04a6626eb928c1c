"""linear: y = x W^T + bias, its result rounded once, with what stands before and behind it.

Before: rms_norm of x, and what a quantised layer takes of x (inputs.py), computed by every program
for its own tokens where these are few, for more tokens by a launch before. Behind: an addition, or
a gate's activation and product with the layer beside it, whose rows lie in turns with its own
(`paired`). No bit of a result depends on which launch did what. The loops are those of products.py:
tokens come in tiles of TOKENS[i], and a tile's width changes no bit of a token's result.

Weights and activations of one 16-bit dtype meet in the tensor core; where the two differ, or are
fp32, products are fp32. Where asked for, a quantised weight is multiplied by x in 8 bits instead:
sums of integers are exact within a group, or a row that has one scale; sums of 8-bit floats go to
fp32 every 128 elements, the tensor core's own being of fewer bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl

from . import rms_norm
from .inputs import prepare
from .numerics import OPTIONS, TL, gated
from .products import float_product, largest, quantised_product
from .quantised import PAIR, FloatMatrix, Matrix, QuantisedMatrix, codebook
from .rms_norm import Norm
from .rounding import factor_and_scale
from .tuned import UNTUNED, Tuned

ROWS = 64  # of the weight, in one program: the height of a warpgroup's instruction
TOKENS = (16, 32, 64, 128)  # widths of a tile of tokens
CODED_ELEMENTS = 1 << 16  # of x, that a program reads to quantise it: 128 KB in 16 bits
CODED_BLOCK = 512  # of a token, at a time
_PAIR = tl.constexpr(PAIR)


@triton.jit
def store(
    acc,
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
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Bias, rounding, and what follows the layer; acc [ROWS, TOKENS] is transposed. there [TOKENS]:
    the tokens that are stored."""
    if HAS_BIAS:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        acc += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    if PAIRED:
        acc = acc.to(ROUND).to(tl.float32)
        turns: tl.constexpr = ROWS // (2 * _PAIR)
        both = tl.permute(tl.reshape(acc, (turns, 2, _PAIR, TOKENS)), (0, 2, 3, 1))
        gate, up = tl.split(both)
        acc = tl.reshape(gated(gate, up, AFTER), (ROWS // 2, TOKENS))
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        num_rows = num_rows // 2
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None] & there[None, :]
    if AFTER != "" and not PAIRED:
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
    norm_ptr,
    bias_ptr,
    other_ptr,
    out_ptr,
    num_rows,
    num_tokens,
    K,
    x_stride,
    other_stride,
    out_stride,
    eps,
    offset,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W [num_rows, K] in floats."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows and tokens past the end repeat the last one, and are not stored.
    known = tl.minimum(token, num_tokens - 1)
    root = tl.zeros((TOKENS,), tl.float32)
    if NORM:
        root = rms_norm.roots(x_ptr, known.to(tl.int64), x_stride, K, eps, TOKENS, CHUNK, LEVELS, 0)
    acc = float_product(
        x_ptr,
        w_ptr,
        x_ptr,
        norm_ptr,
        tl.minimum(row, num_rows - 1),
        known,
        root,
        K,
        x_stride,
        offset,
        PRODUCT,
        ROWS,
        TOKENS,
        STEP,
        False,
        NORM,
        WHOLE,
    )
    store(
        acc,
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
        PAIRED,
        ROWS,
        TOKENS,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def quantised_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    minimum_ptr,
    table_ptr,
    scratch_ptr,
    columns_ptr,
    norm_ptr,
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
    eps,
    offset,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    ROUND: tl.constexpr,
    PAIRED: tl.constexpr,
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
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    CODED: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """W in codes of num_rows rows; see quantised_product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    known = tl.minimum(token, num_tokens - 1)
    root = tl.zeros((TOKENS,), tl.float32)
    if NORM:
        root = rms_norm.roots(x_ptr, known.to(tl.int64), x_stride, K, eps, TOKENS, CHUNK, LEVELS, 0)
    factor, token_scale = root, root
    if CODED != "":
        x_at = x_ptr + known.to(tl.int64)[:, None] * x_stride
        most = largest(x_at, K, norm_ptr, root, offset, TOKENS, BLOCK, NORM)
        factor, token_scale = factor_and_scale(most, CODED)
    acc = quantised_product(
        x_ptr,
        codes_ptr,
        scale_ptr,
        minimum_ptr,
        table_ptr,
        scratch_ptr,
        columns_ptr,
        norm_ptr,
        tl.minimum(row, num_rows - 1),
        known,
        root,
        factor,
        token_scale,
        num_rows,
        K,
        words,
        x_stride,
        scratch_stride,
        offset,
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
        ORDERED,
        NORM,
        CODED,
        SUMMED,
        WHOLE,
    )
    store(
        acc,
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
        PAIRED,
        ROWS,
        TOKENS,
    )


def most_tokens(amd: bool) -> int:
    """The widest tile; AMD's 64 KB of shared memory hold half of what NVIDIA's cards do."""
    return TOKENS[-2] if amd else TOKENS[-1]


def tokens_of(num_tokens: int, weight: Matrix) -> int:
    """Width of the tile that serves so many tokens.

    A step over planes of more than 32 codes is long, integers with minimums hold three sums, and
    columns are looked up: wider tiles of such weights run out of registers.
    """
    most = most_tokens(amd=torch.version.hip is not None)
    if isinstance(weight, QuantisedMatrix):
        layout, ordered = weight.layout, weight.columns is not None
        if layout.has_long_planes:
            most = TOKENS[0 if ordered else 1]
        elif ordered or (layout.minimum and weight.activations):
            most = TOKENS[1]
    return min(next((width for width in TOKENS if num_tokens <= width), most), most)


def float_tile(K: int, tokens: int, product: torch.dtype) -> dict[str, Any]:
    """Constants of float_kernel that follow from shapes."""
    step = 32 if product == torch.float32 else 64
    return {"ROWS": ROWS, "TOKENS": tokens, "STEP": step, "WHOLE": K % step == 0}


def float_options(product: torch.dtype) -> dict[str, Any]:
    """Launch options of float_kernel."""
    return OPTIONS | {"num_stages": 2 if product == torch.float32 else 4}


def is_prepared(weight: Matrix, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether a launch before prepares x of so many tokens: see inputs.py.

    For few tokens the layer's programs do. To quantise x each one reads all of its tokens once
    more, to find the largest of each: worth it while that is little. Sums are products with ones,
    which cost as much as the weight's where no tensor core makes them.
    """
    if not isinstance(weight, QuantisedMatrix) or not has_inputs(weight):
        return False
    if num_tokens > TOKENS[0]:
        return True
    if weight.activations:
        return num_tokens * weight.shape[1] > CODED_ELEMENTS
    return dtype == torch.float32


def inputs_here(w: QuantisedMatrix) -> dict[str, Any]:
    """Constants of quantised_kernel where it prepares x itself."""
    block = CODED_BLOCK if w.activations else 1
    return {"CODED": w.activations, "SUMMED": w.layout.minimum, "BLOCK": block}


INPUTS_BEFORE = {"CODED": "", "SUMMED": False, "BLOCK": 1}


def quantised_tile(w: QuantisedMatrix, tokens: int, *, prepared: bool = True) -> dict[str, Any]:
    """Constants of quantised_kernel that follow from the weight; see is_prepared."""
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
        "WHOLE": bool(w.activations and prepared) or layout.width(K) == K,
    }


def product_of(w: QuantisedMatrix, dtype: torch.dtype) -> Any:
    """What is multiplied where a layer's input has this dtype."""
    return {"int8": tl.int8, "fp8": tl.float8e4nv, "": TL[dtype]}[w.activations]


def quantised_options(w: QuantisedMatrix, tokens: int, *, prepared: bool = True) -> dict[str, Any]:
    """Launch options of quantised_kernel; a wide tile is shared by two warpgroups.

    Three stages, or two where x of a step would not fit into shared memory three times.
    """
    step = w.layout.step_groups * w.layout.group
    stages = 2 if step > 128 and not w.activations else 3
    made = OPTIONS | {"num_stages": stages, "num_warps": 8 if tokens == 128 else 4}
    if w.layout.minimum and tokens == TOKENS[0] and torch.version.hip is None:
        # Left to choose, the assembler stops at 96, or at 72, and spills.
        if w.paired:
            made |= {"maxnreg": 255 if w.activations else 168}
        elif w.layout.bits == 8 and not prepared:
            made |= {"maxnreg": 255 if w.activations else 128}
    return made


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
    norm: Norm | None = None,
    normed: torch.Tensor | None = None,
) -> None:
    """out = x W^T + bias, then `after`: "add": other + that; a gate of ops.py: gate(other) * that.

    x [M, K], out and other [M, N], each with its own row stride; bias fp32 [N]. A paired W is
    [2N, K], its bias [2N], and it is its own `other`. `round_to`: what the layer's result is
    rounded to before `after`. scratch: fp32 [at least M, at least scratch_width(W)]. tuned: options
    of this card, in place of the defaults. norm: x stands for rms_norm(x), which goes to `normed`
    [M, K] where a launch before computes it.
    """
    num_tokens = x.shape[0]
    if not num_tokens:
        return
    num_rows, K = weight.shape
    dtype = x.dtype
    tokens = tokens_of(num_tokens, weight)
    other = out if other is None else other
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_tokens, tokens))
    ordered, prepared = False, is_prepared(weight, num_tokens, dtype)
    if isinstance(weight, QuantisedMatrix):
        ordered = weight.columns is not None
        if prepared:
            assert scratch is not None
            x, done = prepare(x, weight, scratch, norm, normed)
            ordered, norm = ordered and not done, None
    if norm is not None and num_tokens > TOKENS[0]:
        assert normed is not None
        rms_norm.launch(x, norm.weight, normed, norm.eps, norm.offset)
        x, norm = normed, None
    shared = {
        "HAS_BIAS": bias is not None,
        "AFTER": after,
        "ROUND": TL[round_to],
        "PAIRED": weight.paired,
        "NORM": norm is not None,
        **rms_norm.lanes(K if norm is not None else 1),
    }
    scale = x if norm is None else norm.weight
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    ends = (out if bias is None else bias, other, out, num_rows, num_tokens, K)
    strides = (other.stride(0), out.stride(0), eps, offset)
    if isinstance(weight, FloatMatrix):
        product = float_dtype(x, weight)
        float_kernel[grid](
            x,
            weight.data,
            scale,
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
    quantised_kernel[grid](
        x,
        *tables(weight, dtype),
        scratch,
        x if weight.columns is None else weight.columns,
        scale,
        *ends,
        weight.codes.shape[1],
        x.stride(0),
        scratch.stride(0),
        *strides,
        PRODUCT=product_of(weight, dtype),
        ORDERED=ordered,
        **(INPUTS_BEFORE if prepared else inputs_here(weight)),
        **shared,
        **quantised_tile(weight, tokens, prepared=prepared),
        **(
            quantised_options(weight, tokens, prepared=prepared)
            | tuned.options(weight, dtype, tokens)
        ),
    )


def has_inputs(weight: Matrix) -> bool:
    """Whether something stands for the layer's input, or beside it: see inputs.py."""
    return isinstance(weight, QuantisedMatrix) and bool(weight.activations or weight.layout.minimum)


def float_dtype(x: torch.Tensor, weight: FloatMatrix) -> torch.dtype:
    """What x and a weight in floats are multiplied as."""
    return x.dtype if x.dtype == weight.data.dtype else torch.float32


def tables(weight: QuantisedMatrix, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Codes, scales, minimums and codebook, for x of `dtype`; what the format lacks is not read."""
    minimum = weight.scale if weight.minimum is None else weight.minimum
    table = weight.layout.table
    book = codebook(table, dtype, weight.codes.device) if table else weight.scale
    return weight.codes, weight.scale, minimum, book
