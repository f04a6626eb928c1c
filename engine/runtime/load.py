"""Which family a checkpoint is, what its configuration says, and its weights by canonical name.

Strict both ways: a tensor that the model needs and the file lacks, or has in another shape, is an
error that names it; so is a tensor that the file has and nothing would read. Bytes stay where they
are mapped; only `backend.pack` reads them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...kernels.weights import RawWeight
from ...quant.gguf import dequantise
from ...quant.published import QUANTISATION_KEYS
from ..config import ConfigError, ModelConfig
from ..load.checkpoint import Checkpoint
from ..load.mapped import CheckpointError
from ..models import Family, Source, WeightSpec, find_by_gguf, find_by_hf

_SENSES = ("vision_config", "audio_config", "mm_vision_tower")  # of a multimodal config.json
MAX_CONFIG_TENSOR = 1 << 16  # elements: rope divisors have a few dozen
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_model(checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    """The family's module and the model's configuration.

    Errors: ConfigError naming the architecture (with the nearest and all supported ones), or the
    key that is missing, wrong or not supported.
    """
    if checkpoint.kind == "gguf":
        try:
            module = find_by_gguf(checkpoint.architecture)
        except ConfigError as error:
            raise ConfigError(error.field, f"{checkpoint.path}: {error}") from None
        config = module.config_from_gguf(
            checkpoint.metadata, checkpoint.tensor_names, _config_tensors(checkpoint, module)
        )
        return module, config.replace(dtype=checkpoint.float_dtype)
    try:
        module = find_by_hf(checkpoint.architecture)
    except ConfigError as error:
        raise ConfigError(error.field, _not_known(checkpoint, error)) from None
    # How its weights are stored is the checkpoint's own matter: it has read it.
    read = QUANTISATION_KEYS if checkpoint.quantised else ()
    config = module.config_from_hf({k: v for k, v in checkpoint.metadata.items() if k not in read})
    notes = list(config.notes)
    if config.dtype != checkpoint.float_dtype and not checkpoint.quantised:
        notes.append(f"config.json says {config.dtype}, the weights are {checkpoint.float_dtype}")
    return module, config.replace(
        dtype=checkpoint.float_dtype,
        eos_token_ids=_with_generation_eos(checkpoint, config),
        notes=tuple(notes),
    )


def _not_known(checkpoint: Checkpoint, error: ConfigError) -> str:
    """Where an architecture that is not known was read, and what config.json says of why."""
    reasons = list(checkpoint.notes)
    senses = [key for key in checkpoint.metadata if key.endswith(_SENSES)]
    if senses and "multimodal" not in str(error):
        reasons.insert(
            0, f"it is multimodal ({', '.join(senses)}): images and sound are not supported yet"
        )
    return "; ".join([f"{checkpoint.path / 'config.json'}: {error}", *reasons])


def raw_weights(
    checkpoint: Checkpoint, module: Family, config: ModelConfig
) -> dict[str, RawWeight]:
    """Every weight of the model by canonical name, as views of the mapped file.

    Errors: CheckpointError naming a tensor that is missing, has another shape, or is not used.
    """
    weights: dict[str, RawWeight] = {}
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for spec in module.weights(config):
        source = _source(spec, checkpoint)
        tensor = _tensor(checkpoint, spec, source)
        start, stop = source.rows or (0, tensor.shape[0])
        used[source.name].append((start, stop))
        whole = (start, stop) == (0, tensor.shape[0])
        try:
            weights[spec.name] = tensor if whole else tensor.rows(start, stop)
        except ValueError as error:
            raise CheckpointError(source.name, f"{error}; {spec.name} is those rows") from error
        if weights[spec.name].shape != spec.shape:
            raise CheckpointError(
                source.name,
                f"tensor {source.name!r} has shape {list(tensor.shape)}; by the configuration "
                f"{spec.name} is {list(spec.shape)}",
            )
    _refuse_unused_rows(checkpoint, used)
    _refuse_unused(checkpoint, module, config, used)
    return weights


# ----------------------------------------------------------------------------------- helpers


def _config_tensors(checkpoint: Checkpoint, module: Family) -> dict[str, tuple[float, ...]]:
    """Values of the tensors that are configuration (rope divisors)."""
    values = {}
    for name in module.GGUF_CONFIG_TENSORS:
        if name in checkpoint.tensor_names:
            tensor = checkpoint.tensor(name)
            if math.prod(tensor.shape) > MAX_CONFIG_TENSOR:
                raise CheckpointError(
                    name, f"tensor {name!r} of shape {list(tensor.shape)} is no table of rope"
                )
            values[name] = tuple(map(float, dequantise(tensor).ravel()))
    return values


def _with_generation_eos(checkpoint: Checkpoint, config: ModelConfig) -> tuple[int, ...]:
    """config.json's end tokens and those that generation_config.json adds."""
    value: Any = checkpoint.generation_config.get("eos_token_id")
    more = [] if value is None else value if isinstance(value, list) else [value]
    for i in more:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise ConfigError(
                "eos_token_id",
                f"generation_config.json: eos_token_id must be token ids in "
                f"0..{config.vocab_size - 1}",
            )
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _source(spec: WeightSpec, checkpoint: Checkpoint) -> Source:
    source = spec.gguf if checkpoint.kind == "gguf" else spec.hf
    if source is None:
        raise CheckpointError(
            spec.name, f"{checkpoint.path}: no {checkpoint.kind} checkpoint holds {spec.name}"
        )
    return source


