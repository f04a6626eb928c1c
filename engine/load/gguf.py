"""GGUF files, versions 2 and 3: a bounded reader of the header over a memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (a description; no code is taken).
Whatever the header says is checked against the file before it is used, in Python's unbounded
integers: counts, lengths, offsets, sizes and the alignment. Nothing is allocated from a number that
the file merely claims. Numbers are decoded at open; texts and arrays when they are asked for
(gguf_metadata.py), their bounds having been checked at open.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.weights import FILE_FORMATS, Format, RawWeight
from ...quant.gguf_repacked import REPACKED
from .gguf_metadata import ARRAY, BOOL, STRING, TYPES, Array, Metadata, Text, u64
from .mapped import CheckpointError, MappedFile, no_such_tensor, shown

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME = 65535  # bytes of a metadata key (the format's own limit) or of a tensor name
MAX_TEXT = 1 << 26  # bytes of one text; embedded tokenizer.json files reach tens of MB
MAX_TEXTS = 1 << 22  # texts in all arrays together: each costs a step of the walk at open
MAX_DIMS = 4
ALIGNMENTS = tuple(1 << i for i in range(3, 13))  # 8..4096

_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")

# Tensor types by number (ggml.h), all of them, so that an unsupported one can be named.
_TENSOR_TYPE_NAMES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS
    IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16
"""
_TENSOR_TYPES = dict(enumerate(_TENSOR_TYPE_NAMES.split()))
_TENSOR_TYPES |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"}
_FORMATS = {**FILE_FORMATS, **{name: kind.stored for name, kind in REPACKED.items()}}
TENSOR_NUMBERS = {name: number for number, name in _TENSOR_TYPES.items()}

_NVFP4 = _FORMATS["NVFP4"]

# The types that known keys must have: int8 "scores" read as float32 were a real hole elsewhere.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "general.architecture": ("string",),
    "general.alignment": ("uint32",),
    "split.count": ("uint16", "uint32"),
    "tokenizer.chat_template": ("string",),
    "tokenizer.ggml.add_bos_token": ("bool",),
    "tokenizer.ggml.add_eos_token": ("bool",),
    "tokenizer.ggml.add_space_prefix": ("bool",),
    "tokenizer.ggml.merges": ("array of string",),
    "tokenizer.ggml.model": ("string",),
    "tokenizer.ggml.pre": ("string",),
    "tokenizer.ggml.scores": ("array of float32",),
    "tokenizer.ggml.token_type": ("array of int32", "array of uint32"),
    "tokenizer.ggml.tokens": ("array of string",),
}
_BYTE_TOKEN = 6  # a token_type: the token stands for one byte and is written <0xHH>

