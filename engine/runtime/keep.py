"""Weights quantised on load, kept in a folder that loads as it is: `save`.

A tensor is read once, quantised, written, and let go. The folder is whole or not there, and a run
that was stopped goes on where it was (engine/load/save.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.cpu import _native
from ...kernels.cpu.quantise import as_packed
from ...kernels.weights import Format, RawWeight, WeightGroup
from ...quant.own import METHOD
from ..config import ConfigError
from ..load.checkpoint import Checkpoint, open_checkpoint
from ..load.save import Tensor, write_checkpoint

_BESIDE = (".json", ".jinja", ".model", ".txt")  # tokenizers, templates, generation_config.json
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def keep_quantised(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, RawWeight | WeightGroup],
    method: str,
    say: Callable[[str], None],
) -> None:
    """Write the folder, if it does not hold the same already.

    `weights` are the checkpoint's, marked by what they become (quant/policy.py). A relative path
    is below the working folder.

    Errors: ConfigError for a checkpoint that is no folder of plain floats, or a folder that holds
    something else; WeightTooLarge; OSError of the disk.
    """
    if checkpoint.kind != "safetensors" or checkpoint.quantised:
        what = "a GGUF file" if checkpoint.kind == "gguf" else "quantised already"
        raise ConfigError(
            "save",
            f"save={str(folder)!r} keeps what is quantised of a folder of 16- or 32-bit "
            f"safetensors; {checkpoint.path} is {what}. Load it without save",
        )
    about = {"quant_method": METHOD, "scheme": method, "source": checkpoint.fingerprint()}
    if os.path.lexists(folder):
        _require_same(folder, about)
        say(f"loading what was quantised before, {folder}")
        return
    say(f"quantising {checkpoint.path} into {folder}")
    targets = _targets(weights)
    total, done, shown = checkpoint.total_bytes, 0, 0

    def progress(tensor: Tensor) -> None:
        nonlocal done, shown
        done += sizes[tensor.name]
        if done * 10 // total > shown:
            shown = done * 10 // total
            say(f"quantised {shown * 10}%")

    tensors, sizes = [], {}
    for tensor, nbytes in _tensors(checkpoint, targets):
        tensors.append(tensor)
        sizes[tensor.name] = nbytes
    beside = [
        path
        for path in sorted(checkpoint.path.iterdir())
        if path.suffix in _BESIDE and path.name not in _NOT_COPIED and path.is_file()
    ]
    config = {**checkpoint.metadata, "quantization_config": about}
    key = " ".join(about.values())
    write_checkpoint(folder, config, tensors, beside, key=key, progress=progress)


def _require_same(folder: Path, about: Mapping[str, Any]) -> None:
    found = open_checkpoint(folder)
    try:
        have = found.metadata.get("quantization_config")
    finally:
        found.close()
    if have != about:
        raise ConfigError(
            "save",
            f"save={str(folder)!r}: the folder holds other weights than these ({have}, not "
            f"{about}); remove it, or name another",
        )


def _targets(weights: Mapping[str, RawWeight | WeightGroup]) -> dict[str, Format]:
    """What each of the checkpoint's tensors becomes; those that are not among them stay."""
    targets: dict[str, Format] = {}
    for weight in weights.values():
        for part in weight.parts if isinstance(weight, WeightGroup) else (weight,):
            if part.pack_as is not None:
                targets[part.name.split("[")[0]] = part.pack_as  # rows of a fused tensor
    return targets


def _tensors(checkpoint: Checkpoint, targets: Mapping[str, Format]) -> Iterator[tuple[Tensor, int]]:
    """Each tensor as it is to be written, and how many bytes it has in the checkpoint."""
    for name in checkpoint.tensor_names:
        weight = checkpoint.tensor(name)
        fmt = targets.get(name)
        if fmt is None:
            yield Tensor(name, weight.format.name, weight.shape, weight.data), weight.nbytes
            continue
        shape = (weight.num_rows, fmt.row_bytes(weight.shape[-1]))
        made = partial(_rows, replace(weight, pack_as=fmt))
        yield Tensor(f"{name}_{fmt.name.lower()}", "U8", shape, made), weight.nbytes


def _rows(weight: RawWeight) -> np.ndarray:
    return as_packed(weight, _native.usable_cores()).data


__all__ = ["keep_quantised"]
