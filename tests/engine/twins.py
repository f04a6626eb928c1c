"""A quantised checkpoint's fp32 twin: the same numbers, said in another format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.quant.gguf import dequantise
from tests.load.writers import write_gguf


def write_twin(source: Path, path: Path) -> Path:
    """The same checkpoint with every tensor as F32."""
    checkpoint = open_checkpoint(source)
    tensors = {}
    for name in checkpoint.tensor_names:
        weight = checkpoint.tensor(name)
        values = np.ascontiguousarray(dequantise(weight), dtype="<f4")
        tensors[name] = ("F32", weight.shape, values.tobytes())
    write_gguf(path, dict(checkpoint.metadata), tensors)
    checkpoint.close()
    return path
