"""A step's small arrays, copied to the device at once, to where its launches read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .device import event

_ALIGNED = 32  # int32: each array begins at a multiple of 128 bytes


def room(sizes: Iterable[int]) -> int:
    """Elements that arrays of these sizes take; an empty one has a place of its own too."""
    return sum(-(-max(size, 1) // _ALIGNED) * _ALIGNED for size in sizes)


class Upload:
    """One copy of many small arrays to buffers that stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)
        self._copied: Any = event(device)

    @property
    def nbytes(self) -> int:
        return self._there.nbytes

    def size(self, arrays: list[np.ndarray]) -> int:
        """What `arrays` take, in elements."""
        return room(array.size for array in arrays)

    def reserve(self, size: int) -> None:
        """Have room for so many elements: copies that fit lie where they lay before."""
        if size > self._host.numel():
            pinned = self._device.type == "cuda"
            self._host = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
            self._there = torch.empty(size, dtype=torch.int32, device=self._device)

    def __call__(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """Each array, of int32 or float32, as a tensor of its shape and dtype on the device."""
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += self.size([array])
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still read the host's buffer
        self.reserve(size)
        flat = self._host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            flat[start : start + array.size] = np.ascontiguousarray(array).view(np.int32).ravel()
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        out = []
        for array, start in zip(arrays, starts, strict=True):
            there = self._there[start : start + array.size]
            if array.dtype == np.float32:
                there = there.view(torch.float32)
            out.append(there.view(array.shape))
        return out
