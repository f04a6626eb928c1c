"""engineroom behind the worker protocol, through its front door."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from protocol import Ids, serve

import engineroom
from engineroom import LLM, SamplingParams


class Ours:
    def __init__(self, model: str, threads: int, max_len: int, max_seqs: int, **options: Any):
        block = 16
        # Room for every request of the workloads at once: (128 in, 128 out), or one long one.
        tokens = max(max_len, 256 * max_seqs) + block * max_seqs
        options = {"num_blocks": -(-tokens // block) + 1, "max_num_seqs": max_seqs} | options
        self._llm = LLM(
            model,
            threads=threads,
            block_size=block,
            max_model_len=max_len,
            enable_prefix_caching=False,
            **options,
        )
        self.vocab = self._llm.engine.model_config.vocab_size

    def version(self) -> str:
        return engineroom.__version__

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        started = time.perf_counter()
        if len(prompts) == 1:
            first, tokens = None, 0
            for output in self._llm.stream(prompts[0], params):
                tokens = len(output.outputs[0].token_ids)
                if first is None and tokens:
                    first = time.perf_counter() - started
            return first, time.perf_counter() - started, tokens
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        total = time.perf_counter() - started
        return None, total, sum(len(o.outputs[0].token_ids) for o in outputs)

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        # Row j of a chunk at `position` is of the token there, given those before it.
        for position, rows in self._llm.score_stream(ids):
            yield position - 1, rows


if __name__ == "__main__":
    serve(Ours)
