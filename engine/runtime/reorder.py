"""Rows in the order that a model has them, of tensors that hold them transposed or in turns.

Nothing is read here: the rows are made as a backend packs them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ...kernels.weights import RawWeight


def transposed(tensor: RawWeight) -> RawWeight:
    """Floats [E, K, N], matrices one after another, as the rows [E*N, K] of their transposes."""
    count, columns, rows = tensor.shape
    size = tensor.format.block_bytes

    def make(start: int, stop: int) -> np.ndarray:
        matrices = tensor.data.view(f"u{size}").reshape(tensor.shape)
        made = np.empty((stop - start, columns), matrices.dtype)
        for e in range(start // rows, -(-stop // rows)):
            first, last = max(start, e * rows), min(stop, (e + 1) * rows)
            made[first - start : last - start] = matrices[
                e, :, first - e * rows : last - e * rows
            ].T
        return made.reshape(-1).view(np.uint8)

    return dataclasses.replace(tensor, shape=(count * rows, columns), make=make)


def in_turns(tensor: RawWeight, turns: int) -> RawWeight:
    """Rows (or a vector's elements) 0, turns, 2 turns, .. of a tensor, then 1, turns + 1, ..

    A gate's rows and those beside it, in turns of 2, become two halves.
    """
    each = tensor.shape[0] // turns

    def make(start: int, stop: int) -> np.ndarray:
        made = []
        for turn in range(start // each, -(-stop // each)):
            first, last = max(start - turn * each, 0), min(stop - turn * each, each)
            near = tensor.rows(first * turns, last * turns).data
            made.append(near.reshape(last - first, turns, -1)[:, turn].reshape(-1))
        return np.concatenate(made)

    return dataclasses.replace(tensor, make=make)
