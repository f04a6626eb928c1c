"""bitsandbytes checkpoints: NF4 and FP4 in blocks, with double quantisation, and LLM.int8().

Four bits, per module: `weight` (bytes of two codes, the first in the high half, of the whole matrix
as one row), `weight.absmax` per block, `weight.quant_map`, and a JSON text of sizes in
`weight.quant_state.bitsandbytes__nf4` (or fp4). value = quant_map[code] * absmax. With double
quantisation absmax is a code too: nested_quant_map[code] * nested_absmax + nested_offset.
Eight bits: `weight` int8 [N, K] and `SCB` [N]; value = weight * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.weights import BF16, CODEBOOKS, F16, F32, FORMATS, INT8, Format, RawWeight
from .gguf import block_dtype
from .groups import int8_channel_rows
from .parts import FormatError, Layout, Options, Part, require_columns

_IGNORED = frozenset(
    (
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
    )
)
_MAX_STATE = 1 << 16  # bytes of the JSON text; real ones have about 200
_DTYPES: Mapping[str, Format] = {"bfloat16": BF16, "float16": F16, "float32": F32}


class BitsAndBytes:
    """quant_method "bitsandbytes". Errors: FormatError for an option that is not supported."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        four = options.flag("load_in_4bit") | options.flag("_load_in_4bit")
        eight = options.flag("load_in_8bit") | options.flag("_load_in_8bit")
        if four == eight:
            raise options.error("load_in_4bit", four, (not four,))
        kind = options.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        options.finish(_IGNORED)
        self._is_four = four
        self.notes: tuple[str, ...] = ()
        if not four:
            self.layouts = (
                Layout(
                    "SCB",
                    {"SCB": ".SCB", "weight": ".weight", "form": ".weight_format"},
                    ("form",),
                ),
            )
            self.notes = (
                "LLM.int8(): all columns are multiplied alike; there are no 16-bit outliers",
            )
            return
        names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        state = f".weight.quant_state.bitsandbytes__{kind}"
        self.layouts = (
            Layout(
                "state",
                {"weight": ".weight", "state": state, **{n: f".weight.{n}" for n in names}},
                ("nested_absmax", "nested_quant_map"),
            ),
        )

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        make = _four_bits if self._is_four else _eight_bits
        return make(f"{module}.weight", parts)

    def is_spare(self, part: Part) -> bool:
        return False


def _eight_bits(name: str, parts: Mapping[str, Part]) -> RawWeight:
    codes, largest = parts["weight"], parts["SCB"]
    codes.require_dtype("I8")
    codes.require_matrix()
    require_columns(codes.name, codes.shape[1], INT8.block_elements)
    largest.require_shape(codes.shape[0])
    form = parts.get("form")
    if form is not None and form.data.any():
        raise FormatError(
            form.name,
            f"tensor {form.name!r} says the layout {form.data.tolist()[:4]}; only rows (0) are "
            "supported",
        )

    def made(start: int, stop: int) -> np.ndarray:
        scale = largest.floats()[start:stop] / np.float32(127)
        return int8_channel_rows(codes.array()[start:stop], scale)

    return RawWeight(name, INT8, codes.shape, {}, make=made)


