"""The reference's sampler: kernels/sampling.py applied to every row, with native random numbers."""

from __future__ import annotations

import numpy as np
import torch

from .. import sampling
from ..backend import Logits, SampleResult, SamplingInputs
from ..cpu._native import philox_uniform


class ReferenceLogits:
    """[R, V] fp32 logits in a torch tensor on the CPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype != torch.float32 or tensor.dim() != 2:
            raise ValueError(
                f"logits must be float32 [R, V]; got {tensor.dtype} {list(tensor.shape)}"
            )
        self.tensor = tensor

    def numpy(self) -> np.ndarray:
        """[R, V] float32 copy."""
        return self.view().copy()

    def wait(self) -> None:
        """They are there."""

    def view(self) -> np.ndarray:
        """[R, V] float32 on the tensor's own memory; not to be written to."""
        return self.tensor.detach().numpy()


class ReferenceSampler:
    """The sampling program. Row by row: a row's temporaries then stay in the processor's cache,
    and nothing of one row can reach another."""

    def __init__(self, vocab_size: int) -> None:
        sampling.check_vocab_size(vocab_size)
        self.vocab_size = vocab_size

    def run(self, logits: Logits, rows: SamplingInputs) -> SampleResult:
        """Tokens and logprobs of R rows; see SampleResult.

        Errors: ValueError where the shapes of logits and rows disagree or an id or index lies
        outside what it points into.
        """
        x = self._array(logits)
        sampling.check_rows(rows, *x.shape)
        count = len(x)
        width = max(0, int(rows.num_logprobs.max(initial=0)))
        result = SampleResult(
            tokens=np.full(count, sampling.FAILED, dtype=np.int32),
            logprobs=np.full(count, np.nan, dtype=np.float32),
            ranks=np.zeros(count, dtype=np.int32),
            top_ids=np.full((count, width), -1, dtype=np.int32),
            top_logprobs=np.full((count, width), np.nan, dtype=np.float32),
        )
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            best = x.argmax(axis=1)  # the first of equals; a NaN counts as the largest
            usable = np.isfinite(x[np.arange(count), best])
            for r in np.flatnonzero(usable):
                result.tokens[r] = self._token(x[r], rows, int(r), int(best[r]))
                if rows.num_logprobs[r] >= 0:
                    _logprobs(x[r], x[r, best[r]], int(r), int(rows.num_logprobs[r]), result)
        return result

    def from_numpy(self, logits: np.ndarray) -> ReferenceLogits:
        """Logits on the host, [R, V] float32, as this sampler takes them."""
        return ReferenceLogits(torch.from_numpy(np.ascontiguousarray(logits)))

    def log_softmax(self, logits: Logits) -> np.ndarray:
        """[R, V] float32 natural logprobs, bit for bit those of run(); NaN in rows that fail."""
        x = self._array(logits)
        out = np.full(x.shape, np.nan, dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for r, row in enumerate(x):
                highest = row[row.argmax()]
                if np.isfinite(highest):
                    out[r] = sampling.log_softmax_row(row, highest)
        return out

    def _array(self, logits: Logits) -> np.ndarray:
        x = logits.view() if isinstance(logits, ReferenceLogits) else logits.numpy()
        sampling.check_logits(x, self.vocab_size)
        return x

    def _token(self, x: np.ndarray, rows: SamplingInputs, r: int, best: int) -> int:
        if rows.target[r] >= 0:
            return int(rows.target[r])
        row = sampling.Row.of(rows, r)
        adjusted = sampling.adjust(x, row)
        if adjusted is x and row.temperature == 0:
            return best

        def draw(stream: int, count: int) -> np.ndarray:
            out = np.empty(count, dtype=np.float32)
            philox_uniform(
                int(rows.seed[r]), int(rows.sample_index[r]), int(rows.position[r]), stream, out
            )
            return out

        return sampling.choose(adjusted, row, draw)


def _logprobs(
    x: np.ndarray, highest: np.float32, r: int, wanted: int, result: SampleResult
) -> None:
    """Fill row r's logprob, rank and `wanted` top places from its raw logits."""
    lse = sampling.log_sum(sampling.weights(x - highest))
    token = result.tokens[r]
    if token != sampling.FAILED:
        result.logprobs[r] = (x[token] - highest) - lse
        result.ranks[r] = 1 + np.count_nonzero(x > x[token])
    if wanted:
        top = np.flatnonzero(sampling.keep_first(-x, wanted))
        top = top[np.argsort(-x[top], kind="stable")]
        result.top_ids[r, : len(top)] = top
        result.top_logprobs[r, : len(top)] = (x[top] - highest) - lse
