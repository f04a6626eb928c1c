"""GGUF's types that are read as other formats, exactly: IQ4_NL, IQ4_XS and NVFP4.

Their blocks are those of ggml-common.h of ggml (MIT: facts of the file format), their values those
of ggml-quants.c. A 4-bit code of the first two stands for one of 16 integers of 8 bits, so that
they are I8G32: d q, d the block's float16, of IQ4_XS times a group's 6 bits less 32. NVFP4 has a
scale in E4M3 per 16 codes, its sign ignored and 127 read as 0, and beside a tensor NAME.weight may
stand NAME.scale, a float or one for each expert, by which its scales are multiplied.
"""

# mypy: no-warn-return-any
# (numpy types the fields of a structured array, and what is computed from them, as Any)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..kernels.weights import I8G32, NVFP4, Format, RawWeight
from .fp4 import nvfp4_rows
from .gguf import block_dtype, halves_of_bytes
from .groups import pack_nibbles
from .small_floats import e4m3_values

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
_E4M3 = np.concatenate([e4m3_values()[:127], [0], e4m3_values()[:127], [480]]).astype(np.float32)


@dataclass(frozen=True)
class Repacked:
    """A type of the file, and what it is read as: `rows` makes N rows of that format of all their
    blocks [n], given what each row's scales are multiplied by [N]."""

    stored: Format
    read_as: Format
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        data: np.ndarray,
        factors: np.ndarray | None = None,
    ) -> RawWeight:
        """A weight of the file's bytes; factors: float32, of all rows or of equal parts of them."""
        num_rows = int(np.prod(shape[:-1], dtype=np.int64))
        row_bytes = self.stored.row_bytes(shape[-1])
        whole = np.ones(1, np.float32) if factors is None else factors

        def make(start: int, stop: int) -> np.ndarray:
            blocks = data[start * row_bytes : stop * row_bytes].view(block_dtype(self.stored))
            by = whole[np.arange(start, stop) * len(whole) // num_rows]
            with np.errstate(all="ignore"):  # a NaN or an infinity is a value like any other here
                return self.rows(blocks, by).reshape(-1).view(np.uint8)

        return RawWeight(name, self.read_as, shape, {name: data}, make=make)


def _integers(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Blocks of I8G32 of codes [n, 32] and scales float32 [n]."""
    out = np.zeros(len(codes), block_dtype(I8G32))
    out["d"][:, 0], out["quants"] = d, IQ4_VALUES[codes]
    return out


def _iq4_nl(b: np.ndarray, by: np.ndarray) -> np.ndarray:
    return _integers(halves_of_bytes(b["nibbles"], 16), b["d"][:, 0].astype(np.float32))


def _iq4_xs(b: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Group g of 32 has four low bits in the nibbles of byte g / 2, its upper two in bits 2g."""
    group = np.arange(8)
    low = (b["scales_low"][:, group // 2] >> (4 * (group % 2)).astype(np.uint8)) & np.uint8(15)
    high = (b["scales_high"] >> (2 * group).astype(np.uint16)) & np.uint16(3)
    scale = (low | (high << np.uint16(4))).astype(np.float32) - np.float32(32)
    d = b["d"].astype(np.float32) * scale
    return _integers(halves_of_bytes(b["nibbles"], 16).reshape(-1, 32), d.reshape(-1))


def _nvfp4(b: np.ndarray, by: np.ndarray) -> np.ndarray:
    scale = _E4M3[b["scales"]].reshape(len(by), -1)
    nibbles = pack_nibbles(halves_of_bytes(b["nibbles"], 8)).reshape(len(by), -1)
    return nvfp4_rows(scale, nibbles, by * np.float32(0.5))


_HALF = ("d", "f2", 1)
REPACKED: Mapping[str, Repacked] = {
    kind.stored.name: kind
    for kind in (
        Repacked(Format("IQ4_NL", 32, 18, (_HALF, ("nibbles", "u1", 16))), I8G32, _iq4_nl),
        Repacked(
            Format(
                "IQ4_XS",
                256,
                136,
                (_HALF, ("scales_high", "u2", 1), ("scales_low", "u1", 4), ("nibbles", "u1", 128)),
            ),
            I8G32,
            _iq4_xs,
        ),
        Repacked(
            Format("NVFP4", 64, 36, (("scales", "u1", 4), ("nibbles", "u1", 32))), NVFP4, _nvfp4
        ),
    )
}

__all__ = ["IQ4_VALUES", "REPACKED", "Repacked"]