def _four_bits(name: str, parts: Mapping[str, Part]) -> RawWeight:
    state = _state(parts["state"])
    num_rows, columns = state["shape"]
    codes, block = parts["weight"], state["blocksize"]
    if codes.data.nbytes != -(-num_rows * columns // 2):
        raise FormatError(
            codes.name,
            f"tensor {codes.name!r} has {codes.data.nbytes} bytes; {state['shape']} at 4 bits "
            f"takes {-(-num_rows * columns // 2)}",
        )
    parts["absmax"].require_shape(-(-num_rows * columns // block))
    parts["quant_map"].require_shape(16)
    if parts["absmax"].dtype == "U8":
        _check_nested(parts, state["nested_blocksize"])
    table = parts["quant_map"].floats()
    # What no format has is multiplied in 16 bits, as bitsandbytes itself does: rounded to the dtype
    # that the state names.
    fmt = _read_as(table, block, columns) or state["dtype"]
    if columns % 2:
        raise FormatError(codes.name, f"tensor {codes.name!r}: rows of {columns} share bytes")

    def made(start: int, stop: int) -> np.ndarray:
        largest = _absmax(parts, state)
        packed = codes.data[start * columns // 2 : stop * columns // 2]
        if not fmt.is_float:
            size = fmt.block_elements
            rows = np.empty(((stop - start) * columns // size,), block_dtype(fmt))
            first, last = start * columns // block, stop * columns // block
            rows["absmax"][:, 0] = np.repeat(largest[first:last], block // size)
            rows["nibbles"] = packed.reshape(len(rows), -1)
            return rows.view(np.uint8)
        pairs = (packed[:, None] >> np.array([4, 0], np.uint8)) & np.uint8(15)
        places = np.arange(start * columns, stop * columns) // block
        return _rounded(table[pairs.reshape(-1)] * largest[places], fmt)

    return RawWeight(
        name,
        fmt,
        (num_rows, columns),
        {},
        make=made,
    )


def _read_as(table: np.ndarray, block: int, columns: int) -> Format | None:
    """The format of this table, where its blocks make up the checkpoint's, and those the rows."""
    for name, codebook in CODEBOOKS.items():
        size = FORMATS[name].block_elements
        if np.array_equal(table, np.array(codebook, np.float32)):
            return FORMATS[name] if block % size == columns % block == 0 else None
    return None


def _check_nested(parts: Mapping[str, Part], block: int) -> None:
    absmax = parts["absmax"]
    if "nested_absmax" not in parts or "nested_quant_map" not in parts:
        raise FormatError(
            absmax.name,
            f"tensor {absmax.name!r} is quantised itself, but {absmax.name[:-6]}nested_absmax or "
            "nested_quant_map is missing",
        )
    parts["nested_quant_map"].require_shape(256)
    parts["nested_absmax"].require_shape(-(-absmax.shape[0] // block))


def _absmax(parts: Mapping[str, Part], state: Mapping[str, Any]) -> np.ndarray:
    """float32 [blocks]."""
    absmax = parts["absmax"]
    if absmax.dtype != "U8":
        return absmax.floats()
    size = state["nested_blocksize"]
    scale = np.repeat(parts["nested_absmax"].floats(), size)[: absmax.shape[0]]
    small: np.ndarray = parts["nested_quant_map"].floats()[absmax.array()] * scale
    return small + np.float32(state["nested_offset"])


def _state(part: Part) -> dict[str, Any]:
    """The JSON text, checked. Errors: FormatError naming what is wrong in it."""
    try:
        state = json.loads(part.data[:_MAX_STATE].tobytes())
        shape = [int(n) for n in state["shape"]]
        checked: dict[str, Any] = {
            "shape": shape,
            "blocksize": int(state["blocksize"]),
            "dtype": _DTYPES[state["dtype"]],
            "nested_blocksize": int(state.get("nested_blocksize") or 256),
            "nested_offset": float(state.get("nested_offset") or 0),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            part.name, f"tensor {part.name!r} is no quant state of bitsandbytes: {error!r}"
        ) from None
    sizes = (*shape, checked["blocksize"], checked["nested_blocksize"])
    if len(shape) != 2 or min(sizes) < 1 or checked["blocksize"] % 2:
        raise FormatError(part.name, f"tensor {part.name!r} names sizes that cannot be: {state}")
    return checked


def _rounded(values: np.ndarray, fmt: Format) -> np.ndarray:
    """Bytes of float32 values in a format of floats, rounded to nearest even."""
    if fmt is BF16:
        bits = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits >> np.uint32(16)).astype("<u2").view(np.uint8)
    return values.astype("<f2" if fmt is F16 else "<f4").view(np.uint8)


__all__ = ["BitsAndBytes"]
