"""The key-value pairs of a GGUF file's header: texts and arrays are decoded when asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .mapped import CheckpointError, MappedFile

# Value types by number: name, struct code. Texts and arrays have lengths of their own.
TYPES: tuple[tuple[str, str], ...] = (
    ("uint8", "<B"),
    ("int8", "<b"),
    ("uint16", "<H"),
    ("int16", "<h"),
    ("uint32", "<I"),
    ("int32", "<i"),
    ("float32", "<f"),
    ("bool", "<B"),
    ("string", ""),
    ("array", ""),
    ("uint64", "<Q"),
    ("int64", "<q"),
    ("float64", "<d"),
)
BOOL, STRING, ARRAY = 7, 8, 9

u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the header, not decoded: bytes [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the header, not decoded: `count` elements in bytes [start, stop)."""

    element: int
    count: int
    start: int
    stop: int


class Metadata(Mapping[str, Any]):
    """A GGUF file's key-value pairs. Texts are decoded when first asked for, then kept; arrays are
    decoded each time, since a vocabulary's takes many times what it does in the file.

    Numbers are int, float or bool; arrays are lists. A text that is not UTF-8 shows the odd bytes
    as \\xNN. In an array of texts (a vocabulary may hold any bytes) they are surrogate escapes, so
    that `text.encode("utf-8", "surrogateescape")` gives back the file's bytes.
    """

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._values: dict[str, Any] = {}
        self._types: dict[str, str] = {}

    def add(self, key: str, type_name: str, value: Text | Array | int | float | bool) -> None:
        """A pair as the header has it."""
        self._values[key] = value
        self._types[key] = type_name

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, Text):
            raw = self._file.buffer[value.start : value.stop]
            value = self._values[key] = raw.decode("utf-8", "backslashreplace")
        elif isinstance(value, Array):
            value = self._decode(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values  # Mapping's own would decode the value

    def type_of(self, key: str) -> str:
        """The type that the file states: "uint32", "array of string". Errors: KeyError."""
        return self._types[key]

    def count(self, key: str) -> int:
        """Elements of an array, without decoding it; 1 for any other value. Errors: KeyError."""
        value = self._values[key]
        return value.count if isinstance(value, Array) else 1

    def numbers(self, key: str) -> np.ndarray:
        """An array of numbers as numpy [count]. Errors: KeyError; CheckpointError for others."""
        value = self._values[key]
        if isinstance(value, Array) and value.element != STRING:
            return self._numbers(value)
        raise CheckpointError(
            key, f"{self._file.name}: {key} is {self._types[key]}, not an array of numbers"
        )

    def texts(self, key: str, count: int) -> list[str]:
        """The first `count` of an array of texts. Errors: KeyError."""
        return self._texts(self._values[key], count)

    def _numbers(self, array: Array) -> np.ndarray:
        raw = self._file.buffer[array.start : array.stop]
        return np.frombuffer(raw, TYPES[array.element][1], array.count)

    def _decode(self, key: str, array: Array) -> list[Any]:
        if array.element == STRING:
            return self._texts(array)
        numbers = self._numbers(array)
        if array.element != BOOL:
            return list(numbers.tolist())
        if numbers.size and numbers.max() > 1:
            raise CheckpointError(
                key, f"{self._file.name}: {key} holds a bool of {numbers.max()}, not 0 or 1"
            )
        return list(numbers.astype(bool).tolist())

    def _texts(self, array: Array, count: int | None = None) -> list[str]:
        raw = self._file.buffer[array.start : array.stop]
        pieces, at = [], 0
        for _ in range(array.count if count is None else count):
            start = at + 8
            at = start + u64(raw, at)[0]
            pieces.append(raw[start:at])
        # Decoding all at once is several times faster; a text may hold a NUL, hence the check.
        texts = b"\0".join(pieces).decode("utf-8", "surrogateescape").split("\0")
        if len(texts) == len(pieces):
            return texts
        return [piece.decode("utf-8", "surrogateescape") for piece in pieces]
