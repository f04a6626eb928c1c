"""compressed-tensors checkpoints (llm-compressor): integers or floats, a scheme per set of modules.

`pack-quantized`: `weight_packed` int32 [N, K bits / 32], a stream of q + 2^(bits - 1) along each
row; `weight_scale` [N, G]; of asymmetric ones `weight_zero_point` int32 [N bits / 32, G], packed
down each column in the same way; `weight_g_idx` int32 [K] with act-order. `int-quantized`: `weight`
int8 [N, K], `weight_scale` [N, G] (or one number), `weight_zero_point` int8 alike.
`float-quantized`: `weight` F8_E4M3. value = scale (q - zero). `mxfp4-pack-quantized` and
`nvfp4-pack-quantized`: quant/fp4.py. Activations are not rounded as the scheme says but as
`activations=` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.weights import I8G32, INT8, Format, RawWeight
from .fp4 import mxfp4_weight, nvfp4_weight
from .fp8 import INPUT_SCALES, block_of, fp8_weight
from .groups import (
    even_groups,
    int4_format,
    int4_rows,
    int8_channel_rows,
    int8_rows,
    pack_nibbles,
    sorted_groups,
    unpack_nibbles,
)
from .parts import (
    FormatError,
    Layout,
    Options,
    Part,
    group_count,
    group_size_of,
    require_columns,
    unpack_bits,
)

_WHERE = "quantization_config"
_FOURS = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", *_FOURS)
_IGNORED = ("global_compression_ratio", "ignore", "kv_cache_scheme", "version")
_CLASS = "Linear"


@dataclass(frozen=True)
class _Scheme:
    """How one group of modules is quantised."""

    format: str
    targets: tuple[str, ...]
    bits: int
    group_size: int  # -1: a scale a row
    symmetric: bool
    block: tuple[int, int] | None
    activations: str  # in words, "" for 16 bits

    def is_for(self, module: str) -> int:
        """How exactly a target names the module: 3 by name, 2 by pattern, 1 by class, 0 not."""
        return max(
            3 * (target == module)
            or 2 * (target[:3] == "re:" and re.match(target[3:], module) is not None)
            or (target == _CLASS)
            for target in self.targets
        )


class CompressedTensors:
    """quant_method "compressed-tensors". Errors: FormatError for what is not supported."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = Options(config, _WHERE)
        options.take("quant_method")
        options.one_of("quantization_status", ("compressed", "frozen"), "compressed")
        form = options.take("format")
        groups = options.take("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise FormatError(f"{_WHERE}.config_groups", f"{_WHERE}.config_groups has no scheme")
        sparsity = Options(options.take("sparsity_config", {}), f"{_WHERE}.sparsity_config")
        sparsity.one_of("format", ("dense",), "dense")
        options.finish(_IGNORED)
        self._schemes = [_scheme(groups[name], form, name) for name in groups]
        optional = ("zero", "index", "shape", "whole")
        self.layouts = (
            Layout(
                "packed",
                {
                    "packed": ".weight_packed",
                    "scale": ".weight_scale",
                    "zero": ".weight_zero_point",
                    "index": ".weight_g_idx",
                    "shape": ".weight_shape",
                    "whole": ".weight_global_scale",
                },
                optional,
            ),
            Layout(
                "scale",
                {
                    "scale": ".weight_scale",
                    "weight": ".weight",
                    "zero": ".weight_zero_point",
                    "index": ".weight_g_idx",
                },
                optional,
            ),
        )
        said = sorted({s.activations for s in self._schemes if s.activations})
        self.notes = tuple(
            f"the checkpoint's {words} activations are not made here: activations= decides"
            for words in said
        )
        if config.get("kv_cache_scheme"):
            self.notes += ("its kv_cache_scheme is not used: kv_cache_dtype= decides",)

    def weight(self, module: str, parts: Mapping[str, Part]) -> RawWeight:
        ranks = [scheme.is_for(module) for scheme in self._schemes]
        if not max(ranks):
            targets = sorted({t for s in self._schemes for t in s.targets})
            raise FormatError(
                module,
                f"{module} is quantised, but no group of {_WHERE}.config_groups has it among its "
                f"targets ({', '.join(targets)[:200]})",
            )
        scheme = self._schemes[ranks.index(max(ranks))]
        if scheme.format == "float-quantized":
            parts["weight"].require_dtype("F8_E4M3")
            return fp8_weight(module, parts["weight"], parts["scale"], scheme.block)
        if scheme.format in _FOURS:
            return _four_bit_floats(module, parts, scheme)
        return _integers(module, parts, scheme)

    def is_spare(self, part: Part) -> bool:
        return INPUT_SCALES.fullmatch(part.name) is not None


def _scheme(group: Any, form: Any, name: str) -> _Scheme:
    where = f"{_WHERE}.config_groups.{name}"
    if not isinstance(group, dict):
        raise FormatError(where, f"config.json: {where} is no object")
    options = Options(group, where)
    targets = options.take("targets", [])
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        raise FormatError(f"{where}.targets", f"config.json: {where}.targets names no modules")
    form = options.one_of("format", _FORMATS, form)
    weights = Options(options.take("weights", {}), f"{where}.weights")
    activations = options.take("input_activations", {})
    options.take("output_activations")
    options.finish()
    is_float = weights.one_of("type", ("int", "float"), "int") == "float"
    if is_float and form in _FOURS:
        return _scheme_of_fours(weights, form, tuple(targets), _in_words(activations))
    bits = weights.one_of("num_bits", (8,) if is_float else (4, 8), 8)
    strategies = ("tensor", "channel", "block") if is_float else ("tensor", "channel", "group")
    strategy = weights.one_of("strategy", strategies, "tensor")
    symmetric = weights.flag("symmetric", True)
    size = weights.take("group_size", -1)
    group_size = group_size_of(Options({"group_size": size}, weights.where))
    block = block_of(weights.take("block_structure"), f"{where}.weights.block_structure")
    weights.one_of("dynamic", (False,), False)
    weights.one_of("actorder", ("group", "static", "weight", "dynamic", False), False)
    weights.finish(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    fits = (form == "float-quantized") == is_float and (form != "int-quantized" or bits == 8)
    if not fits:
        raise FormatError(
            f"{where}.format",
            f"config.json: {where}: {form} does not hold {bits}-bit {strategy} "
            f"weights of type {'float' if is_float else 'int'}",
        )
    if (strategy == "group") != (group_size != -1) or (strategy == "block") != (block is not None):
        raise FormatError(
            f"{where}.weights.strategy",
            f"config.json: {where}.weights: strategy {strategy!r} does not go with group_size "
            f"{size!r} and block_structure {block!r}",
        )
    if is_float and not symmetric:
        raise weights.error("symmetric", False, (True,))
    return _Scheme(form, tuple(targets), bits, group_size, symmetric, block, _in_words(activations))


def _scheme_of_fours(
    weights: Options, form: str, targets: tuple[str, ...], activations: str
) -> _Scheme:
    """Of MXFP4 and NVFP4 the format says all but one thing."""
    is_mx = form == "mxfp4-pack-quantized"
    weights.one_of("num_bits", (4,))
    size = weights.one_of("group_size", (32 if is_mx else 16,))
    weights.one_of("strategy", ("group" if is_mx else "tensor_group",))
    weights.one_of("symmetric", (True,), True)
    weights.one_of("dynamic", (False,), False)
    weights.finish(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    return _Scheme(form, targets, 4, size, True, None, activations)


def _four_bit_floats(module: str, parts: Mapping[str, Part], scheme: _Scheme) -> RawWeight:
    name = f"{module}.weight"
    if "packed" not in parts:
        raise FormatError(
            f"{name}_packed",
            f"tensor '{name}_packed' is missing; {scheme.format} has its codes there",
        )
    if scheme.group_size == 32:
        return mxfp4_weight(name, parts["packed"], parts["scale"])
    if "whole" not in parts:
        whole = f"{name}_global_scale"
        raise FormatError(whole, f"tensor {whole!r} is missing: its scales are divided by it")
    return nvfp4_weight(name, parts["packed"], parts["scale"], parts["whole"], divides=True)


def _in_words(activations: Any) -> str:
    if not isinstance(activations, dict) or not activations:
        return ""
    kind = "FP" if activations.get("type") == "float" else "INT"
    when = "dynamic" if activations.get("dynamic") else "static"
    return f"{when} {kind}{activations.get('num_bits')}"


def _integers(module: str, parts: Mapping[str, Part], scheme: _Scheme) -> RawWeight:
    """value = scale (q - zero), q of 4 or 8 bits, in whatever groups."""
    packed, bits = parts.get("packed"), scheme.bits
    codes = packed or parts["weight"]
    codes.require_dtype("I8" if packed is None else "I32")
    if packed is None and bits != 8:
        raise FormatError(
            codes.name, f"tensor {codes.name!r}: int8 does not hold {bits}-bit groups"
        )
    codes.require_matrix()
    num_rows, columns = codes.shape[0], codes.shape[1] * (32 // bits if packed else 1)
    if packed is not None and "shape" in parts:
        stated = tuple(map(int, parts["shape"].array()))
        if stated != (num_rows, columns):
            raise FormatError(
                parts["shape"].name,
                f"tensor {parts['shape'].name!r} says {list(stated)}, {packed.name!r} holds "
                f"{[num_rows, columns]}",
            )
    require_columns(codes.name, columns, 32)
    num_groups = group_count(columns, scheme.group_size)
    scale = parts["scale"]
    if scale.shape not in ((), (1,), (1, 1)) or num_groups > 1:
        scale.require_shape(num_rows, num_groups)
    zero = _zero_part(module, parts, scheme, num_rows, num_groups)
    order, groups = None, even_groups(columns, scheme.group_size)
    if "index" in parts:
        parts["index"].require_dtype("I32")
        parts["index"].require_shape(columns)
        order, groups = sorted_groups(parts["index"].name, parts["index"].array(), num_groups)
        order = None if (order == np.arange(columns)).all() else order
    by_channel = bits == 8 and num_groups == 1 and zero is None
    fmt: Format = int4_format(groups) if bits == 4 else INT8 if by_channel else I8G32

    def made(start: int, stop: int) -> np.ndarray:
        scales = np.broadcast_to(scale.floats(), (num_rows, num_groups))[start:stop]
        zeros = np.zeros((), np.float32) if zero is None else _zeros(zero, bits, start, stop)
        zeros = np.broadcast_to(zeros, scales.shape)
        rows = codes.array()[start:stop].view(np.uint8)
        if bits == 4:
            if order is not None:
                rows = pack_nibbles(unpack_nibbles(rows)[:, order])
            return int4_rows(rows, scales, zeros, groups)
        quants = (rows if packed is None else rows ^ np.uint8(128)).view(np.int8)
        if order is not None:
            quants = quants[:, order]
        if by_channel:
            return int8_channel_rows(quants, scales[:, 0])
        return int8_rows(quants, scales, zeros, groups)

    return RawWeight(
        f"{module}.weight",
        fmt,
        (num_rows, columns),
        {},
        columns=order,
        make=made,
    )


def _zero_part(
    module: str, parts: Mapping[str, Part], scheme: _Scheme, num_rows: int, num_groups: int
) -> Part | None:
    """The zero points, where the scheme has any. Errors: FormatError where they are missing."""
    zero = parts.get("zero")
    if scheme.symmetric:
        return None
    if zero is None:
        name = f"{module}.weight_zero_point"
        raise FormatError(name, f"tensor {name!r} is missing; the weights are not symmetric")
    if zero.dtype == "I32":
        zero.require_shape(-(-num_rows * scheme.bits // 32), num_groups)
    else:
        zero.require_dtype("I8", "I32")
        if zero.shape not in ((), (1,), (1, 1)) or num_groups > 1:
            zero.require_shape(num_rows, num_groups)
    return zero


def _zeros(zero: Part, bits: int, start: int, stop: int) -> np.ndarray:
    """float32 [stop - start, G], or of one number."""
    if zero.dtype == "I8":
        values = zero.array().astype(np.float32)
        return values[start:stop] if values.size > 1 else values.reshape(())
    words = zero.array().view(np.uint32)
    short = -len(words) % bits
    words = np.concatenate([words, np.zeros((short, words.shape[1]), np.uint32)])
    return unpack_bits(words, bits)[start:stop].astype(np.float32) - np.float32(1 << (bits - 1))


__all__ = ["CompressedTensors"]
