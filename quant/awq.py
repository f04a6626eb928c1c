"""AWQ checkpoints (AutoAWQ, "gemm" packing): 4-bit integers in groups along the inputs.

Per module: `qweight` int32 [K, N / 8], eight outputs a word in the order of _PLACES, lowest bits
first; `scales` [G, N]; `qzeros` int32 [G, N / 8], packed alike. value = scale (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.weights import RawWeight
from .groups import even_groups, int4_format, int4_rows, pack_nibbles
from .parts import (
    Layout,
    Options,
    Part,
    group_count,
    group_size_of,
    require_columns,
)

_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the i-th nibble of a word belongs to
_IGNORED = frozenset(
    (
        "backend",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "modules_to_not_convert",
        "zero_point",
    )
)


class Awq:
    """quant_method "awq". Errors: FormatError for an option that is not supported."""

    layouts = (Layout("qweight", {part: f".{part}" for part in ("qweight", "scales", "qzeros")}),)
    notes = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        options.one_of("bits", (4,), config.get("w_bit"))
        options.one_of("w_bit", (4,), 4)
        size = config.get("group_size", config.get("q_group_size"))
        self._group_size = group_size_of(Options({"group_size": size}, options.where))
        options.take("group_size")
        options.take("q_group_size")
        options.one_of("version", ("gemm", "GEMM"), "gemm")
        options.finish(_IGNORED)

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        packed, zeros = parts["qweight"], parts["qzeros"]
        for part in (packed, zeros):
            part.require_dtype("I32")
        packed.require_matrix()
        columns, num_rows = packed.shape[0], packed.shape[1] * 8
        require_columns(packed.name, columns, 32)
        num_groups = group_count(columns, self._group_size)
        parts["scales"].require_shape(num_groups, num_rows)
        zeros.require_shape(num_groups, num_rows // 8)
        scales = parts["scales"].floats
        groups = even_groups(columns, self._group_size)

        def made(start: int, stop: int) -> np.ndarray:
            first, last = start // 8, -(-stop // 8)
            part = slice(start - 8 * first, stop - 8 * first)
            nibbles = np.concatenate(
                [pack_nibbles(v)[:, None] for v in _outputs(packed, first, last)], axis=1
            )
            zero = np.stack(list(_outputs(zeros, first, last)), axis=1)
            return int4_rows(
                nibbles.reshape(8 * (last - first), -1)[part],
                scales()[:, start:stop].T,
                zero.reshape(8 * (last - first), -1)[part].astype(np.float32) - np.float32(8),
                groups,
            )

        return RawWeight(
            f"{module}.weight",
            int4_format(groups),
            (num_rows, columns),
            {},
            make=made,
        )

    def is_spare(self, part: Part) -> bool:
        return False


def _outputs(packed: Part, first: int, last: int) -> list[np.ndarray]:
    """Of words [first, last) of each row, the values of each of their eight outputs.

    uint8 [last - first, rows] each; `packed` is int32 [rows, words].
    """
    words = np.ascontiguousarray(packed.array()[:, first:last].T)
    by_byte = words.view(np.uint8).reshape(*words.shape, 4)
    out = []
    for output in range(8):
        nibble = _PLACES.index(output)
        values = by_byte[..., nibble // 2]
        out.append(values >> np.uint8(4) if nibble % 2 else values & np.uint8(15))
    return out


__all__ = ["Awq"]
