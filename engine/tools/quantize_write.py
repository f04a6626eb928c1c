"""Writing what `quantize` made as a compressed-tensors folder, a tensor at a time.

A module's matrices are rounded, or read from where calibration kept them, when the first of its
tensors is written, and let go with the last. Shards that an earlier run finished are not made again
(engine/load/save.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...quant.compress import SCHEMES, fp8_tensors, integer_tensors, layout, quantization_config
from ...quant.rounding import Integers, Rounded, join, to_bfloat16
from ..load.save import Tensor, write_checkpoint
from .quantize_model import Model, chunks
from .quantize_solve import Calibrated

_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")
_WRITTEN = ("config.json", "model.safetensors.index.json", "engineroom-eval.json")


def write(
    out: Path, model: Model, format: str, grid: Integers | None, made: Calibrated, key: str
) -> None:
    """Make the folder; `key`: what all of it depends on. Errors: those of write_checkpoint."""
    folder = model.checkpoint.path
    copied = sorted({p for pattern in _COPIED for p in folder.glob(pattern)})
    settings = dict(model.checkpoint.metadata)
    settings["quantization_config"] = quantization_config(SCHEMES[format], grid, model.kept)
    write_checkpoint(
        out,
        settings,
        _Tensors(model, format, grid, made),
        [p for p in copied if p.name not in _WRITTEN and p.is_file()],
        key=key,
    )


class _Tensors:
    """Every tensor of the new checkpoint, made when its turn comes."""

    def __init__(self, model: Model, format: str, grid: Integers | None, made: Calibrated) -> None:
        self._model, self._scheme, self._grid = model, SCHEMES[format], grid
        self._made = made
        self._small = model.small()
        self._left: dict[str, np.ndarray] = {}  # tensors of one module that are still to be written

    def __iter__(self) -> Iterator[Tensor]:
        for name in self._model.checkpoint.tensor_names:
            weight = self._model.checkpoint.tensor(name)
            if name in self._small:
                module = name.removesuffix(".weight")
                num_rows, columns = weight.shape
                shapes = layout(num_rows, columns, self._scheme, self._grid)
                for suffix, (dtype, shape) in shapes.items():
                    yield Tensor(module + suffix, dtype, shape, partial(self._take, name, suffix))
            elif name in self._made.norms:
                yield Tensor(name, "BF16", weight.shape, _bits(self._made.norms[name]))
            else:
                yield Tensor(name, weight.format.name, weight.shape, weight.data)

    def _take(self, name: str, suffix: str) -> np.ndarray:
        if not self._left:
            self._left = self._make(name)
        return self._left.pop(suffix)

    def _make(self, name: str) -> dict[str, np.ndarray]:
        if self._grid is None:
            weight = self._model.checkpoint.tensor(name)
            runs = [fp8_tensors(values, self._scheme) for _, values in chunks(weight)]
            return {
                suffix: np.concatenate([run[suffix][2] for run in runs])
                for suffix in (".weight", ".weight_scale")
            }
        whole = join([self._with_divided(key) for key in self._small[name]])
        stored = integer_tensors(whole, self._grid, self._scheme.form)
        return {suffix: np.ascontiguousarray(data) for suffix, (_, _, data) in stored.items()}

    def _with_divided(self, key: str) -> Rounded:
        made, by = self._made.rounded(key), self._made.divided.get(key)
        return made if by is None else replace(made, scale=to_bfloat16(made.scale / by[:, None]))


def _bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 numbers in float32 -> their 16 bits."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


__all__ = ["write"]
