"""A mixture of experts through the engine's own loading on the CPU: quantised, and inspected."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engineroom.engine.config import EngineConfig
from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.tools.inspect import inspect_model, render
from tests.models import tiny as cases
from tests.models.tiny import EXPERTS, Case, Made

SHARED = {**EXPERTS, "hidden_size": 96, "moe_intermediate_size": 64}
WHOLE_GROUPS = Case("Qwen2Moe", {**SHARED, "shared_expert_intermediate_size": 96})


def test_inspect_tells_of_the_experts(tiny: Callable[[str], Made]) -> None:
    for name, line in (
        ("mixtral", "2 of 5 a token, in 2 layers"),
        ("qwen2-moe", "3 of 7 a token, and a shared one, in 2 layers"),
    ):
        assert line in render(inspect_model(EngineConfig(model=str(tiny(name).path))))


def test_quantised_on_load_is_near_the_float_logits(
    tiny: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to 8 bits is about 1 % of a product; a token near a tie may take another expert."""
    from engineroom.engine.models import record
    from engineroom.engine.runtime.assemble import _quantised
    from engineroom.engine.runtime.load import open_model, raw_weights
    from engineroom.kernels.backend import KVSpec
    from engineroom.kernels.cpu.backend import CpuBackend
    from tests.models.harness import Piece, step_inputs

    monkeypatch.setitem(cases.CASES, "whole groups", WHOLE_GROUPS)
    made = tiny("whole groups")
    checkpoint = open_checkpoint(made.path)
    module, config = open_model(checkpoint)
    config = config.replace(dtype="float32")
    program = record(module, config)
    raw, _ = _quantised(raw_weights(checkpoint, module, config), program, "int8", checkpoint)
    backend = CpuBackend()
    packed = {name: backend.pack(weight) for name, weight in raw.items()}
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32")
    executable = backend.lower(program, packed, backend.allocate_kv(spec, 8))
    tokens = cases.prompt()
    step = step_inputs([Piece(tokens, range(8))], 16)
    error = np.abs(executable.run(step).numpy() - made.logits).mean(1)
    size = np.abs(made.logits).mean()
    assert 1e-3 * size < np.median(error) < 0.08 * size
