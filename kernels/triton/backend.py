"""The Triton backend: weights, cache and scratch in device memory, a step as a list of launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backend import DTYPE_BYTES, BackendUnavailable, KVSpec
from ..cpu import _native
from ..cpu.sampler import CpuSampler
from ..program import Program
from ..weights import RawWeight, WeightGroup
from . import cublas, sampling, workspace
from . import device as dev
from .cache import KVCache
from .executor import TritonExecutable
from .numerics import TORCH_DTYPES
from .quantised import FLOATS, LAYOUTS, form, packed_bytes
from .tuned import load
from .weights import TritonWeight

# What an option of that name puts in place of the activations that multiply quantised weights.
ACTIVATIONS = {"auto": "", "float32": "", "int8": "int8", "fp8": "fp8"}


class TritonBackend:
    """Implements kernels.backend.Backend.

    activation_dtype: a key of DTYPE_BYTES; results are rounded once to it. Products of operands of
    one 16-bit dtype run in the tensor cores with fp32 sums; others in fp32. threads: of the
    sampler of logits that a processor has changed on the host; None takes the physical cores that
    this process may use. No result depends on it. activations: what multiplies quantised weights,
    "auto" or "float32" for the activations themselves, "int8" or "fp8" for 8 bits with one scale
    per token.

    Errors: ValueError for a dtype or a number of threads that does not exist, or a tuned table that
    is not one; BackendUnavailable for fp8 on a card that has none.
    """

    name = "triton"
    overlaps = True

    def __init__(
        self,
        *,
        activation_dtype: str = "bfloat16",
        threads: int | None = None,
        activations: str = "auto",
    ) -> None:
        if activation_dtype not in DTYPE_BYTES:
            raise ValueError(
                f"activation dtype {activation_dtype!r} is unknown; "
                f"supported: {', '.join(DTYPE_BYTES)}"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"activations={activations!r} is unknown; supported: {', '.join(ACTIVATIONS)}"
            )
        if activations == "fp8" and (lacking := dev.lacks_fp8()):
            raise BackendUnavailable(
                f"activations='fp8': {lacking}; use activations='auto', which multiplies fp8 "
                "weights by the activations themselves"
            )
        self._dtype = activation_dtype
        self._activations = ACTIVATIONS[activations]
        self._device = dev.device()
        self._tuned = load(dev.card())
        self._pool = _native.Pool(threads or _native.usable_cores())

    def pack(self, weight: RawWeight | WeightGroup) -> TritonWeight:
        """Take a weight in; `lower` brings it to the device.

        Errors: ValueError for a format without a kernel, or a number of dimensions.
        """
        parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
        name = "+".join(p.name for p in parts)
        if len(weight.shape) not in (1, 2):
            raise ValueError(
                f"weight {name!r} has shape {list(weight.shape)}; the Triton backend packs weights "
                "of one dimension (norms, biases) or two (matrices)"
            )
        if len({form(p.packed_format) for p in parts}) > 1 and len(weight.shape) == 2:
            formats = ", ".join(p.packed_format.name for p in parts)
            raise ValueError(
                f"weight {name!r} mixes {formats}; the Triton backend takes one format"
            )
        if len(weight.shape) == 1 and any(p.format not in FLOATS for p in parts):
            raise ValueError(f"weight {name!r} of one dimension is quantised; norms are floats")
        return TritonWeight(tuple(parts), tuple(weight.shape))

    def weights_bytes(
        self, program: Program, weights: Mapping[str, RawWeight | WeightGroup]
    ) -> int:
        """Device memory of the weights: matrices in codes or floats, vectors in fp32; each order of
        columns, which several may share, once.

        Errors: BackendUnavailable for weights that `activations` cannot multiply.
        """
        self._check_products(program, weights)
        orders: dict[bytes, int] = {}
        layers: list[Mapping[str, Any]] = [op.attrs for op in program if op.name == "attention"]
        total = sum(4 * len(attrs["alibi_slopes"] or ()) for attrs in layers)
        for weight in weights.values():
            parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
            if len(weight.shape) == 1:
                total += 4 * weight.shape[0]
            else:
                total += sum(map(packed_bytes, parts))
                if parts[0].columns is not None:
                    orders[parts[0].columns.tobytes()] = 4 * len(parts[0].columns)
        return total + sum(orders.values())

    def packing_notes(self, weights: Mapping[str, RawWeight | WeightGroup]) -> tuple[str, ...]:
        """None: every format keeps its values."""
        return ()

    def _check_products(
        self, program: Program, weights: Mapping[str, RawWeight | WeightGroup | TritonWeight]
    ) -> None:
        if not self._activations:
            return
        for op in program:
            if op.name not in ("linear", "expert_linear") or op.inputs[1] is None:
                continue
            weight = weights[program.handles[op.inputs[1]].name]
            for part in (weight,) if isinstance(weight, RawWeight) else weight.parts:
                fmt = part.packed_format
                form(fmt)  # a format without a kernel is refused as that
                if fmt in FLOATS or LAYOUTS[fmt.name].multiplies(self._activations):
                    continue
                able = [k for k, v in LAYOUTS.items() if v.multiplies(self._activations)]
                raise BackendUnavailable(
                    f"activations={self._activations!r}: weight {part.name!r} is {fmt.name}, which "
                    f"the Triton backend does not multiply so; it does {', '.join(able)}. Use "
                    "activations='auto'"
                )

    def kv_dtype(self, activation_dtype: str, quantised: bool) -> str:
        """The activations' own: products with the cache then run in the tensor cores."""
        return activation_dtype

    def allocate_kv(self, spec: KVSpec, num_blocks: int) -> KVCache:
        """A zeroed cache of num_blocks."""
        return KVCache.zeros(spec, num_blocks, self._device)

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
        """What a prepared executable takes, and the sampler, recordings and the vendor's library at
        most: see workspace.py. A step has no more sequences than max_rows."""
        return workspace.plan(
            program,
            dtype=self._dtype,
            activations=self._activations,
            limits=(max_tokens, max_rows, max_context),
            weights=weights,
            kv=kv,
            on_card=self._device.type == "cuda",
        ).total

    def lower(
        self, program: Program, weights: Mapping[str, TritonWeight], kv: KVCache | None
    ) -> TritonExecutable:
        """Bind a finished Program to its weights (by canonical name) and its cache.

        Errors: ValueError for a missing weight, a shape that differs, or a cache that does not fit;
        BackendUnavailable for weights that `activations` cannot multiply; WeightTooLarge.
        """
        self._check_products(program, weights)
        dtype = TORCH_DTYPES[self._dtype]
        products = cublas.PRODUCTS if self._device.type == "cuda" else None
        return TritonExecutable(
            program, weights, kv, dtype, self._device, self._activations, self._tuned, products
        )

    def sampler(self, vocab_size: int) -> sampling.TritonSampler:
        """The sampling program, on the device; on the host for logits that a processor changed."""
        host = CpuSampler(vocab_size, self._pool)
        return sampling.TritonSampler(vocab_size, self._device, host)

    def available_memory(self) -> int | None:
        """Free bytes of the card; None under the interpreter, which uses the host's memory."""
        return dev.free_bytes()

    def describe(self) -> dict[str, str]:
        """Facts for `doctor` and the step log."""
        return {
            "backend": self.name,
            "numerics": (
                f"fp32 sums inside each operation, results rounded to {self._dtype}; products of "
                "equal 16-bit dtypes in tensor cores, attention's weights rounded to that dtype; "
                "quantised weights "
                + (
                    f"multiplied by {self._activations} activations, one scale per token"
                    if self._activations
                    else "multiplied by their own values"
                )
            ),
            "activations": self._dtype,
            "sampling": "on the device",
            "tuned": self._tuned.source,
            **dev.describe(),
        }
