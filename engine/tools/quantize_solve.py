"""GPTQ and AWQ over a model: each tap's matrices rounded by what their inputs are.

A tap's matrices have the same inputs and are solved together; of a mixture, an expert's, from the
tokens that chose it. An expert that saw fewer tokens than an eighth of its columns is rounded to
nearest: so few say little of its inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...kernels.choose import choose, create
from ...kernels.program import Op, Program
from ...kernels.weights import F32, I8G32, RawWeight, WeightGroup
from ...quant import calibrate
from ...quant.groups import even_groups, int8_rows
from ...quant.rounding import Integers, Rounded, join, round_to_nearest
from ...quant.values import dequantise
from ..config import ConfigError
from ..load.checkpoint import Checkpoint
from ..load.tokenizer import load_tokenizer
from .calibration import Given, Tap, Taps, moments, taps
from .quantize_model import Matrix, Model, key_of
from .quantize_parts import Parts, Tapped
from .texts import Text

_FEW = 8  # an expert's tokens times it shall be its columns at least


@dataclass(frozen=True)
class Calibration:
    """How a model is calibrated: options of `quantize`."""

    method: str
    samples: int
    context: int
    device: str
    threads: int | None


@dataclass
class Calibrated:
    """What there is to write.

    rounded: gives a matrix by key; norms: values of tensors with factors folded in; divided: by
    key, what a matrix's rows are divided by [N]; errors of layers' outputs; few: matrices of
    experts that saw too few tokens.
    """

    rounded: Callable[[str], Rounded]
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    divided: dict[str, np.ndarray] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    few: int = 0

    def take(self, model: Model, tap: Tap, tapped: Tapped) -> None:
        """Put what a tap's columns were multiplied by into who makes them."""
        self.errors += tapped.errors
        self.few += tapped.few
        where = scalable(model.program, tap)
        for which, by in tapped.by.items():
            assert where is not None
            if tap.maker.name == "rms_norm":
                self.norms[model.tensors[where]] = _folded(model, tap, where, by)[0]
            else:
                self.divided[where + which] = by


def calibrated(
    how: Calibration, model: Model, grid: Integers, text: Text, parts: Parts
) -> Calibrated:
    """Go through the taps. Errors: ConfigError for a text that is too short."""
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    backend = create(
        choose(how.device), activation_dtype="float32", threads=how.threads, activations="float32"
    )
    found = taps(model.program, model.names)
    ids = sequences(how.samples, how.context, model.checkpoint, text)
    running = Taps(model.program, dict(model.weights), backend, ids)
    out = Calibrated(parts.rounded)
    quiet = not sys.stderr.isatty()
    bar = tqdm(running.go(found), total=len(found), desc="calibrating", unit="tap", disable=quiet)
    replaced: tuple[str, ...] = ()
    for index, (tap, given) in enumerate(bar):
        for name in replaced:  # what they make is known by now
            running.weights[name] = model.weights[name]
        replaced = tap.weights
        tapped = parts.load(index)
        if tapped is None:
            tapped = solve(how.method, model, grid, tap, given)
            parts.save(index, tapped)
        out.take(model, tap, tapped)
        for name in tap.weights:
            made = [_as_read(tapped, name, which, grid) for which in _experts(model, name)]
            running.weights[name] = made[0] if len(made) == 1 else WeightGroup(tuple(made))
    return out


