"""Mistral: Llama's program with a sliding window in every layer (arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from . import llama
from ._blocks import ROTARY_BUFFERS
from ._fields import Fields, finish
from ._hf import hf_rope, hf_sizes, hf_window, hf_windows

HF_ARCHITECTURES = ("MistralForCausalLM",)
GGUF_ARCHITECTURES: tuple[str, ...] = ()  # converted files say llama, and llama.py reads them
HF_UNUSED = ROTARY_BUFFERS
GGUF_UNUSED = llama.GGUF_UNUSED
GGUF_CONFIG_TENSORS = llama.GGUF_CONFIG_TENSORS

forward = llama.forward
weights = llama.weights
config_from_gguf = llama.config_from_gguf

DEFAULT_WINDOW = 4096  # what transformers takes where sliding_window is absent (null means none)


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Errors: ConfigError naming the key that is missing or not supported."""
    fields = Fields(values, "config.json")
    sizes = hf_sizes(fields)
    rope, notes = hf_rope(fields, sizes)
    window = hf_window(fields, DEFAULT_WINDOW)
    if "sliding_window" not in values:
        notes.append(f"sliding_window is absent: {window}, as transformers has it")
    # The class has one kind of layer; a list of them may only repeat what sliding_window says.
    kind = "sliding_attention" if window else "full_attention"
    layers = sizes["num_layers"]
    windows = hf_windows(fields, layers, window=window, default=(kind,) * layers)
    if set(windows) != {window}:
        raise fields.bad("layer_types", values["layer_types"], f"{kind} in every layer")
    return finish(fields, sizes, family="mistral", rope=rope, windows=windows, notes=notes)
