"""vLLM on a CPU behind the worker protocol; the environment's variables are set by the caller."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import vllm
from protocol import Ids, serve
from vllm import LLM, SamplingParams


class Vllm:
    def __init__(self, model: str, threads: int, max_len: int, max_seqs: int, dtype: str):
        self._llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_len,
            max_num_seqs=max_seqs,
            enable_prefix_caching=False,
        )
        self.vocab = self._llm.get_tokenizer().vocab_size
        self._count = 0

    def version(self) -> str:
        return str(vllm.__version__)

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        engine = self._llm.llm_engine
        first, tokens = None, 0
        started = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if first is None and output.outputs and output.outputs[0].token_ids:
                    first = time.perf_counter() - started
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
        return first, time.perf_counter() - started, tokens

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError(
            "full-vocabulary prompt logprobs come as one Python object per entry, "
            f"{len(ids) * self.vocab:,} of them"
        )


if __name__ == "__main__":
    serve(Vllm)
