"""The model families: the folder is the registry, a family is one file of it.

Every module here whose name has no leading underscore is a family. It exports

    HF_ARCHITECTURES, GGUF_ARCHITECTURES   the names under which checkpoints ask for it
    HF_UNUSED, GGUF_UNUSED                 patterns of tensors that it may leave unread
    GGUF_CONFIG_TENSORS                    tensors of a GGUF file that config_from_gguf() reads
    config_from_hf(config.json) -> ModelConfig
    config_from_gguf(metadata, tensor_names, config_tensors) -> ModelConfig, whose `family` may be
                                            another file's, where files of several say one name
    weights(config) -> list[WeightSpec]
    forward(config, weights, step) -> Handle [T, H], after the final norm

and adding a model adds one file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from ...kernels import ops
from ...kernels.ops import Handle, Program, StepHandles
from ..config import ConfigError, ModelConfig, unknown_name
from ._blocks import Source, Sources, WeightHandles, WeightSpec

__all__ = [
    "Family",
    "Source",
    "Sources",
    "WeightHandles",
    "WeightSpec",
    "find_by_gguf",
    "find_by_hf",
    "record",
    "supported",
]


class Family(Protocol):
    """What a family's module exports; see this package's docstring."""

    __name__: str
    HF_ARCHITECTURES: tuple[str, ...]
    GGUF_ARCHITECTURES: tuple[str, ...]
    HF_UNUSED: tuple[str, ...]
    GGUF_UNUSED: tuple[str, ...]
    GGUF_CONFIG_TENSORS: tuple[str, ...]

    def config_from_hf(self, values: Mapping[str, Any]) -> ModelConfig: ...

    def config_from_gguf(
        self,
        meta: Mapping[str, Any],
        tensor_names: Sequence[str],
        tensors: Mapping[str, Sequence[float]] = ...,
    ) -> ModelConfig: ...

    def weights(self, config: ModelConfig) -> list[WeightSpec]: ...

    def forward(self, config: ModelConfig, weights: WeightHandles, step: StepHandles) -> Handle: ...


@cache
def families() -> Mapping[str, Family]:
    """Every family by the name of its file."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def supported() -> dict[str, dict[str, tuple[str, ...]]]:
    """family -> {"hf": architectures, "gguf": architectures}, for listings and messages."""
    return {
        name: {"hf": family.HF_ARCHITECTURES, "gguf": family.GGUF_ARCHITECTURES}
        for name, family in families().items()
    }


def find_by_hf(architecture: str) -> Family:
    """The family of config.json's architectures[0]. Errors: ConfigError naming nearest and all."""
    return _find("HF_ARCHITECTURES", architecture, "model architecture")


def find_by_gguf(architecture: str) -> Family:
    """The family of GGUF's general.architecture. Errors: ConfigError naming nearest and all."""
    return _find("GGUF_ARCHITECTURES", architecture, "GGUF architecture")


def record(module: Family, config: ModelConfig) -> Program:
    """The family's Program for this configuration; its result is logits [R, V].

    Lengths that some rope kinds depend on are config.max_position: replace that by the context
    that will be served. config.dtype is what activations are rounded to.
    """
    hidden, weights = _hidden_rows(module, config)
    head = weights["embed"] if config.tie_embeddings else weights["lm_head"]
    logits = ops.linear(hidden, head)  # [R, V]
    if config.final_softcap:
        logits = ops.softcap(logits, config.final_softcap)
    return weights.program.finish(logits)


def record_hidden(module: Family, config: ModelConfig) -> Program:
    """record() without the head: the result is the final norm's output [R, H], which is what
    embeddings are pooled from. Its weights are among record()'s."""
    hidden, weights = _hidden_rows(module, config)
    return weights.program.finish(hidden)


def _hidden_rows(module: Family, config: ModelConfig) -> tuple[Handle, WeightHandles]:
    """[R, H], in a new Program, with the handles of that one."""
    program = Program()
    step = StepHandles.of(program)
    weights = WeightHandles(program, module.weights(config))
    hidden = module.forward(config, weights, step)  # [T, H]
    return ops.select_rows(hidden, step.logit_rows), weights


def _find(attribute: str, architecture: str, what: str) -> Family:
    known = {a: family for family in families().values() for a in getattr(family, attribute)}
    if architecture in known:
        return known[architecture]
    if architecture == "Gemma3ForConditionalGeneration":
        raise ConfigError(
            "architectures",
            f"{architecture} is multimodal, and images are not supported yet; the text-only "
            "checkpoints are Gemma3ForCausalLM",
        )
    raise ConfigError("architectures", unknown_name(what, architecture, known))
