"""`engineroom quantize`: a 16-bit folder in, a compressed-tensors folder out.

Rounding to nearest takes a tensor at a time. GPTQ and AWQ run the model over a calibration text and
take a tap at a time (calibration.py): each layer is calibrated on what the layers before it,
already rounded, give it. What a tap came to is kept in OUT.work at once, so that a run that was
killed goes on: it runs the model again up to there, and solves nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.backend import choose, create
from ...kernels.program import Program
from ...kernels.weights import RawWeight, WeightGroup
from ...quant import calibrate
from ...quant.compress import (
    SCHEMES,
    Stored,
    fp8_tensors,
    integer_tensors,
    quantization_config,
)
from ...quant.rounding import Integers, Rounded, round_to_nearest, to_bfloat16
from ...quant.values import dequantise
from .. import models
from ..config import ConfigError, ModelConfig
from ..load.checkpoint import Checkpoint, open_checkpoint
from ..load.save import Tensor, write_checkpoint
from ..load.source import resolve
from ..load.tokenizer import load_tokenizer
from ..models import Family, Source
from ..runtime.assemble import linear_weights
from ..runtime.load import open_model, raw_weights
from .calibration import Tap, Taps, Weights, float_weight, moments, taps
from .texts import Text

# What each kind of format is made by; the formats of GGUF are quantize_gguf.py's.
METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(SCHEMES, ("rtn", "gptq", "awq")),
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_K", "Q6_K"), ("rtn", "imatrix")),
}
FORMATS = tuple(METHODS)
DEFAULT_METHODS = {"W4A16": "gptq", "W4A16_ASYM": "gptq"}
DEFAULT_METHODS |= dict.fromkeys(("Q4_0", "Q4_K", "Q6_K"), "imatrix")  # others: rtn
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")
_WRITTEN = ("config.json", "model.safetensors.index.json", "engineroom-eval.json")
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


@dataclass(frozen=True)
class _Model:
    """A 16-bit model opened for quantising: its program, weights, and what each is read from."""

    checkpoint: Checkpoint
    module: Family
    config: ModelConfig
    program: Program
    weights: Weights
    names: tuple[str, ...]  # canonical, of the weights that become small
    sources: Mapping[str, Source]  # of a canonical name, where it has one

    def tensors(self) -> dict[str, list[str]]:
        """Each checkpoint tensor that becomes small, and the weights that are its rows."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(self.sources[name].name, []).append(name)
        return {
            tensor: sorted(names, key=lambda n: (self.sources[n].rows or (0, 0))[0])
            for tensor, names in found.items()
        }


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
        model = _open(checkpoint, config)
        grid = _grid(config, model)
        work = Path(f"{out}.work")
        key = _key(config, checkpoint, text, grid)
        parts = _Parts(work, key, restart)
        made = _Made(config, model, grid)
        if config.method != "rtn":
            errors = _calibrate(config, model, grid, text, parts, made)
        else:
            errors = []
        _write(out, config, model, grid, made, key)
        shutil.rmtree(work, ignore_errors=True)
        size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        return {
            "model": source.name,
            "out": str(out),
            "method": config.method,
            "format": config.format,
            "group_size": None if grid is None else grid.group_size,
            "weights": len(model.names),
            "bytes_before": checkpoint.total_bytes,
            "bytes": size,
            "mean_relative_error": float(np.mean(errors)) if errors else None,
            "text": {"name": text.name, "sha256": text.sha256} if errors else None,
            "seconds": time.perf_counter() - started,
        }
    finally:
        checkpoint.close()


# ------------------------------------------------------------------------------------ the model


