"""rope and kv_write: a token's heads are rotated, and its keys and values stored in their slot.

Where a norm of each head stands before the rotation (Qwen3, Gemma 3), it is the same launch: a
head's sum of squares is taken by the program that rotates it, whatever the number of tokens.

A cache in codes takes its scales from what is to be stored, in the same launch.

cos and sin come as a table [T, 2, F], the very numbers that kernels/reference/ multiplies by.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import triton
import triton.language as tl

from .cache import (
    KVCache,
    encoded,
    factor_and_scale,
    grouped,
    magnitude,
    row_of,
    scales_of,
)
from .numerics import OPTIONS, next_power_of_two
from .rms_norm import Norm, normed

_CHUNK = 256  # positions: the table grows by whole chunks, so each entry has one place in an array
_ELEMENTS = 4096  # of a head block: what one program holds in registers; half to encode them


class Rotations:
    """cos and sin of one set of frequencies, by position; grows as positions are met.

    In float64 from the angle's fp32 product, as ops.rope says.
    """

    def __init__(self, inv_freq: tuple[float, ...], attention_factor: float) -> None:
        self._inv_freq = np.array(inv_freq, dtype=np.float32)
        self._factor = np.float32(attention_factor)
        self._table = np.empty((0, 2, len(inv_freq)), dtype=np.float32)

    @property
    def width(self) -> int:
        """Floats of one position."""
        return 2 * len(self._inv_freq)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """[T, 2, F]: cos, then sin, of each position."""
        highest = int(positions.max(initial=-1))
        while highest >= len(self._table):
            start = np.arange(len(self._table), len(self._table) + _CHUNK, dtype=np.float32)
            angle = (start[:, None] * self._inv_freq).astype(np.float64)
            both = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
            self._table = np.concatenate([self._table, both * self._factor])
        rows: np.ndarray = self._table[positions]
        return rows


@triton.jit
def _factor(most, scale_ptr, mask, CODES: tl.constexpr):
    """What multiplies heads of largest magnitudes `most`; stores their scales."""
    factor, scale = factor_and_scale(most, CODES)
    tl.store(scale_ptr, scale, mask=mask)
    return factor[:, None]


@triton.jit
def _put(x, factor, dst, mask, CODES: tl.constexpr):
    """Store x, of the source's dtype, in the destination's."""
    if CODES == "":
        tl.store(dst, x.to(dst.dtype.element_ty), mask=mask)
    else:
        tl.store(dst, encoded(x.to(tl.float32), factor, CODES), mask=mask)


@triton.jit
def _rotate(
    src_ptr,
    dst_ptr,
    scale_ptr,
    table_ptr,
    norm_ptr,
    head,
    mask,
    dst_head_stride,
    eps,
    offset,
    NORM: tl.constexpr,
    CODES: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate heads [HEADS] of D elements; a result is rounded to the source's dtype first.

    scale_ptr [HEADS]: where each head's scale goes, of CODES. NORM: rms_norm(head), itself rounded.
    """
    j = tl.arange(0, F_PAD)
    if INTERLEAVED:
        first, second = 2 * j, 2 * j + 1
    else:
        first, second = j, j + F
    pairs = mask[:, None] & (j < F)[None, :]
    cos = tl.load(table_ptr + j, mask=j < F, other=0.0)[None, :]
    sin = tl.load(table_ptr + F + j, mask=j < F, other=0.0)[None, :]
    src = src_ptr + head[:, None] * D
    dst = dst_ptr + head[:, None] * dst_head_stride
    DTYPE: tl.constexpr = src_ptr.dtype.element_ty
    a = tl.load(src + first[None, :], mask=pairs, other=0.0).to(tl.float32)
    b = tl.load(src + second[None, :], mask=pairs, other=0.0).to(tl.float32)
    if 2 * F < D:
        d = tl.arange(0, D_PAD)[None, :]
        rest = mask[:, None] & (d >= 2 * F) & (d < D)
        passed = tl.load(src + d, mask=rest, other=0.0)
    if NORM:
        squares = tl.sum(a * a + b * b, 1)
        if 2 * F < D:
            squares += tl.sum(passed.to(tl.float32) * passed.to(tl.float32), 1)
        root = tl.sqrt_rn(squares / D + eps)[:, None]
        weight = tl.load(norm_ptr + first, mask=j < F, other=0.0)[None, :]
        a = normed(a, root, weight, offset, DTYPE).to(tl.float32)
        weight = tl.load(norm_ptr + second, mask=j < F, other=0.0)[None, :]
        b = normed(b, root, weight, offset, DTYPE).to(tl.float32)
        if 2 * F < D:
            weight = tl.load(norm_ptr + d, mask=d < D, other=0.0)
            passed = normed(passed, root, weight, offset, DTYPE)
    one = (a * cos - b * sin).to(DTYPE)
    two = (b * cos + a * sin).to(DTYPE)
    factor = 0.0
    if CODES != "":
        largest = tl.maximum(magnitude(one.to(tl.float32)), magnitude(two.to(tl.float32)))
        most = tl.max(largest, 1)
        if 2 * F < D:
            most = tl.maximum(most, tl.max(magnitude(passed.to(tl.float32)), 1))
        factor = _factor(most, scale_ptr, mask, CODES)
    _put(one, factor, dst + first[None, :], pairs, CODES)
    _put(two, factor, dst + second[None, :], pairs, CODES)
    if 2 * F < D:
        _put(passed, factor, dst + d, rest, CODES)


