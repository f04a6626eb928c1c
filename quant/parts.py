"""Tensors of which a checkpoint makes one weight: packed integers, scales, zero points."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..kernels.weights import RawWeight

_VIEWS = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "I8": "i1",
    "U8": "u1",
    "I32": "<i4",
    "I64": "<i8",
}
FLOATS = ("F32", "F16", "BF16")


class FormatError(ValueError):
    """A quantised checkpoint that cannot be read as it says; `field` is the key or the tensor."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor as the file holds it: `dtype` in safetensors' words, `data` its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def array(self) -> np.ndarray:
        """A view of the elements; BF16 and F8_E4M3 as their bits."""
        return self.data.view(_VIEWS[self.dtype]).reshape(self.shape)

    def floats(self) -> np.ndarray:
        """float32 of a tensor of floats, exactly. Errors: FormatError for another type."""
        self.require_dtype(*FLOATS)
        if self.dtype == "BF16":
            return (self.array().astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.array().astype(np.float32)

    def require_dtype(self, *dtypes: str) -> None:
        if self.dtype not in dtypes:
            raise FormatError(
                self.name, f"tensor {self.name!r} is {self.dtype}, not {' or '.join(dtypes)}"
            )

    def require_shape(self, *shape: int) -> None:
        if self.shape != shape:
            raise FormatError(
                self.name,
                f"tensor {self.name!r} has shape {list(self.shape)}, not {list(shape)}, which the "
                "weight's other tensors and config.json ask for",
            )

    def require_matrix(self) -> None:
        if len(self.shape) != 2:
            raise FormatError(
                self.name,
                f"tensor {self.name!r} has shape {list(self.shape)}; a weight has two dimensions. "
                "A layer's experts in one tensor are read in 16 bits and as gpt-oss has them in "
                "MXFP4; in other formats each expert has to have tensors of its own",
            )


@dataclass(frozen=True)
class Layout:
    """Which tensors make a weight: those named as its module plus a suffix, by what they are.

    The one called `mark` says that the module has such a weight; `optional` ones may be missing.
    """

    mark: str
    suffixes: Mapping[str, str]
    optional: Collection[str] = ()
    weight: str = ".weight"  # the suffix of the weight that they make


class Reader(Protocol):
    """A method of quantising, as a checkpoint's configuration says it was used."""

    @property
    def layouts(self) -> tuple[Layout, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of loading such a checkpoint."""
        ...

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        """The weight of a module; its `make` reads the parts, and `buffers` is left to the caller.

        Errors: FormatError for what does not fit together.
        """
        ...

    def is_spare(self, part: Part) -> bool:
        """Whether a tensor that no model reads may be left unread."""
        ...


@dataclass
class Options:
    """A configuration's keys, each to be taken once; what is left at the end is not known.

    Errors: FormatError naming the key, its value and what is supported.
    """

    config: Mapping[str, Any]
    where: str
    file: str = "config.json"
    _left: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._left = dict(self.config)

    def take(self, key: str, default: Any = None) -> Any:
        """The key's value; `default` where it is absent or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def one_of(self, key: str, values: Collection[Any], default: Any = None) -> Any:
        value = self.take(key, default)
        if not any(type(value) is type(v) and value == v for v in values):
            raise self.error(key, value, values)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.one_of(key, (True, False), default))

    def error(self, key: str, value: Any, values: Collection[Any]) -> FormatError:
        known = ", ".join(repr(v) for v in values)
        return FormatError(
            f"{self.where}.{key}",
            f"{self.file}: {self.where}.{key} is {repr(value)[:80]}, which is not supported "
            f"(supported: {known})",
        )

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Every key must have been taken, change nothing (`ignored`), or be empty."""
        unknown = [key for key, value in self._left.items() if value and key not in ignored]
        if unknown:
            raise FormatError(
                f"{self.where}.{unknown[0]}",
                f"{self.file}: {self.where}.{unknown[0]} = {repr(self._left[unknown[0]])[:80]} is "
                "not known here, and may change what the weights mean",
            )


def group_size_of(options: Options) -> int:
    """group_size: a positive multiple of 32, or -1 for one group a row."""
    size = options.take("group_size", -1)
    if type(size) is not int or not (size == -1 or (size > 0 and size % 32 == 0)):
        raise FormatError(
            f"{options.where}.group_size",
            f"config.json: {options.where}.group_size is {size!r}; multiples of 32 are supported, "
            "and -1 for one group a row",
        )
    return size


def group_count(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def require_columns(name: str, columns: int, multiple: int) -> None:
    """Rows must be whole groups of `multiple`. Errors: FormatError."""
    if columns < 1 or columns % multiple:
        raise FormatError(
            name,
            f"tensor {name!r}: rows of {columns} columns are no whole groups of {multiple}, which "
            "the kernels multiply at a time",
        )


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Streams of `bits`-bit integers along axis 0: uint32 [W, n] -> uint8 [W * 32 / bits, n].

    Each stream's integers follow each other from the lowest bit of its first word up, across the
    borders of words too. W is a multiple of `bits`.
    """
    streams = words.reshape(-1, bits, words.shape[1])
    out = np.empty((len(streams), 32, words.shape[1]), np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = streams[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (streams[:, word + 1] << np.uint32(32 - shift))
        out[:, i] = value & np.uint32((1 << bits) - 1)
    return out.reshape(-1, words.shape[1])


__all__ = [
    "FLOATS",
    "FormatError",
    "Layout",
    "Options",
    "Part",
    "Reader",
    "group_count",
    "group_size_of",
    "require_columns",
    "unpack_bits",
]
