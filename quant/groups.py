"""I4G32, I4G128 and I8G32: integers in groups, what they mean and how they are laid out.

Readable numpy, the specification. value = d q - d zero per group, in float32, each product rounded
once; q is -8..7 or -128..127. Of a scale of 16 bits, as checkpoints have, and a whole zero point
all of it is exact: d (q - zero). Elements follow each other, the first of a pair in the low half.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

import numpy as np

from ..kernels.weights import I4G32, I4G128, I8G32, INT8, Format
from .gguf import block_dtype, row_dtype
from .parts import FormatError

BLOCK = 32  # columns that have one scale at least


def i4_values(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, block_elements] of blocks [n] of I4G32 or I4G128."""
    pairs = (blocks["nibbles"][..., None] >> np.array([0, 4], np.uint8)) & np.uint8(15)
    q = pairs.reshape(len(blocks), 2 * pairs.shape[1]).astype(np.float32) - np.float32(8)
    return blocks["d"] * q - blocks["d"] * blocks["zero"].astype(np.float32)


def i8_values(blocks: np.ndarray) -> np.ndarray:
    """float32 [n, 32] of blocks [n] of I8G32."""
    q = blocks["quants"].astype(np.float32)
    return blocks["d"] * q - blocks["d"] * blocks["zero"].astype(np.float32)


def even_groups(columns: int, group_size: int) -> np.ndarray:
    """Which group each 32 columns are of, groups following each other: [columns / 32]."""
    if group_size == -1:
        return np.zeros(columns // BLOCK, np.intp)
    return np.arange(columns // BLOCK) * BLOCK // group_size


def sorted_groups(name: str, index: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns [K] brought together by group, and which group each 32 of them are of [K / 32].

    `index` [K] has each column's group (act-order). Errors: FormatError for a group that does not
    exist, or one that is no whole number of 32 columns.
    """
    if index.min() < 0 or index.max() >= num_groups:
        raise FormatError(
            name,
            f"tensor {name!r} names groups {index.min()}..{index.max()}; there are {num_groups}",
        )
    order = np.argsort(index, kind="stable")
    groups = index[order].reshape(-1, BLOCK)
    odd = np.flatnonzero((groups != groups[:, :1]).any(axis=1))
    if odd.size:
        group = int(groups[odd[0], 0])
        raise FormatError(
            name,
            f"tensor {name!r} gives group {group} {int((index == group).sum())} columns; groups of "
            f"whole multiples of {BLOCK} are supported",
        )
    return order.astype(np.int32), groups[:, 0].astype(np.intp)


def int4_format(groups: np.ndarray) -> Format:
    """The format for columns whose groups are these, a number for each 32."""
    if len(groups) % 4:
        return I4G32
    fours = groups.reshape(-1, 4)
    return I4G128 if (fours == fours[:, :1]).all() else I4G32


def int4_rows(
    nibbles: np.ndarray, scale: np.ndarray, zero: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Bytes of rows of int4_format(groups).

    nibbles uint8 [n, K / 2] of q + 8, ascending; scale and zero [n, G] of the groups of which
    `groups` [K / 32] are the numbers. A zero point is counted from 8.
    """
    fmt = int4_format(groups)
    per_block = fmt.block_elements // BLOCK
    rows = np.empty((len(nibbles), len(groups) // per_block), block_dtype(fmt))
    rows["d"][..., 0] = scale[:, groups[::per_block]]
    rows["zero"][..., 0] = zero[:, groups[::per_block]]
    rows["nibbles"] = nibbles.reshape((*rows.shape, -1))
    return rows.reshape(-1).view(np.uint8)


def int8_rows(
    quants: np.ndarray, scale: np.ndarray, zero: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Bytes of rows of I8G32: quants int8 [n, K]; the others as in int4_rows."""
    rows = np.empty((len(quants), len(groups)), block_dtype(I8G32))
    rows["d"][..., 0] = scale[:, groups]
    rows["zero"][..., 0] = zero[:, groups]
    rows["quants"] = quants.reshape((*rows.shape, -1))
    return rows.reshape(-1).view(np.uint8)


def int8_channel_rows(quants: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Bytes of rows of INT8: quants int8 [n, K], scale [n]."""
    rows = np.empty(len(quants), row_dtype(INT8, quants.shape[1]))
    rows["d"][:, 0] = scale
    rows["blocks"]["quants"] = quants.reshape(len(quants), -1, BLOCK)
    return rows.view(np.uint8)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [n, K] below 16 -> [n, K / 2], the first of a pair in the low half."""
    return values[:, 0::2] | (values[:, 1::2] << np.uint8(4))


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The reverse of pack_nibbles."""
    pairs = (packed[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(15)
    return pairs.reshape(len(packed), 2 * packed.shape[1])


__all__ = [
    "BLOCK",
    "even_groups",
    "i4_values",
    "i8_values",
    "int4_format",
    "int4_rows",
    "int8_channel_rows",
    "int8_rows",
    "pack_nibbles",
    "sorted_groups",
    "unpack_nibbles",
]