def _open(checkpoint: Checkpoint, config: QuantizeConfig) -> _Model:
    if checkpoint.kind != "safetensors" or checkpoint.quantised:
        what = "a GGUF file" if checkpoint.kind == "gguf" else "quantised already"
        raise ConfigError(
            "model",
            f"{checkpoint.path} is {what}; {config.format} is made from a folder of 16- or 32-bit "
            "safetensors",
        )
    module, model = open_model(checkpoint)
    shown = model.replace(max_position=config.context, dtype="float32")
    program = models.record(module, shown)
    weights = dict(raw_weights(checkpoint, module, model))
    sources = {spec.name: spec.hf for spec in module.weights(model)}
    names = tuple(name for name in linear_weights(program)[:-1] if name in weights)
    split = [n for n in names if len(sources[n]) != 1 or sources[n][0].shape is not None]
    if split or (model.num_experts and config.method != "rtn"):
        raise ConfigError(
            "model",
            f"{checkpoint.path}: a mixture of experts is not quantised by {config.method} here"
            + (f" ({split[0]} is read from several tensors)" if split else ", only by rtn"),
        )
    single = {name: of[0] for name, of in sources.items() if len(of) == 1}
    return _Model(checkpoint, module, model, program, weights, names, single)


def _grid(config: QuantizeConfig, model: _Model) -> Integers | None:
    """The scheme's grid with its group size settled. Errors: ConfigError."""
    grid = SCHEMES[config.format].grid
    widths = sorted({model.weights[name].shape[1] for name in model.names})
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


# -------------------------------------------------------------------------------- what is made


@dataclass(frozen=True, eq=False)
class _Tapped:
    """What a tap came to: its weights rounded, and what their columns were multiplied by [K]."""

    rounded: dict[str, Rounded]
    by: np.ndarray
    error: float


class _Made:
    """Rounded weights by canonical name, and norms with factors folded in."""

    def __init__(self, config: QuantizeConfig, model: _Model, grid: Integers | None) -> None:
        self._config, self._model, self._grid = config, model, grid
        self._rounded: dict[str, Rounded] = {}
        self.norms: dict[str, np.ndarray] = {}  # by tensor

    def take(self, tap: Tap, tapped: _Tapped) -> None:
        """Keep a tap's weights; what their columns were multiplied by goes into who makes them."""
        self._rounded |= tapped.rounded
        if (tapped.by == 1).all():
            return
        where = scalable(self._model.program, tap)
        assert where is not None
        if tap.maker.name == "rms_norm":
            norm = _values(self._model.weights[where])
            offset = float(tap.maker.attrs["offset"])  # type: ignore[arg-type]
            folded, _ = calibrate.folded_norm(norm, offset, tapped.by)
            self.norms[self._model.sources[where].name] = folded
        else:
            up = self._rounded[where]
            scale = to_bfloat16(up.scale / tapped.by[:, None])
            self._rounded[where] = replace(up, scale=scale)

    def tensors(self, names: list[str]) -> dict[str, Stored]:
        """The tensors of one module whose rows these weights are."""
        scheme = SCHEMES[self._config.format]
        if self._grid is None:
            values = np.concatenate([_values(self._model.weights[n]) for n in names])
            return fp8_tensors(values, scheme)
        rounded = [self._of(name) for name in names]
        whole = Rounded(
            *(np.concatenate([getattr(r, f) for r in rounded]) for f in ("q", "scale", "zero"))
        )
        return integer_tensors(whole, self._grid, scheme.form)

    def _of(self, name: str) -> Rounded:
        if name in self._rounded:
            return self._rounded[name]
        assert self._grid is not None
        return round_to_nearest(_values(self._model.weights[name]), self._grid)


def scalable(program: Program, tap: Tap) -> str | None:
    """The weight whose rows (or elements) may be divided so that the tap's columns are.

    A norm's, or the up layer's behind a gate; None where there is none, or others read the value.
    """
    made_by = {op.output: op for op in program}
    if not tap.alone:
        return None
    if tap.maker.name == "rms_norm":
        weight = program.handles[tap.maker.inputs[1]]  # type: ignore[index]
        return weight.name if weight.shape == program.handles[tap.value].shape[1:] else None
    if tap.maker.name in ("silu_mul", "gelu_tanh_mul"):
        up = made_by[tap.maker.inputs[1]]  # type: ignore[index]
        readers = sum(up.output in op.inputs for op in program)
        if up.name == "linear" and up.inputs[2] is None and readers == 1:
            return program.handles[up.inputs[1]].name  # type: ignore[index]
    return None


