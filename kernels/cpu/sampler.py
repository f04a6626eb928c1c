"""The CPU backend's sampler: the native sampling program over rows of logits in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter, is_
from typing import Any

import numpy as np

from .. import sampling
from ..backend import Logits, SampleResult, SamplingInputs
from ._native import Pool, RowSampler

# The native program takes the parameters by the names they have in SamplingInputs.
_PARAMETERS = tuple(field.name for field in fields(SamplingInputs))
# All but the position stay the same arrays from step to step, while the same rows are asked for.
_LASTING = tuple(name for name in _PARAMETERS if name != "position")
_lasting = attrgetter(*_LASTING)


class CpuLogits:
    """[R, V] fp32 logits in host memory: the caller's, or a step program's own, which its next
    step overwrites."""

    def __init__(self, array: np.ndarray) -> None:
        if array.dtype != np.float32 or array.ndim != 2:
            raise ValueError(
                f"logits must be float32 [R, V]; got {array.dtype} {list(array.shape)}"
            )
        self._array = array

    def numpy(self) -> np.ndarray:
        """[R, V] float32 copy."""
        return self._array.copy()

    def wait(self) -> None:
        """They are there."""

    def view(self) -> np.ndarray:
        """[R, V] float32 on the memory itself; not to be written to."""
        return self._array


class CpuSampler:
    """The sampling program, compiled. Rows are shared out among threads; each row's answer is
    kernels/sampling.py's, bit for bit, whichever thread finds it beside whichever others."""

    def __init__(self, vocab_size: int, threads: int | Pool) -> None:
        sampling.check_vocab_size(vocab_size)
        self.vocab_size = vocab_size
        pool = Pool(threads) if isinstance(threads, int) else threads
        self._native = RowSampler(vocab_size, pool)
        self._known: tuple[Any, ...] = (None,) * len(_LASTING)  # what was checked last
        self._ready: Mapping[str, np.ndarray] = {}
        self._width = 0  # of the top logprobs that they ask for

    def run(self, logits: Logits, rows: SamplingInputs) -> SampleResult:
        """Tokens and logprobs of R rows; see SampleResult.

        Errors: ValueError where the shapes of logits and rows disagree or an id or index lies
        outside what it points into; TypeError for parameters of other dtypes than SamplingInputs
        states.
        """
        x = self._array(logits)
        count, width = len(x), self._make_ready(rows, x)
        result = SampleResult(
            tokens=np.empty(count, dtype=np.int32),
            logprobs=np.empty(count, dtype=np.float32),
            ranks=np.empty(count, dtype=np.int32),
            top_ids=np.empty((count, width), dtype=np.int32),
            top_logprobs=np.empty((count, width), dtype=np.float32),
        )
        self._native.run(
            x,
            **self._ready,
            position=np.ascontiguousarray(rows.position),
            tokens=result.tokens,
            logprobs=result.logprobs,
            ranks=result.ranks,
            top_ids=result.top_ids,
            top_logprobs=result.top_logprobs,
        )
        return result

    def _make_ready(self, rows: SamplingInputs, x: np.ndarray) -> int:
        """Check the rows against logits x, once while they last; returns how many top logprobs
        the answer has room for."""
        lasting = _lasting(rows)
        if len(x) != rows.num_rows or not all(map(is_, lasting, self._known)):
            sampling.check_rows(rows, *x.shape)
            ready = tuple(map(np.ascontiguousarray, lasting))
            self._ready = dict(zip(_LASTING, ready, strict=True))
            self._known = ready  # a copy is made anew each time
            self._width = max(0, int(rows.num_logprobs.max(initial=0)))
        return self._width

    def from_numpy(self, logits: np.ndarray) -> CpuLogits:
        """Logits on the host, [R, V] float32, as this sampler takes them; no copy."""
        return CpuLogits(logits)

    def log_softmax(self, logits: Logits) -> np.ndarray:
        """[R, V] float32 natural logprobs, bit for bit those of run(); NaN in rows that fail."""
        x = self._array(logits)
        out = np.empty(x.shape, dtype=np.float32)
        self._native.log_softmax(x, out)
        return out

    def _array(self, logits: Logits) -> np.ndarray:
        """The logits, copied only where a row is not whole floats side by side."""
        x = logits.view() if isinstance(logits, CpuLogits) else logits.numpy()
        sampling.check_logits(x, self.vocab_size)
        side_by_side = x.strides[1] == x.itemsize and x.strides[0] % x.itemsize == 0
        if not (side_by_side and x.flags.aligned):
            x = np.require(x, requirements=["C_CONTIGUOUS", "ALIGNED"])
        return x
