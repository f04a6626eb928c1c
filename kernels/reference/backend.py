"""The reference backend: readable torch on the CPU, specification and oracle of the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..backend import DTYPE_BYTES, KVSpec
from ..program import Program
from ..weights import RawWeight, WeightGroup
from . import linear as lin
from .attention import TORCH_DTYPES, KVCache
from .executor import ReferenceExecutable
from .sampling import ReferenceSampler
from .workspace import workspace_bytes


class ReferenceBackend:
    """Implements kernels.backend.Backend.

    activation_dtype: a key of DTYPE_BYTES; each operation computes in fp32 and rounds its result
    once to it. threads: how many share the matrix products; None takes torch's own number. No
    result depends on it. While a step runs, torch itself is held to one thread, process-wide,
    and set back afterwards.

    Errors: ValueError for a dtype or a number of threads that does not exist.
    """

    name = "reference"
    overlaps = False

    def __init__(self, *, activation_dtype: str = "float32", threads: int | None = None) -> None:
        if activation_dtype not in DTYPE_BYTES:
            raise ValueError(
                f"activation dtype {activation_dtype!r} is unknown; "
                f"supported: {', '.join(DTYPE_BYTES)}"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._dtype_name = activation_dtype
        self._workers = lin.Workers(torch.get_num_threads() if threads is None else threads)

    def pack(self, weight: RawWeight | WeightGroup) -> lin.PackedWeight | torch.Tensor:
        """Matrices keep the checkpoint's bytes, vectors become fp32. Errors: ValueError: others."""
        return lin.pack(weight, self._workers.count)

    def weights_bytes(
        self, program: Program, weights: Mapping[str, RawWeight | WeightGroup]
    ) -> int:
        """The mapped file's bytes, matrices being read in place, those of matrices that are
        quantised, and fp32 copies of vectors."""
        return sum(_file_bytes(w) + _vector_bytes(w) for w in weights.values())

    def packing_notes(self, weights: Mapping[str, RawWeight | WeightGroup]) -> tuple[str, ...]:
        """None: every format keeps its values."""
        return ()

    def kv_dtype(self, activation_dtype: str, quantised: bool) -> str:
        """The activations' own."""
        return activation_dtype

    def allocate_kv(self, spec: KVSpec, num_blocks: int) -> KVCache:
        """A zeroed cache of num_blocks."""
        return KVCache.zeros(spec, num_blocks)

    def workspace_bytes(
        self,
        program: Program,
        max_tokens: int,
        max_rows: int,
        max_context: int,
        *,
        weights: Mapping[str, RawWeight | WeightGroup] | None = None,
        kv: KVSpec | None = None,
    ) -> int:
        """Upper bound of the tensors that a step allocates; none grows with the context, nor
        does the bound depend on weights or cache."""
        itemsize = DTYPE_BYTES[self._dtype_name]
        return workspace_bytes(program, max_tokens, max_rows, itemsize, self._workers.count)

    def lower(
        self,
        program: Program,
        weights: Mapping[str, lin.PackedWeight | torch.Tensor],
        kv: KVCache | None,
    ) -> ReferenceExecutable:
        """Bind a finished Program to its weights (by canonical name) and its cache.

        Errors: ValueError for a missing weight, a shape that differs, or a cache that does not fit.
        """
        dtype = TORCH_DTYPES[self._dtype_name]
        return ReferenceExecutable(program, weights, kv, dtype, self._workers)

    def sampler(self, vocab_size: int) -> ReferenceSampler:
        """The sampling program over logits of vocab_size."""
        return ReferenceSampler(vocab_size)

    def available_memory(self) -> None:
        """The host's memory is meant."""

    def describe(self) -> dict[str, str]:
        """Facts for `doctor` and the step log."""
        return {
            "backend": self.name,
            "numerics": (
                f"fp32 inside each operation, results rounded to {self._dtype_name}, "
                "weights multiplied by their own (dequantised) values"
            ),
            "activations": self._dtype_name,
            "threads": str(self._workers.count),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }


def _file_bytes(weight: RawWeight | WeightGroup) -> int:
    parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
    return sum(part.packed_nbytes for part in parts)


def _vector_bytes(weight: RawWeight | WeightGroup) -> int:
    return 4 * weight.shape[0] if len(weight.shape) == 1 else 0
