"""The paged KV cache in device memory, in its logical order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backend import KVSpec
from .numerics import TORCH_DTYPES


@dataclass(frozen=True, eq=False)
class KVCache:
    """data [num_blocks, layer, 2, kv head, slot in block, dim]: a head's block is contiguous."""

    spec: KVSpec
    data: torch.Tensor

    @classmethod
    def zeros(cls, spec: KVSpec, num_blocks: int, device: torch.device) -> KVCache:
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return cls(spec, torch.zeros(shape, dtype=TORCH_DTYPES[spec.dtype], device=device))

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    @property
    def block_stride(self) -> int:
        """Elements from one block to the next."""
        return self.data.stride(0)
