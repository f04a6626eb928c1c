"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum): integers of 2, 3, 4 or 8 bits in groups.

Per module: `qweight` int32 [K bits / 32, N], a stream of integers down each column; `scales`
[G, N]; `qzeros` int32 [G, N bits / 32], a stream along each row; `g_idx` int32 [K], each input's
group, with act-order in no order. value = scale (q - zero). Version 1 stores zero - 1, version 2
(`gptq_v2`) zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.weights import I8G32, RawWeight
from .groups import (
    even_groups,
    int4_format,
    int4_rows,
    int8_rows,
    pack_nibbles,
    sorted_groups,
)
from .parts import (
    Layout,
    Options,
    Part,
    group_count,
    group_size_of,
    require_columns,
    unpack_bits,
)

# What they were made with, or which kernel another engine would take.
_IGNORED = frozenset(
    (
        "act_group_aware",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "desc_act",
        "disable_exllama",
        "exllama_config",
        "fail_safe",
        "failsafe",
        "foem",
        "gptaq",
        "hessian",
        "lm_head",
        "max_input_length",
        "meta",
        "method",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "mse",
        "offload_to_disk",
        "offload_to_disk_path",
        "pad_token_id",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "version",
        "vram_strategy",
        "wait_for_submodule_finalizers",
    )
)


class Gptq:
    """quant_method "gptq". Errors: FormatError for an option that is not supported."""

    layouts = (
        Layout(
            "qweight",
            {part: f".{part}" for part in ("qweight", "scales", "qzeros", "g_idx")},
            optional=("g_idx",),
        ),
    )
    notes = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, "quantization_config")
        options.take("quant_method")
        self._bits: int = options.one_of("bits", (2, 3, 4, 8))
        self._group_size = group_size_of(options)
        forms = ("gptq", "gptq_v2")
        form = options.one_of("checkpoint_format", forms, config.get("format") or "gptq")
        options.one_of("format", forms, form)
        self._is_v1 = form == "gptq"
        options.one_of("pack_dtype", ("int32",), "int32")
        options.one_of("is_marlin_format", (False,), False)
        options.finish(_IGNORED)

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        bits, packed = self._bits, parts["qweight"]
        packed.require_dtype("I32")
        packed.require_matrix()
        columns, num_rows = packed.shape[0] * 32 // bits, packed.shape[1]
        require_columns(packed.name, columns, 32)
        packed.require_shape(columns * bits // 32, num_rows)
        num_groups = group_count(columns, self._group_size)
        parts["scales"].require_shape(num_groups, num_rows)
        parts["qzeros"].require_dtype("I32")
        parts["qzeros"].require_shape(num_groups, -(-num_rows * bits // 32))
        scales = parts["scales"].floats
        order, groups = self._order(parts.get("g_idx"), columns, num_groups)

        def made(start: int, stop: int) -> np.ndarray:
            words = packed.array().view(np.uint32)[:, start:stop]
            scale, zero = scales()[:, start:stop].T, self._zeros(parts["qzeros"], start, stop)
            if bits in (4, 8) and order is None:
                bytes_ = np.ascontiguousarray(words.T).view(np.uint8)
            else:
                values = unpack_bits(words, bits)
                bytes_ = np.ascontiguousarray((values if order is None else values[order]).T)
                bytes_ = bytes_ if bits == 8 else pack_nibbles(bytes_)
            if bits == 8:
                return int8_rows((bytes_ ^ np.uint8(128)).view(np.int8), scale, zero, groups)
            return int4_rows(bytes_, scale, zero, groups)

        return RawWeight(
            f"{module}.weight",
            I8G32 if bits == 8 else int4_format(groups),
            (num_rows, columns),
            {},
            columns=order,
            make=made,
        )

    def is_spare(self, part: Part) -> bool:
        """AutoGPTQ wrote a bias of zeros where the model has none."""
        return part.name.endswith(".bias") and not part.data.any()

    def _order(
        self, index: Part | None, columns: int, num_groups: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        even = even_groups(columns, self._group_size)
        if index is None:
            return None, even
        index.require_dtype("I32")
        index.require_shape(columns)
        order, groups = sorted_groups(index.name, index.array(), num_groups)
        return (None if (order == np.arange(columns)).all() else order), groups

    def _zeros(self, packed: Part, start: int, stop: int) -> np.ndarray:
        """Zero points [stop - start, G], counted from the middle of the integers as laid out.

        A zero point of 0 is stored as all ones: GPTQModel takes a word full of ones (0x11111111)
        from words, borrows and all, and adds it again; of 3 bits it wraps each zero by itself.
        """
        bits = self._bits
        words = packed.array().view(np.uint32).T
        if self._is_v1 and bits != 3:
            words = words + np.uint32(0xFFFFFFFF // ((1 << bits) - 1))
        short = -len(words) % bits
        words = np.concatenate([words, np.zeros((short, words.shape[1]), np.uint32)])
        zero = unpack_bits(words, bits)[start:stop]
        if self._is_v1 and bits == 3:
            zero = (zero + np.uint8(1)) & np.uint8(7)
        return zero.astype(np.float32) - np.float32(128 if bits == 8 else 8)


__all__ = ["Gptq"]