_u32 = struct.Struct("<I").unpack_from


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` row-major (reversed in the file), `offset` from byte 0."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """One GGUF file: `metadata`, `tensors` by name, and their bytes as views of the map.

    Errors: CheckpointError, its `field` naming what in the header is at fault.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        try:
            header = _Header(self.file)
            self.version, self.metadata, self.tensors = header.read()
            self._pairs = header.pairs
        except BaseException:
            self.file.close()
            raise

    def tensor(self, name: str) -> RawWeight:
        """One tensor, its data a view of the mapped file. Errors: CheckpointError."""
        info = self.tensors.get(name)
        if info is None:
            raise no_such_tensor(self.file.name, name, self.tensors)
        data = self.file.view(info.offset, info.nbytes)
        kind = REPACKED.get(info.format.name)
        if kind is None:
            return RawWeight(name, info.format, info.shape, {"data": data})
        return kind.weight(name, info.shape, data, self._factors(info))

    def hidden(self) -> frozenset[str]:
        """Tensors that belong to others: scales of NVFP4 weights, and of what those multiply."""
        four = [n.removesuffix("weight") for n, t in self.tensors.items() if t.format is _NVFP4]
        beside = {name + kind for name in four for kind in ("scale", "input_scale")}
        return frozenset(beside.intersection(self.tensors))

    def _factors(self, info: TensorInfo) -> np.ndarray | None:
        """What an NVFP4 tensor's scales are multiplied by. Errors: CheckpointError."""
        scale = self.tensors.get(f"{info.name.removesuffix('weight')}scale")
        if info.format is not _NVFP4 or scale is None:
            return None
        experts = info.shape[0] if len(info.shape) == 3 else 1
        if scale.format.name != "F32" or scale.shape not in ((1,), (experts,)):
            raise CheckpointError(
                scale.name,
                f"tensor {scale.name!r} is {scale.format.name} of shape {list(scale.shape)}; the "
                f"scale of {info.name!r} is a number in F32, or one for each of its experts",
            )
        return self.file.view(scale.offset, scale.nbytes).view("<f4")

    @property
    def pairs(self) -> bytes:
        """The metadata as the file has it: keys, types and values."""
        return self.file.buffer[self._pairs]

    def close(self) -> None:
        self.file.close()


class _Header:
    """The walk over a header: a position that never passes the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.map: mmap = file.buffer
        self.size = file.size
        self.at = 0
        self.texts = 0  # seen in arrays so far
        self.pairs = slice(0)  # of the file's bytes, the metadata's

    def read(self) -> tuple[int, Metadata, dict[str, TensorInfo]]:
        version = self.version()
        # The least that one entry takes: a tensor 8 + 4 + 8 + 4 + 8 bytes, a pair 8 + 4 + 1.
        num_tensors = self.count("tensor_count", MAX_TENSORS, 32)
        num_keys = self.count("metadata_kv_count", MAX_KEYS, 13)
        metadata, start = Metadata(self.file), self.at
        for i in range(num_keys):
            self.pair(i, metadata)
        self.pairs = slice(start, self.at)
        self.check_metadata(metadata)
        entries = [self.tensor_entry(i) for i in range(num_tensors)]
        return version, metadata, self.place(entries, metadata.get("general.alignment", 32))

    # ------------------------------------------------------------------------ primitives

    def fail(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(field, f"{self.file.name}: {shown(field)}: {message}")

    def take(self, nbytes: int, field: str) -> int:
        """The position of the next `nbytes` bytes, which are passed."""
        at = self.at
        if nbytes > self.size - at:
            raise self.fail(
                field,
                f"needs {nbytes} bytes at byte {at}, but the file ends after {self.size - at} more "
                f"(it has {self.size}); it is damaged or was not fetched completely",
            )
        self.at = at + nbytes
        return at

    def u32(self, field: str) -> int:
        value: int = _u32(self.map, self.take(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        value: int = u64(self.map, self.take(8, field))[0]
        return value

    def count(self, field: str, most: int, least_bytes: int) -> int:
        """A count of entries that take at least `least_bytes` each: both bound it."""
        n = self.u64(field)
        if n > most:
            raise self.fail(field, f"{n} is more than the {most} that are read")
        if n * least_bytes > self.size:
            raise self.fail(
                field,
                f"{n} entries of at least {least_bytes} bytes do not fit in a file of "
                f"{self.size} bytes",
            )
        return n

    def name(self, field: str) -> str:
        """A key or a tensor's name: UTF-8, not empty, at most MAX_NAME bytes."""
        n = self.u64(f"{field} length")
        if not 0 < n <= MAX_NAME:
            raise self.fail(f"{field} length", f"{n} bytes; a name has 1..{MAX_NAME}")
        at = self.take(n, field)
        try:
            return self.map[at : at + n].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, f"not UTF-8 ({error.reason} at byte {error.start})") from None

    # -------------------------------------------------------------------------- sections

    def version(self) -> int:
        magic = self.map[self.take(4, "magic") : 4]
        if magic != b"GGUF":
            raise self.fail(
                "magic", f"the file starts with {magic!r}, not b'GGUF'; not a GGUF file"
            )
        version = self.u32("version")
        if version in (2, 3):
            return version
        if not version & 0xFFFF and version >> 16:
            raise self.fail("version", "a big-endian GGUF file; only little-endian ones are read")
        mend = "; convert the model again with a current llama.cpp" if version < 2 else ""
        raise self.fail("version", f"GGUF version {version}; versions 2 and 3 are read{mend}")

    def pair(self, index: int, metadata: Metadata) -> None:
        key = self.name(f"key {index}")
        if key in metadata:
            raise self.fail(key, "the key appears twice")
        kind = self.type_number(key)
        value: Any
        if kind == STRING:
            value = self.text(key)
        elif kind == ARRAY:
            value = self.array(key)
        else:
            value = self.number(key, kind)
        name = TYPES[kind][0]
        if isinstance(value, Array):
            name = f"array of {TYPES[value.element][0]}"
        expected = _EXPECTED.get(key)
        if expected and name not in expected:
            raise self.fail(key, f"is {name}; it must be {' or '.join(expected)}")
        metadata.add(key, name, value)

    def type_number(self, key: str) -> int:
        kind = self.u32(f"{key} type")
        if kind >= len(TYPES):
            raise self.fail(f"{key} type", f"{kind} is no GGUF value type (0..{len(TYPES) - 1})")
        return kind

    def number(self, key: str, kind: int) -> int | float | bool:
        code = TYPES[kind][1]
        value: int | float = struct.unpack_from(
            code, self.map, self.take(struct.calcsize(code), key)
        )[0]
        if kind != BOOL:
            return value
        if value > 1:
            raise self.fail(key, f"a bool of {value}, not 0 or 1")
        return bool(value)

    def text(self, key: str) -> Text:
        n = self.u64(f"{key} length")
        if n > MAX_TEXT:
            raise self.fail(f"{key} length", f"a text of {n} bytes; at most {MAX_TEXT} are read")
        at = self.take(n, key)
        return Text(at, at + n)

    def array(self, key: str) -> Array:
        element = self.type_number(key)
        field = f"{key} count"
        count = self.u64(field)
        if element == ARRAY:
            raise self.fail(key, "an array of arrays; these are not read")
        start = self.at
        if element != STRING:
            self.take(count * struct.calcsize(TYPES[element][1]), field)
            return Array(element, count, start, self.at)
        if count * 8 > self.size - start:
            raise self.fail(
                field,
                f"{count} texts take at least {count * 8} bytes; the file has {self.size - start} "
                "more",
            )
        self.texts += count
        if self.texts > MAX_TEXTS:
            raise self.fail(field, f"more than {MAX_TEXTS} texts in arrays")
        at, size, length, data = start, self.size, u64, self.map
        try:
            for _ in range(count):  # the hot loop of opening a file: a vocabulary
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError):
            at = size + 1
        if at > size:
            raise self.fail(key, f"its {count} texts reach beyond the file's {size} bytes")
        self.at = at
        return Array(STRING, count, start, at)

    def check_metadata(self, metadata: Metadata) -> None:
        """What every reader of a GGUF file relies on, whatever the architecture."""
        if "general.architecture" not in metadata:
            raise self.fail("general.architecture", "the key is missing; it names the model family")
        architecture = metadata["general.architecture"]
        if not re.fullmatch(r"[!-~]{1,64}", architecture):
            raise self.fail(
                "general.architecture", f"{shown(architecture)!r} is no name of 1..64 characters"
            )
        alignment = metadata.get("general.alignment", 32)
        if alignment not in ALIGNMENTS:
            raise self.fail(
                "general.alignment", f"{alignment} is not a power of two in 8..{ALIGNMENTS[-1]}"
            )
        if metadata.get("split.count", 1) > 1:
            raise self.fail(
                "split.count",
                f"one of {metadata['split.count']} parts of a split model, which is not read; join "
                "them with llama.cpp: llama-gguf-split --merge FIRST-PART OUT.gguf",
            )
        blocks = f"{architecture}.block_count"
        if blocks in metadata:
            n = metadata[blocks]
            if metadata.type_of(blocks) not in _INTEGERS or not 0 < n <= 65535:
                raise self.fail(blocks, f"{n!r}; a model has 1..65535 layers")
        self.check_vocabulary(metadata)

    def check_vocabulary(self, metadata: Metadata) -> None:
        if "tokenizer.ggml.tokens" not in metadata:
            return
        num_tokens = metadata.count("tokenizer.ggml.tokens")
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            if key in metadata and metadata.count(key) != num_tokens:
                raise self.fail(
                    key, f"{metadata.count(key)} entries for {num_tokens} tokens; one each"
                )
        if "tokenizer.ggml.token_type" not in metadata:
            return
        ids = np.flatnonzero(metadata.numbers("tokenizer.ggml.token_type") == _BYTE_TOKEN)
        texts = metadata.texts("tokenizer.ggml.tokens", int(ids[-1]) + 1) if ids.size else []
        for i in ids.tolist():
            if not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", texts[i]):
                raise self.fail(
                    "tokenizer.ggml.tokens",
                    f"token {i} stands for a byte but is written {texts[i][:20]!r}, not <0xHH>",
                )

    def tensor_entry(self, index: int) -> TensorInfo:
        """One tensor as the header has it; `offset` is still from the start of the data."""
        name = self.name(f"tensor {index} name")
        num_dims = self.u32(f"{name} n_dims")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"{name} n_dims", f"{num_dims} dimensions; 1..{MAX_DIMS} are read")
        dims = [self.u64(f"{name} dims") for _ in range(num_dims)]
        shape = tuple(reversed(dims))
        if 0 in shape:
            raise self.fail(f"{name} dims", f"{list(shape)} has a dimension of 0")
        number = self.u32(f"{name} type")
        kind = _TENSOR_TYPES.get(number, f"number {number}")
        if kind not in _FORMATS:
            raise self.fail(
                f"{name} type",
                f"tensor type {kind} is not supported (supported: {', '.join(_FORMATS)})",
            )
        fmt = _FORMATS[kind]
        try:
            nbytes = math.prod(shape[:-1]) * fmt.row_bytes(shape[-1])
        except ValueError as error:
            raise self.fail(f"{name} dims", str(error)) from None
        if nbytes > self.size:
            raise self.fail(
                f"{name} dims",
                f"{kind} of shape {list(shape)} takes {nbytes} bytes; the file has {self.size}",
            )
        return TensorInfo(name, fmt, shape, self.u64(f"{name} offset"), nbytes)

    def place(self, entries: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Tensors by name with offsets from byte 0, each inside the file, none over another."""
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for t in entries:
            if t.name in tensors:
                raise self.fail(t.name, "the tensor appears twice")
            if t.offset % alignment:
                raise self.fail(
                    f"{t.name} offset", f"{t.offset} is not a multiple of the alignment {alignment}"
                )
            start = data + t.offset
            if start + t.nbytes > self.size:
                raise self.fail(
                    f"{t.name} offset",
                    f"{t.nbytes} bytes at byte {start} reach beyond the file's {self.size}; it is "
                    "damaged or was not fetched completely",
                )
            tensors[t.name] = TensorInfo(t.name, t.format, t.shape, start, t.nbytes)
        for a, b in pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
            if a.offset + a.nbytes > b.offset:
                raise self.fail(
                    f"{b.name} offset", f"byte {b.offset} lies within tensor {shown(a.name)!r}"
                )
        return tensors


__all__ = ["TENSOR_NUMBERS", "CheckpointError", "GgufFile", "Metadata", "TensorInfo"]
