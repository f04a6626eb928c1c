"""The kernels of paged attention; attention.py says which of them serves what, and launches them.

Law 2. A split is a softmax (an online one over its tiles in ascending order) that knows nothing of
other splits; splits are merged in ascending order by `_merge`. `walk_kernel` does both in
registers; `split_kernel` computes single splits side by side, `merge_kernel` merges what it stored.
Which of the two serves an item, and how many rows stand in its tile, changes no bit: formulas are
the same functions, a tile or split that a row cannot see multiplies by 1 and adds 0; products are
taken transposed, S^T = K Q^T and O^T = V^T P^T, so that keys and head dims fill the tensor core's
fixed side and rows its free one: one instruction family for every number of rows.

Scores are in units of log2: p = 2^(s - max). P is rounded to the cache's dtype for its product
where q has that dtype too; where they differ, both products are fp32. Of 8-bit codes the codes
are multiplied, in q's dtype, which holds them exactly: a key's scale multiplies its scores, a
value's its p. Keys and values of 4 bits, whose scales are of 32 dims, are multiplied themselves,
rounded to q's dtype. A sink joins the sum when all splits are merged.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .cache import read, row_of, scales_of
from .numerics import LOG2_E, tanh

# A maximum before any key is seen: below every score, and not -inf, since -inf - -inf is NaN.
NOTHING = tl.constexpr(-1e38)


@triton.jit
def _tile(
    q,
    position,
    start,
    end,
    state,
    cache,
    form,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Keys start .. start + TILE, none at or past `end`, into the softmax `state`."""
    top, total, acc = state
    k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, table_ptr, block_rows = cache
    scale, cap, window, slope = form
    key = start + tl.arange(0, TILE)
    exists = key < end
    if BLOCK_SIZE % TILE == 0:  # one block holds the tile
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        row = block * block_rows + (start % BLOCK_SIZE + tl.arange(0, TILE))
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        row = block * block_rows + key % BLOCK_SIZE
    k, k_scale = read(k_ptr, k_scales_ptr, row, exists, K_CODES, q.dtype, TILE, D, D_PAD)
    if V_CODES != "int4":
        v, v_scale = read(v_ptr, v_scales_ptr, row, exists, V_CODES, q.dtype, TILE, D, D_PAD)
    if K_CODES != "":
        scale = (k_scale * scale)[:, None]
    score = tl.dot(k, q, input_precision="ieee")
    if HAS_CAP:
        score = tanh(score * scale / cap) * (cap * LOG2_E)
    else:
        score = score * (scale * LOG2_E)
    if HAS_SLOPES:
        away = key.to(tl.float32)[:, None] - position.to(tl.float32)[None, :]
        score += slope[None, :] * away
    seen = key[:, None] <= position[None, :]
    if HAS_WINDOW:
        seen = seen & (key[:, None] > position[None, :] - window)
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 0))
    p = tl.exp2(score - new_top[None, :])
    keep = tl.exp2(top - new_top)
    total = total * keep + tl.sum(p, 0)
    if V_CODES == "int4":  # only now: decoding takes registers that the keys' product needs
        v, v_scale = read(v_ptr, v_scales_ptr, row, exists, V_CODES, q.dtype, TILE, D, D_PAD)
    if V_CODES != "":  # where a value's scale is NaN, rows that do not see it shall not
        p = tl.where(seen, p * v_scale[:, None], 0.0)
    acc = tl.dot(tl.trans(v), p.to(q.dtype), acc * keep[None, :], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _split(
    q,
    position,
    split,
    lowest,
    highest,
    cache,
    form,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """The softmax of one split for rows at positions lowest .. highest: (top, total, acc^T)."""
    top, total, acc = _nothing(ROWS, D_PAD)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, highest + 1)
    if HAS_WINDOW:
        begin = tl.maximum(begin, tl.maximum(lowest - form[2] + 1, 0) // TILE * TILE)
    if SPLIT == TILE:
        top, total, acc = _tile(
            q, position, begin, end, (top, total, acc), cache, form, K_CODES, V_CODES,
            HAS_CAP, HAS_WINDOW, HAS_SLOPES, BLOCK_SIZE, TILE, D, D_PAD,
        )  # fmt: skip
    else:
        for start in range(begin, end, TILE):
            top, total, acc = _tile(
                q, position, start, end, (top, total, acc), cache, form, K_CODES, V_CODES,
                HAS_CAP, HAS_WINDOW, HAS_SLOPES, BLOCK_SIZE, TILE, D, D_PAD,
            )  # fmt: skip
    return top, total, acc


@triton.jit
def _nothing(ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """The softmax of no key: (top, total, acc^T)."""
    top = tl.full((ROWS,), NOTHING, tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((D_PAD, ROWS), tl.float32)


@triton.jit
def _cache(
    pointers,
    table_ptr,
    num_layers,
    layer,
    kv_head,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """What `_tile` reads of one layer and kv head: rows of slots, from the first block's first on,
    and how many of them lie from one block to the next."""
    k_ptr, k_scales_ptr, v_ptr, v_scales_ptr = pointers
    first = (layer * KV_HEADS + kv_head) * BLOCK_SIZE
    return (
        k_ptr + first * row_of(K_CODES, D),
        k_scales_ptr + first * scales_of(K_CODES, D),
        v_ptr + first * row_of(V_CODES, D),
        v_scales_ptr + first * scales_of(V_CODES, D),
        table_ptr,
        num_layers * (KV_HEADS * BLOCK_SIZE),
    )


@triton.jit
def _merge(top, total, acc, split_top, split_total, split_acc):
    """Add the next split's softmax to that of the splits before it."""
    new_top = tl.maximum(top, split_top)
    keep = tl.exp2(top - new_top)
    take = tl.exp2(split_top - new_top)
    total = total * keep + split_total * take
    acc = acc * keep[None, :] + split_acc * take[None, :]
    return new_top, total, acc


@triton.jit
def _rows(item_ptr, position_ptr, SHARED: tl.constexpr, ROWS: tl.constexpr):
    """A tile's rows: offset of each in q or out but for the head dim, position, and which exist."""
    r = tl.arange(0, ROWS)
    token = tl.load(item_ptr + 1) + r // SHARED
    exists = r < tl.load(item_ptr + 2) * SHARED
    position = tl.load(position_ptr + token, mask=exists, other=-1)
    return token.to(tl.int64), r % SHARED, position, exists


@triton.jit
def _queries(q_ptr, token, shared, exists, q_stride, kv_head, SHARED, D, D_PAD, dtype):
    """q transposed, [D_PAD, ROWS], in the dtype of the products."""
    d = tl.arange(0, D_PAD)
    at = token * q_stride + (kv_head * SHARED + shared) * D
    inside = exists[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=inside, other=0.0)
    return tl.trans(q).to(dtype)


@triton.jit
def _slopes(slope_ptr, kv_head, shared, SHARED, HAS_SLOPES: tl.constexpr):
    """Of the rows' query heads, in units of log2."""
    if HAS_SLOPES:
        return tl.load(slope_ptr + kv_head * SHARED + shared) * LOG2_E
    else:
        return 0.0


@triton.jit
def _store(
    out_ptr,
    sink_ptr,
    token,
    shared,
    exists,
    out_stride,
    kv_head,
    top,
    total,
    acc,
    HAS_SINKS: tl.constexpr,
    SHARED,
    D,
    D_PAD,
):
    """acc / total; a padding row has seen nothing, and its acc of 0 is divided by 1."""
    if HAS_SINKS:
        sink = tl.load(sink_ptr + kv_head * SHARED + shared) * LOG2_E
        total += tl.exp2(sink - top)
    d = tl.arange(0, D_PAD)
    at = token * out_stride + (kv_head * SHARED + shared) * D
    inside = exists[:, None] & (d < D)[None, :]
    out = acc / tl.where(total == 0.0, 1.0, total)[None, :]
    out = tl.trans(out.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + at[:, None] + d[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["layer", "num_layers", "table_width", "window"])
def walk_kernel(
    q_ptr,
    out_ptr,
    k_ptr,
    k_scales_ptr,
    v_ptr,
    v_scales_ptr,
    slope_ptr,
    sink_ptr,
    item_ptr,
    position_ptr,
    table_ptr,
    q_stride,
    out_stride,
    table_width,
    num_layers,
    layer,
    scale,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One item and kv head: every split that its rows see, one after the other."""
    item_ptr += tl.program_id(0) * ITEM
    kv_head = tl.program_id(1)
    lowest = tl.load(item_ptr + 3)
    highest = tl.load(item_ptr + 4)
    token, shared, position, exists = _rows(item_ptr, position_ptr, SHARED, ROWS)
    q = _queries(q_ptr, token, shared, exists, q_stride, kv_head, SHARED, D, D_PAD, PRODUCT)
    table_ptr += tl.load(item_ptr).to(tl.int64) * table_width
    pointers = (k_ptr, k_scales_ptr, v_ptr, v_scales_ptr)
    cache = _cache(
        pointers, table_ptr, num_layers, layer, kv_head, K_CODES, V_CODES, KV_HEADS, BLOCK_SIZE, D
    )
    form = (scale, cap, window, _slopes(slope_ptr, kv_head, shared, SHARED, HAS_SLOPES))
    top, total, acc = _nothing(ROWS, D_PAD)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(lowest - window + 1, 0) // SPLIT
    for split in range(first, (highest + SPLIT) // SPLIT):
        split_top, split_total, split_acc = _split(
            q, position, split, lowest, highest, cache, form, K_CODES, V_CODES, HAS_CAP, HAS_WINDOW,
            HAS_SLOPES, BLOCK_SIZE, TILE, SPLIT, ROWS, D, D_PAD,
        )  # fmt: skip
        top, total, acc = _merge(top, total, acc, split_top, split_total, split_acc)
    _store(
        out_ptr,
        sink_ptr,
        token,
        shared,
        exists,
        out_stride,
        kv_head,
        top,
        total,
        acc,
        HAS_SINKS,
        SHARED,
        D,
        D_PAD,
    )


@triton.jit(do_not_specialize=["layer", "num_layers", "table_width", "window"])
def split_kernel(
    q_ptr,
    acc_ptr,
    top_ptr,
    total_ptr,
    k_ptr,
    k_scales_ptr,
    v_ptr,
    v_scales_ptr,
    slope_ptr,
    item_ptr,
    pair_ptr,
    position_ptr,
    table_ptr,
    q_stride,
    table_width,
    num_layers,
    layer,
    scale,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One (item, split) pair and kv head: the split's softmax to scratch."""
    pair = tl.program_id(0)
    kv_head = tl.program_id(1)
    item_ptr += tl.load(pair_ptr + 2 * pair) * ITEM
    split = tl.load(pair_ptr + 2 * pair + 1)
    token, shared, position, exists = _rows(item_ptr, position_ptr, SHARED, ROWS)
    q = _queries(q_ptr, token, shared, exists, q_stride, kv_head, SHARED, D, D_PAD, PRODUCT)
    table_ptr += tl.load(item_ptr).to(tl.int64) * table_width
    pointers = (k_ptr, k_scales_ptr, v_ptr, v_scales_ptr)
    cache = _cache(
        pointers, table_ptr, num_layers, layer, kv_head, K_CODES, V_CODES, KV_HEADS, BLOCK_SIZE, D
    )
    form = (scale, cap, window, _slopes(slope_ptr, kv_head, shared, SHARED, HAS_SLOPES))
    lowest = tl.load(item_ptr + 3)
    highest = tl.load(item_ptr + 4)
    top, total, acc = _split(
        q, position, split, lowest, highest, cache, form, K_CODES, V_CODES, HAS_CAP, HAS_WINDOW,
        HAS_SLOPES, BLOCK_SIZE, TILE, SPLIT, ROWS, D, D_PAD,
    )  # fmt: skip
    place = (pair * KV_HEADS + kv_head).to(tl.int64)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    tl.store(top_ptr + place * ROWS + r, top, mask=exists)
    tl.store(total_ptr + place * ROWS + r, total, mask=exists)
    acc_ptr += place * (D_PAD * ROWS) + d[:, None] + r[None, :] * D_PAD
    tl.store(acc_ptr, acc, mask=exists[None, :])


@triton.jit
def merge_kernel(
    out_ptr,
    sink_ptr,
    acc_ptr,
    top_ptr,
    total_ptr,
    item_ptr,
    position_ptr,
    out_stride,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """One item and kv head: its splits from scratch, in ascending order."""
    item_ptr += tl.program_id(0) * ITEM
    kv_head = tl.program_id(1)
    token, shared, _, exists = _rows(item_ptr, position_ptr, SHARED, ROWS)
    r = tl.arange(0, ROWS)
    at = tl.arange(0, D_PAD)[:, None] + r[None, :] * D_PAD
    top, total, acc = _nothing(ROWS, D_PAD)
    first = tl.load(item_ptr + 5)
    for pair in range(first, first + tl.load(item_ptr + 6)):
        place = (pair * KV_HEADS + kv_head).to(tl.int64)
        split_acc = tl.load(acc_ptr + place * (D_PAD * ROWS) + at, mask=exists[None, :], other=0.0)
        split_top = tl.load(top_ptr + place * ROWS + r, mask=exists, other=0.0)
        split_total = tl.load(total_ptr + place * ROWS + r, mask=exists, other=0.0)
        top, total, acc = _merge(top, total, acc, split_top, split_total, split_acc)
    _store(
        out_ptr,
        sink_ptr,
        token,
        shared,
        exists,
        out_stride,
        kv_head,
        top,
        total,
        acc,
        HAS_SINKS,
        SHARED,
        D,
        D_PAD,
    )
