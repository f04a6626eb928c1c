"""What a check is: a result beside its formula in fp64, an error as a share of its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_PAD_ROWS, _PAD_COLUMNS = 3, 16
_TINY = 2.0**-24  # fp16's smallest step


@dataclass(frozen=True)
class Check:
    """One row of the report. `error` is the worst one as a share of its bound; at most 1 passes."""

    kind: str
    name: str
    dtype: str
    shape: str
    error: float | None
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """A check before it has run; `run` returns the worst error as a share of its bound."""

    name: str
    dtype: str
    shape: str
    run: Callable[[], float]
    kind: str = "correct"


def run_probe(probe: Probe) -> Check:
    """The check's row, whatever happens: what raises has failed, and says how."""
    error, detail = None, ""
    try:
        error = probe.run()
    except Exception as raised:
        detail = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
    passed = error is not None and error <= 1
    finite = error if error is not None and np.isfinite(error) else None
    if error is not None and finite is None:
        detail = "a result is not finite, or memory beside the output was written"
    return Check(probe.kind, probe.name, probe.dtype, probe.shape, finite, passed, detail)


class Guarded:
    """An output [rows, width] full of NaN, inside of memory that is not to be touched."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows + 2 * _PAD_ROWS, width + _PAD_COLUMNS)
        self._memory = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.out = self._memory[_PAD_ROWS : _PAD_ROWS + rows, :width]

    def result(self) -> torch.Tensor:
        """The output in fp64; infinite throughout where something beside it was written."""
        around = self._memory.clone()
        around[_PAD_ROWS : _PAD_ROWS + self.out.shape[0], : self.out.shape[1]] = float("nan")
        out = self.out.double()
        return out if bool(around.isnan().all()) else torch.full_like(out, float("inf"))


def worst(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error as a share of its bound; infinite where a result is not a number."""
    share = (got - want).abs() / (bound + _TINY)
    return float("inf") if bool(share.isnan().any()) else float(share.max())


def half_step(dtype: torch.dtype) -> float:
    """What rounding to dtype changes at most, relatively."""
    return torch.finfo(dtype).eps / 2
