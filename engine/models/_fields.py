"""Strict reading of a checkpoint's configuration: every failure is named by its key.

Shared by the families; what a value means is theirs. Config files come from strangers, so nothing
here may fail with anything but ConfigError, whatever the file holds.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ConfigError, ModelConfig

REQUIRED: Any = object()

MAX_SIZE = 1 << 24  # widths, vocabulary and context: far above any model, far below overflow
MAX_LAYERS = 1 << 12
MAX_HEADS = 1 << 14
MAX_HEAD_DIM = 1 << 12


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 64 else f"<an integer of {x.bit_length()} bits>"


def show(value: object) -> str:
    """A short repr that holds no control character and never fails."""
    shown = _Repr().repr(value)
    return "".join(c if c.isprintable() else "?" for c in shown)


class Fields:
    """The keys of one mapping, read by name. `null` counts as absent, as transformers has it."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(where, f"{where} must be an object of keys, not {show(values)}")
        self.values = values
        self.where = where
        self.prefix = prefix
        self.read: set[str] = set()

    def absent(self, key: str, value: Any, null: Any) -> Any:
        """A default: `value` where there is no such key, `null` where it says null."""
        return null if self.prefix + key in self.values else value

    def has(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def raw(self, key: str, default: Any = REQUIRED) -> Any:
        """The value as it stands. Errors: ConfigError where it is absent without a default."""
        full = self.prefix + key
        self.read.add(full)
        value = self.values.get(full)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(full, f"{self.where}: {full} is missing; the model needs it")
        return default

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> int:
        value = self.raw(key, default)
        if not self.has(key):
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, value, f"an integer in {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = REQUIRED) -> float:
        """A finite number with low < value <= high (low itself is refused: sizes and divisors)."""
        value = self.raw(key, default)
        if not self.has(key):
            return value  # type: ignore[no-any-return]
        if not is_number(value) or not low < value <= high:
            raise self.bad(key, value, f"a number above {low} and at most {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: Any = REQUIRED) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.bad(key, value, "one of " + ", ".join(allowed))
        return value

    def divisors(self, key: str, length: int) -> tuple[float, ...]:
        """`length` numbers above 0."""
        value = self.raw(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(is_number(x) and 0 < x <= 1e9 for x in value)
        ):
            raise self.bad(key, value, f"a list of {length} numbers above 0 and at most 1e9")
        return tuple(float(x) for x in value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids, or none."""
        value = self.raw(key, ())
        ids = value if isinstance(value, list | tuple) else (value,)
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
                raise self.bad(key, value, f"token ids in 0..{vocab_size - 1}")
        return tuple(ids)

    def neutral(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse a key that would change the computation in a way that is not implemented."""
        for key, allowed in table.items():
            value = self.raw(key, None)
            if value is not None and not any(_equal(value, a) for a in allowed):
                only = " or ".join(map(show, allowed)) or "absent"
                raise ConfigError(
                    self.prefix + key,
                    f"{self.where}: {self.prefix}{key} = {show(value)} is not supported; "
                    f"supported: {only}",
                )

    def ignore(self, *keys: str) -> None:
        self.read.update(self.prefix + key for key in keys)

    def unused(self) -> list[str]:
        """Keys under the prefix that have a value and that nothing has read."""
        named = (k for k in self.values if isinstance(k, str) and k.startswith(self.prefix))
        return sorted(
            show(k)[1:-1] for k in named if k not in self.read and self.values[k] is not None
        )

    def bad(self, key: str, value: object, wanted: str) -> ConfigError:
        full = self.prefix + key
        return ConfigError(full, f"{self.where}: {full} must be {wanted}, not {show(value)}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


def finish(fields: Fields, sizes: Mapping[str, Any], **more: Any) -> ModelConfig:
    """The ModelConfig, with a note of every key that nothing read."""
    notes = list(more.pop("notes", ()))
    unused = fields.unused()
    if unused:
        rest = f" and {len(unused) - 20} more" if len(unused) > 20 else ""
        notes.append("not used: " + ", ".join(unused[:20]) + rest)
    return ModelConfig(**{**sizes, **more}, notes=tuple(notes))
