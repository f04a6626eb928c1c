"""How many launches a layer of each family takes on the Triton backend: as many as on a card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from engineroom.engine import models
from engineroom.kernels.backend import KVSpec
from engineroom.kernels.weights import FORMATS, RawWeight
from tests.kernels import programs
from tests.kernels.packed_steps import Paged, random_rows, raw
from tests.kernels.triton_device import TritonBackend, interpreter

HIDDEN, HEADS, KV_HEADS, HEAD = 64, 4, 2, 16
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": HEAD,
    "sliding_window": 64,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Launches of a layer in a step that decodes, attention in one (two where keys are in splits).
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "LlamaForCausalLM": ({}, 6),
    "Qwen2ForCausalLM": ({}, 6),
    "Qwen3ForCausalLM": ({}, 6),
    "Gemma2ForCausalLM": (GEMMA, 8),
    "Gemma3ForCausalLM": (GEMMA, 8),
    "MixtralForCausalLM": ({}, 14),
    "Qwen3MoeForCausalLM": ({"norm_topk_prob": True}, 14),
    "GptOssForCausalLM": ({"num_key_value_heads": 2}, 14),
}


class Launches:
    """Counts launches of kernels by name, and runs none: the host reads no result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: Counter[str] = Counter()

        def counting(kernel: Any, *args: Any, **options: Any) -> None:
            self.names[kernel.fn.__name__] += 1

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", counting)


def executable(values: dict[str, Any], layers: int, activations: str, fmt: str, dtype: str) -> Any:
    module = models.find_by_hf(values["architectures"][0])
    config = module.config_from_hf({**values, "num_hidden_layers": layers})
    program = models.record(module, config)
    backend = TritonBackend(activation_dtype=dtype, threads=1, activations=activations)
    rng, weights = np.random.default_rng(1), {}
    for name, table in programs.random_weights(program).items():
        weights[name] = raw(table, name=name)
        if fmt and table.ndim == 2 and name != "embed":
            data = random_rows(rng, FORMATS[fmt], *table.shape)
            weights[name] = RawWeight(name, FORMATS[fmt], table.shape, {"data": data})
    cache = backend.allocate_kv(KVSpec(layers, KV_HEADS, HEAD, 16, dtype), 8)
    return backend.lower(program, {n: backend.pack(w) for n, w in weights.items()}, cache)


def per_layer(
    launches: Launches,
    architecture: str,
    tokens: int,
    activations: str = "auto",
    fmt: str = "",
    dtype: str = "float16",
) -> Counter[str]:
    """Launches that one more layer adds to a step of one sequence."""
    values = {**SIZES, **FAMILIES[architecture][0], "architectures": [architecture]}
    counted = []
    for layers in (1, 2):
        made = executable(values, layers, activations, fmt, dtype)
        pages = Paged(16, 8, np.random.default_rng(1))
        launches.names.clear()
        made.run(pages.step({pages.add(): [3] * tokens}, logit_rows=[0]))
        counted.append(launches.names.copy())
    return counted[1] - counted[0]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_launches_of_a_layer_that_decodes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = per_layer(Launches(monkeypatch), architecture, 1)
    assert launched.total() == FAMILIES[architecture][1], launched


def test_launches_of_a_layer_by_its_tokens_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few tokens norms, 8-bit activations and sums of groups are part of a layer's launch, for
    more they are launches of their own, a norm in that of what is behind it."""
    launches, llama = Launches(monkeypatch), "LlamaForCausalLM"
    for fmt in ("Q8_0", "Q4_1"):
        assert per_layer(launches, llama, 1, fmt=fmt).total() == 6
    assert per_layer(launches, llama, 1, fmt="Q4_1", dtype="float32").total() == 10
    prompt = per_layer(launches, llama, 17)
    assert prompt.total() == 8 and prompt["rms_norm_kernel"] == 2
    assert per_layer(launches, llama, 1, "int8", "Q4_1").total() == 6
    codes = per_layer(launches, llama, 17, "int8", "Q8_0")
    assert codes.total() == 10 and codes["activations_kernel"] == 4
    assert not codes["rms_norm_kernel"]
    sums = per_layer(launches, llama, 17, fmt="Q4_1")
    assert sums.total() == 10 and sums["sums_kernel"] == 4 and not sums["rms_norm_kernel"]
