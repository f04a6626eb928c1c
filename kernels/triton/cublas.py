"""Large products of 16-bit weights by the vendor's library (cuBLAS), where law 2 allows it.

Which of its algorithms the library takes follows from a product's shape, so it is called for
numbers of tokens alone that were tried: COUNTS at a time, the rest of a step by our kernel. A
weight's shape is tried once a process, when it is bound on a card: random rows through both, for
each of COUNTS. Only where every bit is our kernel's is the library called, and a row's bits are
then the same whichever of the two computes it. Steps that are recorded are smaller than COUNTS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..program import Program
from . import elementwise, linear, rms_norm
from .quantised import FloatMatrix, Matrix
from .rms_norm import Norm

COUNTS = (2048, 1024)  # tokens of a call, largest first
WORKSPACE = 32 << 20  # bytes that torch takes for the library, of compute capability 9.0
_SEED = 20261129

# x [M, K], W [N, K], out [M, N]: out = x W^T, rounded once.
Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def library(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """torch's product."""
    torch.mm(x, weight.t(), out=out)


class Products:
    """Linear layers by `gemm` where it has our bits, by our kernel where not."""

    def __init__(self, gemm: Gemm = library, counts: tuple[int, ...] = COUNTS) -> None:
        self._gemm = gemm
        self._counts = counts
        self._same: dict[tuple[torch.dtype, tuple[int, int]], bool] = {}

    def has_our_bits(self, weight: Matrix, dtype: torch.dtype) -> bool:
        """Whether the library may multiply activations of dtype by weights of this shape: found out
        where the shape is new."""
        if not isinstance(weight, FloatMatrix) or weight.paired:
            return False
        if weight.data.dtype != dtype or dtype.itemsize != 2:
            return False
        key = (dtype, weight.shape)
        if key not in self._same:
            self._same[key] = all(self._try(weight, count) for count in self._counts)
        return self._same[key]

    def launch(
        self,
        x: torch.Tensor,
        weight: FloatMatrix,
        out: torch.Tensor,
        *,
        after: str = "",
        other: torch.Tensor | None = None,
        norm: Norm | None = None,
        normed: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        """linear.launch, without a bias, of a weight with our bits; `after` is nothing or "add"."""
        done = 0
        if norm is not None and normed is not None and len(x) >= self._counts[-1]:
            rms_norm.launch(x, norm.weight, normed, norm.eps, norm.offset)
            x, norm = normed, None
        for count in self._counts:
            while len(x) - done >= count:
                here = slice(done, done + count)
                self._gemm(x[here], weight.data, out[here])
                if other is not None:
                    elementwise.launch(after, other[here], out[here], out[here])
                done += count
        rest = None if other is None else other[done:]
        linear.launch(
            x[done:], weight, out[done:], after=after, other=rest, norm=norm, normed=normed, **more
        )

    def _try(self, weight: FloatMatrix, count: int) -> bool:
        data = weight.data
        made = torch.Generator(device=data.device).manual_seed(_SEED + count)
        x = torch.randn(count, data.shape[1], device=data.device, generator=made).to(data.dtype)
        ours, theirs = (
            torch.empty(count, data.shape[0], device=data.device, dtype=data.dtype)
            for _ in range(2)
        )
        linear.launch(x, weight, ours, round_to=data.dtype)
        self._gemm(x, data, theirs)
        return torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


PRODUCTS = Products()  # of this process


def workspace_bytes(program: Program) -> int:
    """The library's own, and that of trying out the largest layer; the fp32 head is not tried."""
    head = program.fp32_values()
    layers = [op for op in program if op.name == "linear" and op.output not in head]
    width = sum(int(program.handles[op.output].shape[1]) for op in layers[:3])
    sizes = [
        int(program.handles[op.inputs[0]].shape[1])  # type: ignore[index]
        + 2 * max(width, int(program.handles[op.output].shape[1]))
        for op in layers
    ]
    return WORKSPACE + 2 * COUNTS[0] * max(sizes, default=0)
