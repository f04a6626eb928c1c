"""`engineroom quantize`: a 16-bit folder in, a compressed-tensors folder out.

Rounding to nearest takes a tensor at a time (quantize_write.py). GPTQ and AWQ run the model over a
calibration text and take a tap at a time (quantize_solve.py): each layer is calibrated on what the
layers before it, already rounded, give it. What a tap came to is kept in OUT.work at once
(quantize_parts.py), so that a run that was killed goes on: it runs the model again up to there, and
solves nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...quant.compress import SCHEMES
from ...quant.rounding import Integers
from ..config import ConfigError
from ..load.checkpoint import Checkpoint, open_checkpoint
from ..load.source import resolve
from .quantize_model import Model, open_for_quantising
from .quantize_parts import Parts
from .quantize_solve import Calibrated, Calibration, calibrated, nearest
from .quantize_write import write
from .texts import Text

# What each kind of format is made by; the formats of GGUF are quantize_gguf.py's.
METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(SCHEMES, ("rtn", "gptq", "awq")),
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_K", "Q6_K"), ("rtn", "imatrix")),
}
FORMATS = tuple(METHODS)
DEFAULT_METHODS = {"W4A16": "gptq", "W4A16_ASYM": "gptq"}
DEFAULT_METHODS |= dict.fromkeys(("Q4_0", "Q4_K", "Q6_K"), "imatrix")  # others: rtn
_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class QuantizeConfig:
    """What `quantize` was asked for. group_size None: the largest that fits every layer."""

    model: str
    out: str
    method: str = "rtn"
    format: str = "W4A16"
    group_size: int | None = None
    samples: int = 32
    context: int = 512
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _one_of("format", self.format, METHODS)
        _one_of("method", self.method, METHODS[self.format], f" as {self.format}")
        grid = SCHEMES[self.format].grid if self.format in SCHEMES else None
        calibrated = self.method in ("gptq", "awq")
        if calibrated and (grid is None or (self.method == "awq" and grid.bits != 4)):
            kinds = "4-bit integers" if self.method == "awq" else "integers"
            raise ConfigError(
                "method", f"method {self.method} makes {kinds}, not {self.format}; take rtn for it"
            )
        if self.group_size is not None and (grid is None or grid.group_size == -1):
            raise ConfigError("group_size", f"{self.format} has no groups to choose the size of")
        if self.group_size is not None and self.group_size not in _GROUP_SIZES:
            raise ConfigError(
                "group_size", f"group_size is one of {_GROUP_SIZES}, not {self.group_size}"
            )
        for name, least in (("samples", 1), ("context", 16)):
            if getattr(self, name) < least:
                raise ConfigError(name, f"{name} is at least {least}, not {getattr(self, name)}")


def _one_of(name: str, value: str, known: Any, where: str = "") -> None:
    if value not in known:
        raise ConfigError(
            name, f"{name} {value!r} is not made{where}; these are: {', '.join(known)}"
        )


def quantize(config: QuantizeConfig, text: Text, *, restart: bool = False) -> dict[str, Any]:
    """Make the folder `config.out`; what was made, as plain values.

    Errors: ConfigError for what cannot be made of this model; those of opening it; OSError.
    """
    started = time.perf_counter()
    out = Path(config.out)
    if os.path.lexists(out):
        raise ConfigError("out", f"{out} exists already; name a folder that does not, or remove it")
    source = resolve(config.model)
    checkpoint = open_checkpoint(source.path)
    try:
        model = open_for_quantising(checkpoint, config.format, config.context)
        grid = _grid(config, model)
        key = _key(config, checkpoint, text, grid)
        work = Path(f"{out}.work")
        if config.method == "rtn":
            made = Calibrated(lambda name: nearest(model.matrices[name], _required(grid)))
        else:
            parts = Parts(work, key, restart)
            made = calibrated(_calibration(config), model, _required(grid), text, parts)
        write(out, model, config.format, grid, made, key)
        shutil.rmtree(work, ignore_errors=True)
        size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        return {
            "model": source.name,
            "out": str(out),
            "method": config.method,
            "format": config.format,
            "group_size": None if grid is None else grid.group_size,
            "weights": len(model.names),
            "experts": {"few_tokens": made.few, "of": sum(model.experts.values())}
            if model.experts
            else None,
            "bytes_before": checkpoint.total_bytes,
            "bytes": size,
            "mean_relative_error": float(np.mean(made.errors)) if made.errors else None,
            "text": {"name": text.name, "sha256": text.sha256} if made.errors else None,
            "seconds": time.perf_counter() - started,
        }
    finally:
        checkpoint.close()


def _required(grid: Integers | None) -> Integers:
    assert grid is not None  # FP8 has none, and is made of the tensors themselves
    return grid


def _calibration(config: QuantizeConfig) -> Calibration:
    return Calibration(config.method, config.samples, config.context, config.device, config.threads)


def _grid(config: QuantizeConfig, model: Model) -> Integers | None:
    """The scheme's grid with its group size settled. Errors: ConfigError."""
    grid = SCHEMES[config.format].grid
    widths = sorted({matrix.weight.shape[1] for matrix in model.matrices.values()})
    least = 128 if SCHEMES[config.format].block else 32
    odd = [w for w in widths if w % least]
    if odd:
        raise ConfigError(
            "format", f"rows of {odd[0]} columns are no whole groups of {least}, as the kernels ask"
        )
    if grid is None or grid.group_size == -1:
        return grid
    fitting = [g for g in _GROUP_SIZES if not any(w % g for w in widths)]
    if config.group_size is not None and config.group_size not in fitting:
        raise ConfigError(
            "group_size",
            f"rows of {', '.join(map(str, widths))} columns are not all whole groups of "
            f"{config.group_size}; {', '.join(map(str, fitting))} would do",
        )
    return replace(grid, group_size=config.group_size or fitting[0])


def _key(config: QuantizeConfig, checkpoint: Checkpoint, text: Text, grid: Integers | None) -> str:
    """What the result depends on; where it is written and how many threads there are is not."""
    options = {k: v for k, v in asdict(config).items() if k not in ("model", "out", "threads")}
    if config.method == "rtn":
        options = {k: options[k] for k in ("method", "format")}
    facts: list[Any] = [options, None if grid is None else asdict(grid), checkpoint.fingerprint()]
    facts += [text.sha256] if config.method != "rtn" else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    group = report["group_size"]
    sizes = "" if group in (None, -1) else f", groups of {group}"
    lines = [
        f"{report['out']}: {report['weights']} weights by {report['method']} to "
        f"{report['format']}{sizes}; {report['bytes_before'] / 2**20:.1f} MiB became "
        f"{report['bytes'] / 2**20:.1f} MiB in {report['seconds']:.1f} s"
    ]
    if report["mean_relative_error"] is not None:
        lines.append(
            f"error of a layer's output on the calibration text, mean: "
            f"{report['mean_relative_error']:.5f} of its square"
        )
    experts = report["experts"]
    if experts is not None and experts["few_tokens"]:
        lines.append(
            f"{experts['few_tokens']} of {experts['of']} matrices of experts saw too few tokens to "
            "be calibrated and were rounded to nearest; take a longer text, or more --samples"
        )
    return "\n".join(lines)


__all__ = [
    "DEFAULT_METHODS",
    "FORMATS",
    "METHODS",
    "QuantizeConfig",
    "quantize",
    "render",
]
