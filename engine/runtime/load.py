"""Which family a checkpoint is, what its configuration says, and its weights by canonical name.

Strict both ways: a tensor that the model needs and the file lacks, or has in another shape, is an
error that names it; so is a tensor that the file has and nothing would read. Bytes stay where they
are mapped; only `backend.pack` reads them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...kernels.weights import RawWeight, WeightGroup
from ...quant.gguf import dequantise
from ...quant.published import QUANTISATION_KEYS
from ..config import ConfigError, ModelConfig
from ..load.checkpoint import Checkpoint
from ..load.mapped import CheckpointError
from ..models import Family, Source, Sources, WeightSpec, families, find_by_gguf, find_by_hf
from . import reorder

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
        return families()[config.family], config.replace(dtype=checkpoint.float_dtype)
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
) -> dict[str, RawWeight | WeightGroup]:
    """Every weight of the model by canonical name, as views of the mapped file.

    Errors: CheckpointError naming a tensor that is missing, has another shape, or is not used.
    """
    weights: dict[str, RawWeight | WeightGroup] = {}
    used: dict[str, _Used] = {}
    names = frozenset(checkpoint.tensor_names)
    for spec in module.weights(config):
        parts = []
        for source in _sources(spec, checkpoint, names):
            tensor = _tensor(checkpoint, spec, source, names)
            start, stop = source.rows or (0, tensor.shape[0])
            used.setdefault(source.name, _Used(tensor.shape[0])).spans.append((start, stop))
            whole = (start, stop) == (0, tensor.shape[0])
            try:
                parts.append(tensor if whole else tensor.rows(start, stop))
            except ValueError as error:
                raise CheckpointError(source.name, f"{error}; {spec.name} is those rows") from error
        if len(parts) == 1 and parts[0].shape != spec.shape:
            raise _wrong_shape(spec, source, tensor.shape, spec.shape)
        weights[spec.name] = parts[0] if len(parts) == 1 else WeightGroup(tuple(parts))
    _refuse_unused_rows(used)
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


@dataclass
class _Used:
    """What the model reads of a tensor of so many rows."""

    num_rows: int
    spans: list[tuple[int, int]] = field(default_factory=list)


def _sources(spec: WeightSpec, checkpoint: Checkpoint, names: Collection[str]) -> Sources:
    own = spec.gguf if checkpoint.kind == "gguf" else spec.hf
    if not own:
        raise CheckpointError(
            spec.name, f"{checkpoint.path}: no {checkpoint.kind} checkpoint holds {spec.name}"
        )
    there = (sources for sources in (own, *spec.otherwise) if sources[0].name in names)
    return next(there, own)


def _wrong_shape(
    spec: WeightSpec, source: Source, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        source.name,
        f"tensor {source.name!r} has shape {list(shape)}; by the configuration {spec.name} is "
        f"{list(wanted)}",
    )


def _tensor(
    checkpoint: Checkpoint, spec: WeightSpec, source: Source, names: Collection[str]
) -> RawWeight:
    """The tensor that a source names, as rows."""
    if source.name not in names:
        near = difflib.get_close_matches(source.name, checkpoint.tensor_names, n=1)
        raise CheckpointError(
            source.name,
            f"{checkpoint.path}: tensor {source.name!r} is missing; it is {spec.name}, "
            f"{list(spec.shape)}" + (f"; the nearest is {near[0]!r}" if near else ""),
        )
    tensor = checkpoint.tensor(source.name)
    if source.shape is None:
        return tensor
    turned = source.transposed and tensor.format.is_float
    *before, rows, columns = source.shape
    shape = (*before, columns, rows) if turned else source.shape
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        raise _wrong_shape(spec, source, tensor.shape, shape)
    if turned:
        tensor = reorder.transposed(dataclasses.replace(tensor, shape=shape))
    elif len(spec.shape) == 1:
        tensor = dataclasses.replace(tensor, shape=(math.prod(shape),))
    else:
        tensor = dataclasses.replace(tensor, shape=(math.prod(shape[:-1]), shape[-1]))
    return tensor if source.turns == 1 else reorder.in_turns(tensor, source.turns)


def _refuse_unused_rows(used: Mapping[str, _Used]) -> None:
    """Row ranges of a fused tensor must tile it."""
    for name, tensor in used.items():
        end = 0
        for start, stop in sorted(tensor.spans):
            if start != end:
                break
            end = stop
        if end != tensor.num_rows:
            raise CheckpointError(
                name,
                f"tensor {name!r} has {tensor.num_rows} rows, the model reads the first {end} "
                "of them",
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
