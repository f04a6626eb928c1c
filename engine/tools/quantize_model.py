"""A 16-bit folder opened for quantising: its program, and the matrices that become small.

A matrix is what one linear layer multiplies by; of a mixture, one expert's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...kernels.program import Program
from ...kernels.weights import RawWeight, WeightGroup, release_pages
from ...quant.values import dequantise
from .. import models
from ..config import ConfigError
from ..load.checkpoint import Checkpoint
from ..models import Source
from ..runtime.assemble import linear_weights
from ..runtime.load import open_model, raw_weights
from .calibration import Weights

_CHUNK = 1 << 18  # elements of a matrix that are float32 at a time, about
_ROWS = 128  # runs are whole multiples of it, as FP8's blocks are


@dataclass(frozen=True, eq=False)
class Matrix:
    """`source`: the checkpoint's tensor that it is, or is rows of."""

    weight: RawWeight
    source: Source

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        return chunks(self.weight)


def chunks(weight: RawWeight) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of a matrix's rows, and their float32 values [n, K]; the file's pages are let go."""
    step = max(1, _CHUNK // weight.shape[1] // _ROWS) * _ROWS
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        part = weight.rows(rows.start, rows.stop)
        yield rows, dequantise(part)
        release_pages(part.data)


@dataclass(frozen=True, eq=False)
class Model:
    """names: canonical, of the weights that become small; experts: of those of a mixture, how many
    each has; matrices: by `key_of`; tensors: of weights that are one, its name; kept: modules of
    linear layers that stay as they are."""

    checkpoint: Checkpoint
    program: Program
    weights: Weights
    names: tuple[str, ...]
    experts: Mapping[str, int]
    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, str]
    kept: tuple[str, ...]

    def small(self) -> dict[str, list[str]]:
        """Each checkpoint tensor that becomes small, and the keys of what its rows are."""
        found: dict[str, list[str]] = {}
        for key, matrix in self.matrices.items():
            found.setdefault(matrix.source.name, []).append(key)
        return {
            tensor: sorted(keys, key=lambda key: (self.matrices[key].source.rows or (0, 0))[0])
            for tensor, keys in found.items()
        }


def key_of(name: str, expert: int | None) -> str:
    """What a matrix is called: its weight's canonical name, of an expert with its number."""
    return name if expert is None else f"{name}.{expert}"


def open_for_quantising(checkpoint: Checkpoint, format: str, context: int) -> Model:
    """Errors: ConfigError for what `format` is not made of; those of opening the model."""
    if checkpoint.kind != "safetensors" or checkpoint.quantised:
        what = "a GGUF file" if checkpoint.kind == "gguf" else "quantised already"
        raise ConfigError(
            "model",
            f"{checkpoint.path} is {what}; {format} is made from a folder of 16- or 32-bit "
            "safetensors",
        )
    module, config = open_model(checkpoint)
    program = models.record(module, config.replace(max_position=context, dtype="float32"))
    weights = dict(raw_weights(checkpoint, module, config))
    sources = {spec.name: spec.hf for spec in module.weights(config)}
    experts = {
        program.handles[op.inputs[1]].name: int(op.attrs["num_experts"])  # type: ignore[index,arg-type]
        for op in program
        if op.name == "expert_linear"
    }
    names = tuple(name for name in linear_weights(program)[:-1] if name in weights)
    there = frozenset(checkpoint.tensor_names)
    matrices: dict[str, Matrix] = {}
    for name in names:
        if not there.issuperset(source.name for source in sources[name]):
            raise ConfigError(
                "model",
                f"{checkpoint.path} has the experts of {name} in one tensor; {format} is made of a "
                "tensor an expert, as checkpoints are published (transformers 4 writes them so)",
            )
        weight = weights[name]
        parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
        numbers = range(len(parts)) if name in experts else [None]
        for number, part, source in zip(numbers, parts, sources[name], strict=True):
            matrices[key_of(name, number)] = Matrix(part, source)
    tensors = {name: of[0].name for name, of in sources.items() if len(of) == 1}
    small = {matrix.source.name for matrix in matrices.values()}
    every = {tensors.get(name, "") for name in linear_weights(program, every=True)[:-1]} - {""}
    kept = {"lm_head"} | {name.removesuffix(".weight") for name in every - small}
    return Model(
        checkpoint, program, weights, names, experts, matrices, tensors, tuple(sorted(kept))
    )


__all__ = ["Matrix", "Model", "chunks", "key_of", "open_for_quantising"]
