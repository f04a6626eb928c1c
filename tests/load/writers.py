"""Writers of GGUF and safetensors files for tests: sound files, and parts for bad ones."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GGUF_TYPES = {
    "uint8": (0, "<B"),
    "int8": (1, "<b"),
    "uint16": (2, "<H"),
    "int16": (3, "<h"),
    "uint32": (4, "<I"),
    "int32": (5, "<i"),
    "float32": (6, "<f"),
    "bool": (7, "<?"),
    "string": (8, ""),
    "array": (9, ""),
    "uint64": (10, "<Q"),
    "int64": (11, "<q"),
    "float64": (12, "<d"),
}
GGUF_TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}
GGUF_TENSOR_TYPES |= {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
GGUF_TENSOR_TYPES |= {"IQ4_NL": 20, "IQ4_XS": 23, "NVFP4": 40}


@dataclass(frozen=True)
class Typed:
    """A metadata value of a stated type; a list makes an array of that element type."""

    type: str
    value: Any


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """A sound file. Metadata: bool, int (uint32, or int32 below 0), float (float32), str, a list
    of one of these (ints int32), or `Typed`. Tensors: name -> (type, row-major shape, bytes)."""
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    infos: list[bytes] = []
    data: list[bytes] = []
    offset = 0
    for name, (kind, shape, raw) in tensors.items():
        infos.append(gguf_tensor_info(name, shape, GGUF_TENSOR_TYPES[kind], offset))
        padding = -len(raw) % alignment
        data += [raw, bytes(padding)]
        offset += len(raw) + padding
    head = gguf_head(len(tensors), len(metadata), version)
    head += b"".join(gguf_pair(key, value) for key, value in metadata.items()) + b"".join(infos)
    with path.open("wb") as file:
        file.writelines([head, bytes(-len(head) % alignment), *data])
    return path


def gguf_head(num_tensors: int, num_pairs: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs)


def gguf_string(text: str | bytes, length: int | None = None) -> bytes:
    """A text; `length` states another length than it has."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def gguf_pair(key: str, value: Any) -> bytes:
    value = value if isinstance(value, Typed) else Typed(_type_of(value), value)
    if isinstance(value.value, list):
        number = GGUF_TYPES[value.type][0]
        head = struct.pack("<IIQ", GGUF_TYPES["array"][0], number, len(value.value))
        return gguf_string(key) + head + b"".join(_gguf_value(value.type, v) for v in value.value)
    number = GGUF_TYPES[value.type][0]
    return gguf_string(key) + struct.pack("<I", number) + _gguf_value(value.type, value.value)


def gguf_tensor_info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One tensor's entry; `shape` row-major, stored reversed."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return gguf_string(name) + dims + struct.pack("<IQ", kind, offset)


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        first = _type_of(value[0]) if value else "int32"
        return "int32" if first == "uint32" else first
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "uint32" if value >= 0 else "int32"
    return "float32" if isinstance(value, float) else "string"


def _gguf_value(kind: str, value: Any) -> bytes:
    return gguf_string(value) if kind == "string" else struct.pack(GGUF_TYPES[kind][1], value)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A sound file from float32 and float16 arrays, or (dtype, shape, bytes) for others (BF16)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            kind = {"float32": "F32", "float16": "F16"}[tensor.dtype.name]
            tensor = (kind, tensor.shape, np.ascontiguousarray(tensor).tobytes())
        dtype, shape, raw = tensor
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))
    return path


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (an object, or its raw bytes) and data; `length` states another length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def quantise_q8_0(values: np.ndarray) -> bytes:
    """float32, a multiple of 32 of them -> Q8_0 blocks: d = max |x| / 127, q = round(x / d)."""
    blocks = values.astype(np.float32).reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)).astype(np.int8)
    out = np.empty(len(blocks), [("d", "<f2"), ("q", "i1", 32)])
    out["d"], out["q"] = d[:, 0], q
    return out.tobytes()


def quantise_q4_1(values: np.ndarray) -> bytes:
    """float32, a multiple of 32 of them -> Q4_1 blocks: x is near d * q + m, q in 0..15."""
    blocks = values.astype(np.float32).reshape(-1, 32)
    m = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - m) / np.float32(15)
    q = np.rint(np.divide(blocks - m, d, out=np.zeros_like(blocks), where=d > 0))
    q = q.clip(0, 15).astype(np.uint8)
    out = np.empty(len(blocks), [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
    out["d"], out["m"], out["q"] = d[:, 0], m[:, 0], q[:, :16] | (q[:, 16:] << 4)
    return out.tobytes()


def to_bf16(values: np.ndarray) -> bytes:
    """float32 -> bfloat16 bytes, rounded to nearest even (finite values)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