# --------------------------------------------------------------------------------- calibration


def _calibrate(
    config: QuantizeConfig,
    model: _Model,
    grid: Integers | None,
    text: Text,
    parts: _Parts,
    made: _Made,
) -> list[float]:
    """Go through the taps; the relative error of each on the calibration inputs."""
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    assert grid is not None
    backend = create(
        choose(config.device),
        activation_dtype="float32",
        threads=config.threads,
        activations="float32",
    )
    found = taps(model.program, model.names)
    running = Taps(
        model.program, dict(model.weights), backend, sequences(config, model.checkpoint, text)
    )
    errors = []
    bar = tqdm(
        running.go(found),
        total=len(found),
        desc="calibrating",
        unit="tap",
        disable=not sys.stderr.isatty(),
    )
    replaced: tuple[str, ...] = ()
    for index, (tap, rows) in enumerate(bar):
        for name in replaced:  # what they make is known by now
            running.weights[name] = model.weights[name]
        replaced = tap.weights
        tapped = parts.load(index)
        if tapped is None:
            tapped = _solve(config, model, grid, tap, rows)
            parts.save(index, tapped)
        made.take(tap, tapped)
        for name, rounded in tapped.rounded.items():
            # As multiplied by the tap's columns, which are not divided in this run.
            running.weights[name] = float_weight(name, rounded.values() / tapped.by)
        errors.append(tapped.error)
    return errors


