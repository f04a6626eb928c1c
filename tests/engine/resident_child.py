"""Loads a quantised model and fills its cache; prints what memory it took, as JSON.

Run: python -m tests.engine.resident_child METHOD TINY MODEL. METHOD: how loading quantises it, or
"none". TINY is loaded first, so that
libraries and the engine's own structures are resident before the measurement begins. Sizes in
bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engineroom import LLM, SamplingParams

CONTEXT = 256


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def load(path: str, method: str) -> LLM:
    return LLM(
        path,
        device="cpu",
        quantization=None if method == "none" else method,
        threads=2,
        max_model_len=CONTEXT,
        max_num_seqs=1,
        max_num_batched_tokens=CONTEXT,
    )


def fill(llm: LLM) -> None:
    """The most tokens in a step, the most rows of logits, the longest context."""
    llm.generate(
        [[1] * (CONTEXT - 8)], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    llm.score([[1] * (CONTEXT - 1)])


def main() -> None:
    method, tiny, model = sys.argv[1:]
    with load(tiny, method) as llm:
        fill(llm)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before = status("VmRSS")
    with load(model, method) as llm:
        loaded = status("VmHWM")
        fill(llm)
        plan = llm.engine.loaded.memory
        sizes = {
            "loading": loaded - before,
            "peak": status("VmHWM") - before,
            "weights": plan.weights,
            "kv": plan.kv,
            "workspace": llm.engine.loaded.runner._executable.workspace_bytes,
            "workspace planned": plan.workspace,
        }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
