"""llama-cpp-python behind the worker protocol: process start, and logits for the divergence.

Options: {"logits": true} keeps the logits of every position; {"kv": the cache's type}.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from protocol import Ids, serve


class LlamaPython:
    def __init__(
        self,
        model: str,
        threads: int,
        max_len: int,
        max_seqs: int,
        logits: bool = False,
        kv: str = "f16",
    ):
        cache = getattr(llama_cpp, f"GGML_TYPE_{kv.upper()}")
        self._llm = llama_cpp.Llama(
            model_path=model,
            n_ctx=max_len,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=logits,
            flash_attn=True,
            type_k=cache,
            type_v=cache,
            verbose=False,
        )
        self.vocab = self._llm.n_vocab()

    def version(self) -> str:
        return str(llama_cpp.__version__)

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        if len(prompts) != 1:
            raise NotImplementedError("llama-cpp-python runs one request at a time")
        self._llm.reset()
        first, tokens = None, 0
        started = time.perf_counter()
        for _ in self._llm.generate(prompts[0], temp=0.0, repeat_penalty=1.0):
            tokens += 1
            if first is None:
                first = time.perf_counter() - started
            if tokens == out:
                break
        return first, time.perf_counter() - started, tokens

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        self._llm.reset()
        self._llm.eval(ids)
        yield 0, np.asarray(self._llm.scores[: len(ids)])


if __name__ == "__main__":
    serve(LlamaPython)
