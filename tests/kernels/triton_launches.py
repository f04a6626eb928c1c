"""Lets the compiler take every launch of a whole program, without a GPU and without running it.

`python -m tests.kernels.triton_launches` lowers a program on the Triton backend as for an sm_90
card, but with tensors on the CPU, and takes steps in which each launch stops after compiling: so
the launchers' own arguments, constants and options are what is compiled. After each step it prints
how many times each kernel has been compiled. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from engineroom.kernels.backend import KVSpec
from engineroom.kernels.triton import TritonBackend, device, facts
from tests.kernels import programs
from tests.kernels.packed_steps import Paged, raw

TARGET = GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """A card of compute capability 9.0 whose memory is the host's and which never runs anything."""
    driver = SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    device.device = lambda: torch.device("cpu")
    device.card = lambda: "pretended"
    facts.loads_ahead = lambda: True


def main() -> int:
    pretend()
    program = programs.two_layers(hidden=128, heads=8, kv_heads=2)
    backend = TritonBackend(activation_dtype="bfloat16", threads=1)
    weights = programs.random_weights(program)
    packed = {name: backend.pack(raw(w, name=name)) for name, w in weights.items()}
    cache = backend.allocate_kv(KVSpec(2, 2, 16, 16, "bfloat16"), 256)
    executable = backend.lower(program, packed, cache)
    compiled: Counter[str] = Counter()

    def count(**facts: Any) -> None:
        compiled[facts["fn"].name.rpartition(".")[2]] += 1

    triton.knobs.runtime.jit_post_compile_hook = count
    pages = Paged(16, 256, np.random.default_rng(1))
    a, b = pages.add(), pages.add()
    for chunks in ({a: [1] * 40}, {a: [2], b: [3] * 7}, {a: [4] * 500}, {a: [5], b: [6]}, {b: [7]}):
        executable.run(pages.step(chunks, logit_rows=[0]))
        print(json.dumps(compiled))
    return 0


if __name__ == "__main__":
    sys.exit(main())