def sequences(config: QuantizeConfig, checkpoint: Checkpoint, text: Text) -> list[list[int]]:
    """Up to `samples` runs of `context` tokens, evenly spread over the text."""
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text.text, parse_special=False)
    room = len(ids) // config.context
    if not room:
        raise ConfigError(
            "text",
            f"{text.name} has {len(ids)} tokens; one sample takes {config.context}. Take a longer "
            "text, or a smaller --context",
        )
    count = min(config.samples, room)
    starts = [i * room // count * config.context for i in range(count)]
    chosen = [ids[start : start + config.context] for start in starts]
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        for sequence in chosen:
            sequence[0] = tokenizer.bos_token_id
    return chosen


def _solve(
    config: QuantizeConfig, model: _Model, grid: Integers, tap: Tap, rows: np.ndarray
) -> _Tapped:
    each = [_values(model.weights[name]) for name in tap.weights]
    values, hessian = np.concatenate(each), moments(rows)
    by = np.ones(values.shape[1], np.float32)
    if config.method == "gptq":
        rounded = calibrate.gptq(values, hessian, grid)
    else:
        where = scalable(model.program, tap)
        if where is not None:
            by = calibrate.awq_scales(values, hessian, np.abs(rows).mean(axis=0), grid)
            if tap.maker.name == "rms_norm":
                offset = float(tap.maker.attrs["offset"])  # type: ignore[arg-type]
                _, by = calibrate.folded_norm(_values(model.weights[where]), offset, by)
        rounded = calibrate.awq(values, hessian, grid, by)
    error = calibrate.relative_error(values, rounded.values() / by, hessian)
    split, at = {}, 0
    for name, part in zip(tap.weights, each, strict=True):
        split[name] = rounded.rows(at, at + len(part))
        at += len(part)
    return _Tapped(split, by, error)


class _Parts:
    """What each tap came to, in a folder: written whole or not at all, and only for one key."""

    def __init__(self, folder: Path, key: str, restart: bool) -> None:
        self._folder = folder
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_suffix(".part"), ignore_errors=True)
        manifest = folder / "manifest.json"
        if manifest.exists():
            if json.loads(manifest.read_text("utf-8")) != {"key": key}:
                raise ConfigError(
                    "out",
                    f"{folder} was begun with other options, another text or another model; go on "
                    "with those, or begin anew with --restart",
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._write(manifest, lambda file: file.write(json.dumps({"key": key}).encode()))

    def load(self, index: int) -> _Tapped | None:
        path = self._path(index)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            names = [key.removesuffix("/q") for key in arrays if key.endswith("/q")]
            rounded = {
                name: Rounded(*(arrays[f"{name}/{f}"] for f in ("q", "scale", "zero")))
                for name in names
            }
            return _Tapped(rounded, arrays["by"], float(arrays["error"]))

    def save(self, index: int, tapped: _Tapped) -> None:
        arrays = {
            f"{name}/{f}": getattr(rounded, f)
            for name, rounded in tapped.rounded.items()
            for f in ("q", "scale", "zero")
        }
        arrays |= {"by": tapped.by, "error": np.array(tapped.error)}
        self._write(self._path(index), lambda file: np.savez(file, **arrays))

    def _path(self, index: int) -> Path:
        return self._folder / f"tap-{index:04}.npz"

    def _write(self, path: Path, write: Callable[[Any], Any]) -> None:
        part = path.with_suffix(".growing")
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _key(config: QuantizeConfig, checkpoint: Checkpoint, text: Text, grid: Integers | None) -> str:
    """What the result depends on; where it is written and how many threads there are is not."""
    options = {k: v for k, v in asdict(config).items() if k not in ("model", "out", "threads")}
    if config.method == "rtn":
        options = {k: options[k] for k in ("method", "format")}
    facts = [options, None if grid is None else asdict(grid), checkpoint.fingerprint()]
    facts += [text.sha256] if config.method != "rtn" else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------- writing


def _write(
    out: Path,
    config: QuantizeConfig,
    model: _Model,
    grid: Integers | None,
    made: _Made,
    key: str,
) -> None:
    folder = model.checkpoint.path
    small = model.tensors()
    ignore = sorted(
        {"lm_head"}
        | {
            source.name.removesuffix(".weight")
            for name in linear_weights(model.program, every=True)[:-1]
            for source in [model.sources.get(name)]
            if source is not None and source.name not in small
        }
    )
    copied = sorted({p for pattern in _COPIED for p in folder.glob(pattern)})
    settings = dict(model.checkpoint.metadata)
    settings["quantization_config"] = quantization_config(SCHEMES[config.format], grid, ignore)
    write_checkpoint(
        out,
        settings,
        _tensors(model, made, small),
        [p for p in copied if p.name not in _WRITTEN and p.is_file()],
        key=key,
    )


def _tensors(model: _Model, made: _Made, small: Mapping[str, list[str]]) -> Iterator[Tensor]:
    """Every tensor of the new checkpoint; a module's small ones are made when theirs come."""
    for name in model.checkpoint.tensor_names:
        weight = model.checkpoint.tensor(name)
        if name in small:
            for suffix, (dtype, shape, data) in made.tensors(small[name]).items():
                module = name.removesuffix(".weight")
                yield Tensor(module + suffix, dtype, shape, np.ascontiguousarray(data))
        elif name in made.norms:
            yield Tensor(name, "BF16", weight.shape, _bits(made.norms[name]))
        else:
            yield Tensor(name, weight.format.name, weight.shape, weight.data)


def _bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 numbers in float32 -> their 16 bits."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _values(weight: RawWeight | WeightGroup) -> np.ndarray:
    parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
    return np.concatenate([dequantise(part.made()) for part in parts])


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
    return "\n".join(lines)


__all__ = [
    "DEFAULT_METHODS",
    "FORMATS",
    "METHODS",
    "QuantizeConfig",
    "quantize",
    "render",
    "scalable",
    "sequences",
]