def sequences(samples: int, context: int, checkpoint: Checkpoint, text: Text) -> list[list[int]]:
    """Up to `samples` runs of `context` tokens, evenly spread over the text."""
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text.text, parse_special=False)
    room = len(ids) // context
    if not room:
        raise ConfigError(
            "text",
            f"{text.name} has {len(ids)} tokens; one sample takes {context}. Take a longer "
            "text, or a smaller --context",
        )
    count = min(samples, room)
    starts = [i * room // count * context for i in range(count)]
    chosen = [ids[start : start + context] for start in starts]
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        for sequence in chosen:
            sequence[0] = tokenizer.bos_token_id
    return chosen


def scalable(program: Program, tap: Tap) -> str | None:
    """The weight whose rows (or elements) may be divided so that the tap's columns are.

    A norm's, or the up layer's behind a gate; None where there is none, or others read the value.
    """
    made_by: dict[int | None, Op] = {op.output: op for op in program}
    if not tap.alone:
        return None
    if tap.maker.name == "rms_norm":
        weight = program.handles[tap.maker.inputs[1]]  # type: ignore[index]
        return weight.name if weight.shape == program.handles[tap.value].shape[1:] else None
    if tap.maker.name in ("silu_mul", "gelu_tanh_mul"):
        up = made_by[tap.maker.inputs[1]]
        readers = sum(up.output in op.inputs for op in program)
        biased = up.name == "linear" and up.inputs[2] is not None
        if up.name in ("linear", "expert_linear") and not biased and readers == 1:
            return program.handles[up.inputs[1]].name  # type: ignore[index]
    return None


# -------------------------------------------------------------------------------- a tap's layers


def solve(method: str, model: Model, grid: Integers, tap: Tap, given: Given) -> Tapped:
    """A tap's matrices: those that every token goes through, then each expert's."""
    rounded: dict[str, Rounded] = {}
    factors: dict[str, np.ndarray] = {}
    errors: list[float] = []
    few = 0
    for expert, names in _together(model, tap):
        keys = [key_of(name, expert) for name in names]
        each = [model.matrices[key] for key in keys]
        rows = given.rows if expert is None else given.of(expert)
        if expert is not None and len(rows) * _FEW < rows.shape[1]:
            few += len(keys)
            rounded |= {key: nearest(matrix, grid) for key, matrix in zip(keys, each, strict=True)}
            continue
        hessian, by = moments(rows), None
        if method == "awq":
            by = _awq_factors(model, tap, each, hessian, rows, grid)
        one = _rounder(method, hessian, grid, by)
        hessian = hessian.astype(np.float32)  # of which errors are made
        whole = wrong = 0.0
        for key, matrix in zip(keys, each, strict=True):
            parts = []
            for _, values in matrix.chunks():
                parts.append(one(values))
                made = parts[-1].values()
                whole += calibrate.energy(values, hessian)
                wrong += calibrate.energy(values - (made if by is None else made / by), hessian)
            rounded[key] = join(parts)
        errors.append(wrong / whole if whole > 0 else 0.0)
        factors |= {} if by is None else {key_of("", expert): by}
    return Tapped(rounded, factors, tuple(errors), few)


def _together(model: Model, tap: Tap) -> Iterator[tuple[int | None, list[str]]]:
    """The weights of a tap that have the same inputs, and for which expert."""
    plain = [name for name in tap.weights if name not in model.experts]
    mixed = [name for name in tap.weights if name in model.experts]
    if plain:
        yield None, plain
    for expert in range(model.experts[mixed[0]]) if mixed else ():
        yield expert, mixed


def _experts(model: Model, name: str) -> Sequence[int | None]:
    return range(model.experts[name]) if name in model.experts else (None,)


def _rounder(
    method: str, hessian: np.ndarray, grid: Integers, by: np.ndarray | None
) -> Callable[[np.ndarray], Rounded]:
    """What rounds float32 runs of rows [n, K]."""
    if method == "gptq":
        factor = calibrate.Factor.of(hessian)
        return lambda values: calibrate.gptq(values, factor, grid)
    second = np.diag(hessian).copy()
    factors = np.ones(len(second), np.float32) if by is None else by
    return lambda values: calibrate.awq(values, second, grid, factors)


def _awq_factors(
    model: Model,
    tap: Tap,
    each: Sequence[Matrix],
    hessian: np.ndarray,
    rows: np.ndarray,
    grid: Integers,
) -> np.ndarray | None:
    """What the columns are multiplied by; None where nothing can be divided by it, or it is 1."""
    where = scalable(model.program, tap)
    if where is None:
        return None
    parts = (values for matrix in each for _, values in matrix.chunks())
    by = calibrate.awq_scales(parts, hessian, np.abs(rows).mean(axis=0), grid)
    if tap.maker.name == "rms_norm":
        by = _folded(model, tap, where, by)[1]
    return None if (by == 1).all() else by


def _folded(model: Model, tap: Tap, where: str, by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's values with 1 / by folded in, and the factors that they really are of."""
    norm = model.weights[where]
    assert isinstance(norm, RawWeight)
    offset = float(tap.maker.attrs["offset"])  # type: ignore[arg-type]
    return calibrate.folded_norm(dequantise(norm), offset, by)


def nearest(matrix: Matrix, grid: Integers) -> Rounded:
    """A matrix rounded to nearest."""
    return join([round_to_nearest(values, grid) for _, values in matrix.chunks()])


def _as_read(tapped: Tapped, name: str, expert: int | None, grid: Integers) -> RawWeight:
    """A matrix as the engine will read it, times the columns of this run, which are not divided."""
    rounded, by = tapped.rounded[key_of(name, expert)], tapped.by.get(key_of("", expert))
    groups = even_groups(rounded.q.shape[1], grid.group_size)

    def make(start: int, stop: int) -> np.ndarray:
        rows = rounded.rows(start, stop)
        if by is None:
            return int8_rows(rows.q, rows.scale, rows.zero, groups)
        values: np.ndarray = rows.values() / by
        return values.reshape(-1).view(np.uint8)

    fmt = I8G32 if by is None else F32
    return RawWeight(key_of(name, expert), fmt, rounded.q.shape, {}, make=make)


__all__ = ["Calibrated", "Calibration", "calibrated", "nearest", "scalable", "sequences"]
