"""OpenVINO GenAI behind the worker protocol: its continuous-batching pipeline, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Ids, serve

PART = 512  # tokens that are evaluated at once


class OpenVino:
    def __init__(self, model: str, threads: int, max_len: int, max_seqs: int, cache_gb: int = 2):
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = max(max_seqs, 32)
        self._properties = {"INFERENCE_NUM_THREADS": threads}
        self._model = model
        self._pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", self._properties)
        self.vocab = len(self._pipe.get_tokenizer().get_vocab())
        self._count = 0

    def version(self) -> str:
        return str(genai.__version__)

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        config = genai.GenerationConfig()
        config.max_new_tokens = out
        config.ignore_eos = True
        config.do_sample = False
        started = time.perf_counter()
        handles = []
        for prompt in prompts:
            self._count += 1
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipe.add_request(self._count, ids, config))
        first, tokens = None, 0
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            for handle in handles:
                while handle.can_read():
                    for output in handle.read().values():
                        tokens += len(output.generated_ids)
                    if first is None:
                        first = time.perf_counter() - started
        return first, time.perf_counter() - started, tokens

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        """The same file through the runtime itself, whose outputs are the logits of every row.

        In parts, so that later ones read the keys and values of earlier ones as the cache keeps
        them: in 8 bits for int8 weights, which is its default.
        """
        core = ov.Core()
        xml = Path(self._model) / "openvino_model.xml"
        request = core.compile_model(xml, "CPU", self._properties).create_infer_request()
        names = {name for port in request.model_inputs for name in port.names}
        for start in range(0, len(ids), PART):
            end = min(start + PART, len(ids))
            inputs = {
                "input_ids": np.array([ids[start:end]], dtype=np.int64),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            request.infer({name: value for name, value in inputs.items() if name in names})
            yield start, np.array(request.get_tensor("logits").data[0], dtype=np.float32)


if __name__ == "__main__":
    serve(OpenVino)
