"""Writing a GGUF file from another: its metadata byte for byte, tensors anew, all or nothing."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...kernels.weights import Format
from .gguf import TENSOR_NUMBERS, GgufFile

_FILE_TYPE = b"general.file_type" + struct.pack("<I", 4)  # a uint32


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor to be written; `data` makes its bytes when its turn comes."""

    name: str
    format: Format
    shape: tuple[int, ...]
    data: Callable[[], bytes]

    @property
    def nbytes(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows * self.format.row_bytes(self.shape[-1])


def write_gguf(path: Path, source: GgufFile, tensors: Sequence[GgufTensor], file_type: int) -> None:
    """Make the file `path`. `file_type`: llama.cpp's number of what most tensors are.

    Errors: ValueError where a tensor's bytes do not fit its shape; OSError of the disk.
    """
    pairs = bytearray(source.pairs)
    at = pairs.find(_FILE_TYPE)
    if at >= 0:
        struct.pack_into("<I", pairs, at + len(_FILE_TYPE), file_type)
    alignment = int(source.metadata.get("general.alignment", 32))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(source.metadata)) + pairs
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", TENSOR_NUMBERS[tensor.format.name], offset)
        offset += tensor.nbytes + -tensor.nbytes % alignment
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(head + bytes(-len(head) % alignment))
        for tensor in tensors:
            data = tensor.data()
            if len(data) != tensor.nbytes:
                raise ValueError(
                    f"tensor {tensor.name!r}: {tensor.format.name} of shape {list(tensor.shape)} "
                    f"takes {tensor.nbytes} bytes, {len(data)} were made"
                )
            file.write(data + bytes(-len(data) % alignment))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


__all__ = ["GgufTensor", "write_gguf"]
