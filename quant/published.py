"""Which method a checkpoint was quantised with, as its configuration says; never guessed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from .awq import Awq
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .fp4 import ModelOpt, Mxfp4
from .fp8 import Fp8
from .gptq import Gptq
from .own import METHOD, Own
from .parts import FormatError, Options, Part, Reader

QUANTISATION_KEYS = ("quantization_config", "compression_config")  # of config.json
MODELOPT_FILE = "hf_quant_config.json"  # beside a config.json that has none of them
METHODS: Mapping[str, Callable[[Mapping[str, Any]], Reader]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "fp8": Fp8,
    "mxfp4": Mxfp4,
    "modelopt": ModelOpt,
    METHOD: Own,
}


def reader_of(config: Mapping[str, Any]) -> Reader | None:
    """The reader of a config.json's quantised weights; None where it names none.

    Errors: FormatError for a method or an option that is not supported.
    """
    given = {key: config[key] for key in QUANTISATION_KEYS if config.get(key) is not None}
    if not given:
        return None
    key, settings = next(iter(given.items()))
    if len(given) > 1 or not isinstance(settings, dict):
        raise FormatError(key, f"config.json: one object is expected of {' and '.join(given)}")
    method = Options(settings, key).one_of("quant_method", METHODS)
    return METHODS[method](settings)


def reader_of_modelopt(config: Mapping[str, Any]) -> Reader:
    """The reader of a folder whose MODELOPT_FILE alone says how it was quantised.

    Errors: FormatError for another writer, or an algorithm or an option that is not supported.
    """
    given, producer = config.get("quantization"), config.get("producer")
    if not isinstance(given, dict) or not isinstance(producer, dict):
        raise FormatError(
            "quantization", f"{MODELOPT_FILE}: objects are expected of producer and quantization"
        )
    Options(producer, "producer", MODELOPT_FILE).one_of("name", ("modelopt",))
    return ModelOpt(given, "quantization", MODELOPT_FILE)


def find_weights(reader: Reader, names: Collection[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Each quantised weight's module and tensors (what they are -> name) among `names`.

    Errors: FormatError for one that lacks a tensor, naming it.
    """
    have = frozenset(names)
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for layout in reader.layouts:
        mark = layout.suffixes[layout.mark]
        for name in sorted(have):
            module = name.removesuffix(mark)
            weight = module + layout.weight
            if module == name or weight in found:
                continue
            parts = {role: module + suffix for role, suffix in layout.suffixes.items()}
            missing = [
                part
                for role, part in parts.items()
                if part not in have and role not in layout.optional
            ]
            if missing:
                raise FormatError(
                    missing[0],
                    f"tensor {missing[0]!r} is missing: with {name!r} it makes {weight!r}",
                )
            found[weight] = module, {r: p for r, p in parts.items() if p in have}
    return found


__all__ = [
    "METHODS",
    "MODELOPT_FILE",
    "QUANTISATION_KEYS",
    "FormatError",
    "Part",
    "Reader",
    "find_weights",
    "reader_of",
    "reader_of_modelopt",
]
