"""`engineroom quantize --format Q4_K ...`: a GGUF file in, a smaller one out.

With `--method imatrix` an error is counted by the mean square of its column's inputs over a
calibration text (llama.cpp's importance matrix); with rtn every column counts alike. Layers get the
format; the head and the table of the vocabulary Q6_K, or Q8_0 of the format Q8_0. Where rows are no
whole blocks of 256, Q4_K becomes Q4_0, and Q6_K Q8_0.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.choose import choose, create
from ...kernels.weights import FILE_FORMATS, Format, RawWeight
from ...quant.ggml_rounding import quantise_ggml
from .. import models
from ..config import ConfigError
from ..load.checkpoint import GgufCheckpoint, open_checkpoint
from ..load.save_gguf import GgufTensor, write_gguf
from ..load.source import resolve
from ..runtime.assemble import linear_weights
from ..runtime.load import open_model, raw_weights
from .calibration import Taps, taps
from .quantize import QuantizeConfig
from .quantize_model import chunks
from .quantize_solve import sequences
from .texts import Text

_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18}  # llama.cpp's numbers; Q4_K_S
_SMALLER_BLOCKS = {"Q4_K": "Q4_0", "Q6_K": "Q8_0"}


def quantize_gguf(config: QuantizeConfig, text: Text) -> dict[str, Any]:
    """Make the file `config.out`; what was made, as plain values.

    Errors: ConfigError for what cannot be made of this model; those of opening it; OSError.
    """
    started = time.perf_counter()
    out = Path(config.out)
    if os.path.lexists(out):
        raise ConfigError("out", f"{out} exists already; name a file that does not, or remove it")
    source = resolve(config.model)
    checkpoint = open_checkpoint(source.path)
    try:
        if not isinstance(checkpoint, GgufCheckpoint):
            raise ConfigError(
                "model",
                f"{source.path} is a folder of safetensors; {config.format} is made from a GGUF "
                "file (llama.cpp's convert_hf_to_gguf.py makes one of 16 bits)",
            )
        repacked = [n for n in checkpoint.tensor_names if checkpoint.tensor(n).make is not None]
        if repacked:
            raise ConfigError(
                "model",
                f"{source.path} has {len(repacked)} tensors of 4 bits that cannot be written as "
                f"they are (such as {repacked[0]}); take the model's 16-bit file",
            )
        importance, names, samples = _importance(config, checkpoint, text)
        tensors = [
            _tensor(checkpoint.tensor(name), _format(config, checkpoint, name, names), importance)
            for name in checkpoint.tensor_names
        ]
        write_gguf(out, checkpoint.file, tensors, _FILE_TYPES[config.format])
        return {
            "model": source.name,
            "out": str(out),
            "method": config.method,
            "format": config.format,
            "group_size": None,
            "experts": None,
            "weights": sum(t.format is not checkpoint.tensor(t.name).format for t in tensors),
            "bytes_before": checkpoint.total_bytes,
            "bytes": sum(t.nbytes for t in tensors),
            "mean_relative_error": None,
            "text": {"name": text.name, "sha256": text.sha256} if samples else None,
            "seconds": time.perf_counter() - started,
        }
    finally:
        checkpoint.close()


def _importance(
    config: QuantizeConfig, checkpoint: GgufCheckpoint, text: Text
) -> tuple[dict[str, np.ndarray], dict[str, bool], int]:
    """Mean square of the inputs' columns by tensor, the tensors to make small (and whether each is
    the head or the vocabulary's table), and how many samples were run."""
    module, model = open_model(checkpoint)
    program = models.record(module, model.replace(max_position=config.context, dtype="float32"))
    weights = dict(raw_weights(checkpoint, module, model))
    sources = {s.name: [part.name for part in s.gguf] for s in module.weights(model)}
    layers = linear_weights(program)[:-1]
    names = {tensor: False for name in layers for tensor in sources[name]}
    ends = [linear_weights(program)[-1], "embed"]
    names |= {tensor: True for name in ends for tensor in sources[name] if tensor not in names}
    if config.method == "rtn":
        return {}, names, 0
    if model.num_experts:
        raise ConfigError("method", "a mixture of experts is not calibrated here; take rtn for it")
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    backend = create(
        choose(config.device),
        activation_dtype="float32",
        threads=config.threads,
        activations="float32",
    )
    ids = sequences(config.samples, config.context, checkpoint, text)
    found = taps(program, layers)
    running = Taps(program, weights, backend, ids).go(found)
    importance: dict[str, np.ndarray] = {}
    for tap, given in tqdm(
        running, total=len(found), desc="calibrating", disable=not sys.stderr.isatty()
    ):
        mean = np.square(given.rows).mean(axis=0)
        importance |= {tensor: mean for name in tap.weights for tensor in sources[name]}
    return importance, names, len(ids)


def _format(
    config: QuantizeConfig, checkpoint: GgufCheckpoint, name: str, names: dict[str, bool]
) -> Format:
    """What a tensor becomes: its own format where it has as few bits, or is no matrix."""
    weight = checkpoint.tensor(name)
    if name not in names:
        return weight.format
    wanted = config.format
    if names[name] and wanted != "Q8_0":
        wanted = "Q6_K"
    if weight.shape[-1] % FILE_FORMATS[wanted].block_elements:
        wanted = _SMALLER_BLOCKS.get(wanted, wanted)
    fmt = FILE_FORMATS[wanted]
    if weight.shape[-1] % fmt.block_elements:
        return weight.format
    return fmt if fmt.bits_per_element < weight.format.bits_per_element else weight.format


def _tensor(weight: RawWeight, fmt: Format, importance: dict[str, np.ndarray]) -> GgufTensor:
    def made() -> bytes:
        if fmt is weight.format:
            return weight.data.tobytes()
        of = importance.get(weight.name)
        rows = replace(weight, shape=(weight.num_rows, weight.shape[-1]))
        return b"".join(quantise_ggml(values, fmt, of) for _, values in chunks(rows))

    return GgufTensor(weight.name, fmt, weight.shape, made)


__all__ = ["quantize_gguf"]
