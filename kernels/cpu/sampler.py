"""The CPU backend's sampler: the native sampling program over rows of logits in host memory."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from .. import sampling
from ..backend import Logits, SampleResult, SamplingInputs
from ._native import Pool, RowSampler, SampleParameters

# The native program takes the parameters by the names they have in SamplingInputs; all but the
# position stay from step to step, while the same rows are asked for.
_LASTING = tuple(field.name for field in fields(SamplingInputs) if field.name != "position")


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
        self._bound: _Bound | None = None  # what was run last, of rows that last

    def run(self, logits: Logits, rows: SamplingInputs) -> SampleResult:
        """Tokens and logprobs of R rows; see SampleResult.

        Errors: ValueError where the shapes of logits and rows disagree or an id or index lies
        outside what it points into; TypeError for parameters of other dtypes than SamplingInputs
        states.
        """
        bound = self._bound
        if bound is None or rows.lasting is not bound.rows or logits is not bound.logits:
            x = self._array(logits)
            sampling.check_rows(rows, *x.shape)
            bound = self._bound = _Bound(rows, logits, x)
        result = bound.room()
        self._native.run(
            bound.x,
            bound.parameters,
            np.ascontiguousarray(rows.position),
            result.tokens,
            result.logprobs,
            result.ranks,
            result.top_ids,
            result.top_logprobs,
        )
        return result

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


class _Bound:
    """Logits and rows' parameters, checked, and room for the answers."""

    def __init__(self, rows: SamplingInputs, logits: Logits, x: np.ndarray) -> None:
        self.logits, self.x = logits, x
        self.rows = rows.lasting or self  # nobody's
        self.count = rows.num_rows
        self.parameters = SampleParameters(
            **{name: np.ascontiguousarray(getattr(rows, name)) for name in _LASTING}
        )
        most = int(rows.num_logprobs.max(initial=-1))
        self._width = max(0, most)
        self._same = None if most >= 0 else self._logprobs()

    def room(self) -> SampleResult:
        """For one answer; what it says of logprobs, where nobody wants any, stays the same."""
        tokens = np.empty(self.count, dtype=np.int32)
        return SampleResult(tokens, *(self._same or self._logprobs()))

    def _logprobs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.empty(self.count, dtype=np.float32),
            np.empty(self.count, dtype=np.int32),
            np.empty((self.count, self._width), dtype=np.int32),
            np.empty((self.count, self._width), dtype=np.float32),
        )