def _tensor(checkpoint: Checkpoint, spec: WeightSpec, source: Source) -> RawWeight:
    if source.name not in checkpoint.tensor_names:
        near = difflib.get_close_matches(source.name, checkpoint.tensor_names, n=1)
        raise CheckpointError(
            source.name,
            f"{checkpoint.path}: tensor {source.name!r} is missing; it is {spec.name}, "
            f"{list(spec.shape)}" + (f"; the nearest is {near[0]!r}" if near else ""),
        )
    return checkpoint.tensor(source.name)


def _refuse_unused_rows(checkpoint: Checkpoint, used: dict[str, list[tuple[int, int]]]) -> None:
    """Row ranges of a fused tensor must tile it."""
    for name, spans in used.items():
        end = 0
        for start, stop in sorted(spans):
            if start != end:
                break
            end = stop
        rows = checkpoint.shape(name)[0]
        if end != rows:
            raise CheckpointError(
                name, f"tensor {name!r} has {rows} rows, the model reads the first {end} of them"
            )


def _refuse_unused(
    checkpoint: Checkpoint, module: Family, config: ModelConfig, used: Iterable[str]
) -> None:
    gguf = checkpoint.kind == "gguf"
    patterns = module.GGUF_UNUSED if gguf else module.HF_UNUSED
    left = set(checkpoint.tensor_names).difference(used)
    if gguf:
        left.difference_update(module.GGUF_CONFIG_TENSORS)
    elif config.tie_embeddings and LM_HEAD in left:
        _require_equal(checkpoint, EMBED, LM_HEAD)
        left.remove(LM_HEAD)
    unused = sorted(
        n
        for n in left
        if not any(re.fullmatch(p, n) for p in patterns) and not checkpoint.is_spare(n)
    )
    if unused:
        more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        raise CheckpointError(
            unused[0],
            f"{checkpoint.path}: nothing in {config.family} reads {_listed(unused[:8])}{more}; "
            "the file is of another architecture, or its configuration is incomplete",
        )


def _require_equal(checkpoint: Checkpoint, first: str, second: str) -> None:
    a, b = checkpoint.tensor(first), checkpoint.tensor(second)
    if a.format != b.format or a.shape != b.shape or not np.array_equal(a.data, b.data):
        raise CheckpointError(
            second,
            f"{checkpoint.path}: tie_word_embeddings is true, but {second!r} differs from "
            f"{first!r}; set tie_word_embeddings to false in config.json to use it",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
