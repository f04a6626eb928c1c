"""transformers behind the worker protocol: one static batch, left as the library comes.

Also computes the reference distributions, in fp32 (options: {"dtype": "float32"}).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from protocol import Ids, serve
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


class _Clock(LogitsProcessor):
    """Notes when the first logits were there; changes nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return scores


class Transformers:
    def __init__(self, model: str, threads: int, max_len: int, max_seqs: int, dtype: str):
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.eval()
        self._model.generation_config.eos_token_id = None
        self.vocab = self._model.config.vocab_size

    def version(self) -> str:
        return f"{transformers.__version__} (torch {torch.__version__})"

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        ids = torch.tensor(prompts)
        clock = _Clock()
        started = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=out,
                logits_processor=LogitsProcessorList([clock]),
            )
        total = time.perf_counter() - started
        first = None if clock.first is None else clock.first - started
        return first, total, (made.shape[1] - ids.shape[1]) * len(prompts)

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        with torch.inference_mode():
            yield 0, self._model(torch.tensor([ids])).logits[0].float().numpy()


if __name__ == "__main__":
    serve(Transformers)