@triton.jit
def _copy(
    src_ptr,
    dst_ptr,
    scale_ptr,
    head,
    mask,
    dst_head_stride,
    CODES: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Store heads [HEADS] of D elements as they are."""
    d = tl.arange(0, D_PAD)[None, :]
    inside = mask[:, None] & (d < D)
    x = tl.load(src_ptr + head[:, None] * D + d, mask=inside, other=0.0)
    factor = 0.0
    if CODES != "":
        factor = _factor(tl.max(magnitude(x.to(tl.float32)), 1), scale_ptr, mask, CODES)
    _put(x, factor, dst_ptr + head[:, None] * dst_head_stride + d, inside, CODES)


@triton.jit
def _put_grouped(
    src_ptr,
    dst_ptr,
    scale_ptr,
    table_ptr,
    norm_ptr,
    first,
    eps,
    offset,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    F: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store HEADS heads from `first` on as int4, rotated where ROTATED: a row of this tile is a
    group of 32 dims, the two halves of which share bytes. dst_ptr, scale_ptr: of head 0's slot."""
    GROUPS: tl.constexpr = (D + 31) // 32
    G_PAD: tl.constexpr = (D_PAD + 31) // 32
    r = tl.arange(0, HEADS * G_PAD)
    head = first + r // G_PAD
    group = r % G_PAD
    there = (head < NUM_HEADS) & (group < GROUPS)
    half = tl.arange(0, 2)[None, :, None] * 16
    d = group[:, None, None] * 32 + half + tl.arange(0, 16)[None, None, :]
    inside = there[:, None, None] & (d < D)
    src = src_ptr + head[:, None, None] * D
    DTYPE: tl.constexpr = src_ptr.dtype.element_ty
    x = tl.load(src + d, mask=inside, other=0.0)
    if NORM:
        heads = first + tl.arange(0, HEADS)
        all_d = tl.arange(0, D_PAD)[None, :]
        mask = (heads < NUM_HEADS)[:, None] & (all_d < D)
        whole = tl.load(src_ptr + heads[:, None] * D + all_d, mask=mask, other=0.0).to(tl.float32)
        root = tl.sqrt_rn(tl.sum(whole * whole, 1) / D + eps)
        root = tl.reshape(tl.broadcast_to(root[:, None], (HEADS, G_PAD)), (HEADS * G_PAD,))
        root = root[:, None, None]
        weight = tl.load(norm_ptr + d, mask=d < D, other=0.0)
        x = normed(x.to(tl.float32), root, weight, offset, DTYPE)
    if ROTATED:
        if INTERLEAVED:
            j = d // 2
            other = d ^ 1
            turned = inside & (d < 2 * F)
            is_first = d % 2 == 0
        else:
            j = d % F
            other = tl.where(d < F, d + F, d - F)
            turned = inside & (d < 2 * F)
            is_first = d < F
        cos = tl.load(table_ptr + j, mask=turned, other=1.0)
        sin = tl.load(table_ptr + F + j, mask=turned, other=0.0)
        y = tl.load(src + other, mask=turned, other=0.0)
        if NORM:
            weight = tl.load(norm_ptr + other, mask=turned, other=0.0)
            y = normed(y.to(tl.float32), root, weight, offset, DTYPE)
        y = tl.where(is_first, -y.to(tl.float32), y.to(tl.float32))
        x = tl.where(turned, (x.to(tl.float32) * cos + y * sin).to(DTYPE), x)
    codes, scales, offsets = grouped(x.to(tl.float32), inside)
    at = dst_ptr + (head * (BLOCK_SIZE * 16 * GROUPS) + group * 16)[:, None]
    tl.store(at + tl.arange(0, 16)[None, :], codes, mask=there[:, None])
    at = scale_ptr + head * (BLOCK_SIZE * 2 * GROUPS) + group
    tl.store(at, scales, mask=there)
    tl.store(at + GROUPS, offsets, mask=there)


@triton.jit(do_not_specialize=["layer", "num_layers"])
def rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_cache_ptr,
    k_scales_ptr,
    v_cache_ptr,
    v_scales_ptr,
    table_ptr,
    slot_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_stride,
    k_stride,
    v_stride,
    q_out_stride,
    num_layers,
    layer,
    q_eps,
    q_offset,
    k_eps,
    k_offset,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROTATE_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One block of HEADS heads of one token: first those of q, then of k, then of v."""
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    table_ptr += t * (2 * F)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        _rotate(
            q_ptr + t * q_stride,
            q_out_ptr + t * q_out_stride,
            q_out_ptr,
            table_ptr,
            q_norm_ptr,
            head,
            head < Q_HEADS,
            D,
            q_eps,
            q_offset,
            Q_NORM,
            "",
            D,
            D_PAD,
            F,
            F_PAD,
            INTERLEAVED,
        )
    elif KV_HEADS > 0:
        slot = tl.load(slot_ptr + t)
        if slot >= 0:
            part = (block - q_blocks) // kv_blocks  # 0: keys, 1: values
            first = (block - q_blocks) % kv_blocks * HEADS
            head = first + tl.arange(0, HEADS)
            mask = head < KV_HEADS
            stride: tl.constexpr = BLOCK_SIZE * D  # from head to head
            number = (slot // BLOCK_SIZE).to(tl.int64) * num_layers + layer
            row = number * (KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE  # of head 0
            if part == 1:
                v_page = v_cache_ptr + row * row_of(V_CODES, D)
                v_scale = v_scales_ptr + row * scales_of(V_CODES, D)
                v_src = v_ptr + t * v_stride
                if V_CODES == "int4":
                    _put_grouped(
                        v_src, v_page, v_scale, table_ptr, k_norm_ptr, first, k_eps, k_offset,
                        False, False, KV_HEADS, HEADS, BLOCK_SIZE, D, D_PAD, F, INTERLEAVED,
                    )  # fmt: skip
                else:
                    v_scale += head * BLOCK_SIZE
                    _copy(v_src, v_page, v_scale, head, mask, stride, V_CODES, D, D_PAD)
            else:
                k_page = k_cache_ptr + row * row_of(K_CODES, D)
                k_scale = k_scales_ptr + row * scales_of(K_CODES, D)
                k_src = k_ptr + t * k_stride
                if K_CODES == "int4":
                    _put_grouped(
                        k_src, k_page, k_scale, table_ptr, k_norm_ptr, first, k_eps, k_offset,
                        ROTATE_K, K_NORM, KV_HEADS, HEADS, BLOCK_SIZE, D, D_PAD, F, INTERLEAVED,
                    )  # fmt: skip
                elif ROTATE_K:
                    k_scale += head * BLOCK_SIZE
                    _rotate(
                        k_src, k_page, k_scale, table_ptr, k_norm_ptr, head, mask, stride, k_eps,
                        k_offset, K_NORM, K_CODES, D, D_PAD, F, F_PAD, INTERLEAVED,
                    )  # fmt: skip
                else:
                    k_scale += head * BLOCK_SIZE
                    _copy(k_src, k_page, k_scale, head, mask, stride, K_CODES, D, D_PAD)


@dataclass(frozen=True)
class Rotation:
    """How heads are rotated, and the step's table [T, 2, F]."""

    table: torch.Tensor
    interleaved: bool


def launch(
    head_dim: int,
    rotation: Rotation | None,
    q: torch.Tensor | None = None,
    q_out: torch.Tensor | None = None,
    kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    norms: Sequence[Norm | None] = (None, None),
    rotate_k: bool = False,
    cache: KVCache | None = None,
    slot: torch.Tensor | None = None,
    layer: int = 0,
) -> None:
    """Rotate q into q_out, where given; store k (rotated where rotate_k) and v, where given.

    norms: of the heads of q and of k, before they are rotated.
    q [T, heads*head_dim], k and v [T, kv heads*head_dim], slot [T] int32, -1 stores nothing.
    """
    some = q if q is not None else kv[0]  # type: ignore[index]
    rows = some.shape[0]
    if not rows:
        return
    q_heads = 0 if q is None else q.shape[1] // head_dim
    kv_heads = 0 if kv is None else kv[0].shape[1] // head_dim
    k, v = (some, some) if kv is None else kv
    f = 0 if rotation is None else rotation.table.shape[-1]
    codes = ("", "") if cache is None else cache.codes
    pointers = (some,) * 4 if cache is None else cache.pointers
    q_norm, k_norm = norms
    options = tile(head_dim, f, max(q_heads, kv_heads), any(codes))
    heads = options["HEADS"]
    blocks = triton.cdiv(q_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    rope_kernel[(rows, blocks)](
        some,
        k,
        v,
        some if q_out is None else q_out,
        *pointers,
        some if rotation is None else rotation.table,
        some if slot is None else slot,
        some if q_norm is None else q_norm.weight,
        some if k_norm is None else k_norm.weight,
        some.stride(0),
        k.stride(0),
        v.stride(0),
        0 if q_out is None else q_out.stride(0),
        1 if cache is None else cache.spec.num_layers,
        layer,
        *((0.0, 0.0) if q_norm is None else (q_norm.eps, q_norm.offset)),
        *((0.0, 0.0) if k_norm is None else (k_norm.eps, k_norm.offset)),
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        K_CODES=codes[0],
        V_CODES=codes[1],
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        ROTATE_K=rotate_k,
        BLOCK_SIZE=1 if cache is None else cache.spec.block_size,
        INTERLEAVED=rotation is not None and rotation.interleaved,
        **options,
        **OPTIONS,
    )


def tile(head_dim: int, num_pairs: int, num_heads: int, codes: bool) -> dict[str, int]:
    """The kernel's constants for heads of head_dim with num_pairs rotated pairs; codes: whether the
    cache is in codes."""
    padded = next_power_of_two(head_dim)
    elements = _ELEMENTS // 2 if codes else _ELEMENTS
    return {
        "HEADS": min(next_power_of_two(num_heads), max(1, elements // padded)),
        "D": head_dim,
        "D_PAD": padded,
        "F": num_pairs,
        "F_PAD": next_power_of_two(num_pairs),
    }
