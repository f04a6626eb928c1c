"""engineroom behind the worker protocol, through its front door."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from protocol import Ids, serve

import engineroom
from engineroom import LLM, SamplingParams
from engineroom.engine.bench.cost import ModelCost


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

    def steps(self, prompts: list[Ids], out: int) -> dict[str, Any]:
        """Seconds of a whole step, by the step log, over the steps that decode every prompt. Where
        steps overlap, what the host does beside the device costs none."""
        log = self._llm.engine.log
        before = log.num_steps
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        self._llm.generate(prompts, params, use_tqdm=False)
        overlaps = self._llm.engine.loaded.backend.overlaps
        times = [
            r.t_execute_s
            if overlaps
            else r.t_schedule_s + r.t_build_s + r.t_execute_s + r.t_commit_s
            for r in log.records[before - log.num_steps :]
            if len(r.requests) == len(prompts) and all(kind == "decode" for *_, kind in r.requests)
        ]
        if not times:
            raise ValueError(f"no step decoded all {len(prompts)}: {out} tokens are too few")
        return {"step_s": statistics.median(times), "steps": len(times)}

    def cost(self) -> dict[str, Any]:
        found = ModelCost.of_engine(self._llm.engine)
        if found is None:
            raise ValueError("only a model on the CPU has a cost here")
        return asdict(found)


if __name__ == "__main__":
    serve(Ours)
