"""sentencepiece's model file, written and read in protobuf's wire format by hand.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
Only the fields that decide how text becomes ids are touched; protobuf is not a dependency.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .mapped import CheckpointError

NORMAL: Final = 1  # the kinds of piece; GGUF's token types have the same numbers
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6

_BPE: Final = 2  # TrainerSpec.model_type
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto


def build_bpe_model(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    unknown_id: int | None,
) -> bytes:
    """A model of merges by score with byte fallback, that changes nothing in a text but spaces.

    Exactly one piece is the unknown one: `unknown_id`, else the first of that kind. Further pieces
    of that kind are never made from text. Errors: CheckpointError for scores that are no numbers,
    and for a vocabulary that cannot take every text (no bytes and nothing unknown).
    """
    kinds = list(kinds)
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(
            "tokenizer.ggml.scores", "tokenizer.ggml.scores: holds NaN or infinity"
        )
    num_bytes = kinds.count(BYTE)
    if num_bytes not in (0, 256):
        raise CheckpointError(
            "tokenizer.ggml.token_type",
            f"tokenizer.ggml.token_type: {num_bytes} tokens stand for bytes; it must be 256 or 0",
        )
    unknown = unknown_id if unknown_id is not None else _first(kinds, UNKNOWN)
    extra = b""
    if unknown is None:
        if not num_bytes:
            raise CheckpointError(
                "tokenizer.ggml.unknown_token_id",
                "tokenizer.ggml.unknown_token_id is missing and no tokens stand for bytes; "
                "characters outside the vocabulary could not be encoded",
            )
        # The library wants one; with all the bytes there it never comes out.
        extra = _piece(b"<no unknown piece>", 0.0, UNKNOWN)
    kinds = [CONTROL if k == UNKNOWN else k for k in kinds]
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    body = b"".join(map(_piece, pieces, scores, kinds)) + extra
    trainer = _varint_field(3, _BPE) + _varint_field(35, int(num_bytes == 256))
    normalizer = (
        _bytes_field(1, b"identity")
        + _varint_field(3, 0)  # add_dummy_prefix: the caller puts the space where it belongs
        + _varint_field(4, 0)  # remove_extra_whitespaces
        + _varint_field(5, 1)  # escape_whitespaces
    )
    return body + _bytes_field(_TRAINER, trainer) + _bytes_field(_NORMALIZER, normalizer)


@dataclass(frozen=True)
class NormalizerSpec:
    """What a model does to a text's spaces before anything else."""

    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read_normalizer(model: bytes) -> NormalizerSpec:
    """The normalizer of a tokenizer.model. Errors: CheckpointError (no such file, or damaged)."""
    values = {3: 1, 4: 1}
    for field, value in _fields(model):
        if field == _NORMALIZER and isinstance(value, bytes):
            values |= {f: v for f, v in _fields(value) if isinstance(v, int)}
    return NormalizerSpec(bool(values[3]), bool(values[4]))


def add_fields(model: bytes, *, add_dummy_prefix: bool) -> bytes:
    """The model with that setting: a message written again is merged into the first, and wins."""
    return model + _bytes_field(_NORMALIZER, _varint_field(3, int(add_dummy_prefix)))


def _first(kinds: Sequence[int], kind: int) -> int | None:
    return kinds.index(kind) if kind in kinds else None


def _piece(text: bytes, score: float, kind: int) -> bytes:
    """Field 1 of ModelProto: {1: piece, 2: score (float32), 3: type}."""
    n = len(text)
    if n < 100:  # all but a few: every length is one byte
        return b"\n%c\n%c%b\x15%b\x18%c" % (n + 9, n, text, _f32(score), kind)
    return _bytes_field(
        _PIECES, _bytes_field(1, text) + b"\x15" + _f32(score) + _varint_field(3, kind)
    )


_f32 = struct.Struct("<f").pack


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes_field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message; fixed-width values come as their bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _broken(f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise _broken(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _broken(f"no number at byte {at}")


def _broken(what: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer.model", f"tokenizer.model is no sentencepiece model, or damaged: {what}"
    )


__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "NormalizerSpec",
    "add_fields",
    "build_bpe_model",
    "read_normalizer",
]
