"""Command-line flags made from the dataclasses they fill, so that no option can be forgotten."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import ConfigError, EngineConfig
from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from ..core.structured import StructuredOutput
from ..serve.settings import ServeConfig

# One sentence per field; the documentation's tables are made from the same. A test holds the keys
# equal to the fields.
SAMPLING_HELP = {
    "n": "samples returned per prompt; above 1 it needs a temperature above 0",
    "best_of": "samples drawn, of which the n of highest mean logprob are returned",
    "temperature": "divides the logits; 0 is greedy choice",
    "top_p": "keep the most likely tokens that together reach this probability; 1 is off",
    "top_k": "keep this many of the most likely tokens; 0 is off",
    "min_p": "drop tokens less likely than this share of the most likely one; 0 is off",
    "typical_p": "keep tokens of typical surprise up to this probability; 1 is off",
    "top_n_sigma": "keep logits within this many standard deviations of the highest; 0 is off",
    "xtc_probability": "chance of dropping all but the least likely of the tokens above "
    "xtc_threshold; 0 is off",
    "xtc_threshold": "probability from which XTC counts a token as a top choice",
    "repetition_penalty": "divides (or multiplies, where negative) logits of tokens seen; 1 is off",
    "presence_penalty": "subtracted from the logit of each token that the output already holds",
    "frequency_penalty": "subtracted once per occurrence in the output",
    "dry_multiplier": "strength of the penalty on continuing a repeated sequence; 0 is off",
    "dry_base": "how fast the DRY penalty grows with the repeated length",
    "dry_allowed_length": "repeats up to this many tokens go unpunished by DRY",
    "dry_range": "tokens that DRY looks back at; 0 is the whole context",
    "dry_sequence_breakers": "texts across which DRY matches no repeat",
    "no_repeat_ngram_size": "never repeat a sequence of this many tokens; 0 is off",
    "logit_bias": "token id and what is added to its logit",
    "bad_words": "texts that must not be generated",
    "allowed_token_ids": "only these token ids may be generated",
    "seed": "makes the output reproducible; without one a random seed is drawn and reported",
    "stop": "end the output before this text",
    "stop_token_ids": "end the output at these token ids",
    "include_stop_str_in_output": "keep the stop text in the output",
    "ignore_eos": "go on past the model's end-of-text tokens",
    "min_tokens": "no end before this many tokens",
    "max_tokens": "end after this many tokens; None is up to the end of the context",
    "truncate_prompt_tokens": "keep only this many of the prompt's last tokens",
    "logprobs": "report the logprob of each token and of this many alternatives",
    "prompt_logprobs": "the same for the prompt's tokens",
    "echo": "the output begins with the prompt",
    "skip_special_tokens": "leave special tokens out of the text",
    "keep_special_tokens": "special tokens that show in the text all the same",
    "structured": "the form of the output: a JSON schema, any JSON object, a regular expression, a "
    "Lark grammar, or one of several texts (docs/structured-output.md)",
    "logits_processor": "a Python callable (token ids, logits) -> logits; library only, and the "
    "request is then not replayable from its seed",
}

ENGINE_HELP = {
    "device": "auto (the CPU in this version), cpu (native kernels), cuda (Triton "
    "kernels), or reference (readable torch, slow)",
    "dtype": "of the computation: auto (the checkpoint's own), float32, bfloat16 or float16",
    "quantization": "int8, int4, fp8, nf4 or bitsandbytes: quantise the weights on load, see "
    "docs/quantisation.md; None keeps the checkpoint's own bits",
    "save": "with quantization: keep the quantised weights in this folder, which later starts (and "
    "this one) load instead; it is a model folder of its own",
    "activations": "what multiplies quantised weights: auto (int8 on the CPU), int8 (groups of 32; "
    "on the GPU one scale per token), fp8 (GPU), or float32, the activations themselves",
    "kv_cache_dtype": "of the KV cache: auto (the backend's choice), float32, bfloat16, float16, "
    "int8 or fp8 (one fp32 scale per token and kv head, about half of bfloat16's bytes; int8 is "
    "the more accurate), int4 (a scale and an offset per 32 values, 5 "
    "bits a value), or k8v4 (keys of int8, values of int4)",
    "max_model_len": "context length in tokens; None is the model's own, or what fits",
    "max_num_seqs": "requests that run at once",
    "max_num_batched_tokens": "tokens of one step, over all its requests",
    "block_size": "tokens per block of the KV cache",
    "num_blocks": "blocks of the KV cache; None is what the memory budget allows",
    "memory_budget": 'memory for weights, cache and workspace, such as "4GiB"; None is 80% of what '
    "is available",
    "enable_prefix_caching": "share the KV cache of equal prompt beginnings",
    "max_waiting": "requests that may wait; one more is refused",
    "threads": "CPU threads; None is the number of cores this process may use",
    "packed_cache": "keep the packed weights in the cache folder, as large as the model: the next "
    "start maps them instead of packing again",
    "chat_template": "a file with a Jinja chat template in place of the checkpoint's own",
    "step_log": "a file that gets one JSON line per engine step",
    "energy_meter": "what counts energy: auto (RAPL where it can be read, with NVML on a GPU, else "
    "the model), rapl, nvml, or model (busy core-seconds x watts_per_core); see docs/efficiency.md",
    "watts_per_core": "of the model: what a busy core draws, its part of memory and fans included",
    "price_per_kwh": "price of a kilowatt-hour, in the currency that costs are to be told in",
    "price_per_hour": "price of an hour of this machine; requests pay for the time it computes",
    "grams_per_kwh": "carbon intensity of the grid, grams of CO2 equivalent per kilowatt-hour",
    "tensor_parallel_size": "only 1: several devices are not supported yet",
    "trust_remote_code": "only False: code from a checkpoint is never run",
}

# The commands answer the same way each time they are asked, unless told otherwise.
CHAT_DEFAULTS = SamplingParams(temperature=0.0, max_tokens=512)
COMPLETE_DEFAULTS = SamplingParams(temperature=0.0, max_tokens=256)

_LIBRARY_ONLY = ("logits_processor",)
# The forms of `structured`, a flag each: what it takes, and whether that is a file's text.
_FORMS = {
    "json_schema": ("FILE", True, "the output is JSON that the schema in this file describes"),
    "regex": ("TEXT", False, "the whole output matches this regular expression"),
    "grammar": ("FILE", True, "the output follows the Lark grammar in this file"),
    "choice": ("TEXT", False, "the output is this text, or that of another --choice"),
}
# Fields whose only legal value is their default: flags for them would promise what is not there.
_NO_FLAG = ("model", "tensor_parallel_size", "trust_remote_code")


def count(text: str) -> int:
    """An integer, also as 8k (8000), 8K or 8Ki (8192), 1m, 1M.  For argparse."""
    scales = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20, "Ki": 2**10, "Mi": 2**20}
    digits = text.rstrip("kmKMi")
    unit = text[len(digits) :]
    try:
        if not unit:
            return int(text)
        value = float(digits) * scales[unit]
        if value == int(value):
            return int(value)
    except (ValueError, KeyError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (such as 4096, 4k or 4K)")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not token ids such as 13,198") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), _number(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER such as 198=-5") from None


def _flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], text: str, default: Any
) -> None:
    """One argument for one field. An argument that is not given leaves no attribute behind."""
    kind = str(field.type).removesuffix(" | None")
    name = "--" + field.name.replace("_", "-")
    note = "" if default is None else f" (default: {_plain(default)})"
    options: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": (text + note).replace("%", "%%"),
    }
    if kind == "bool":
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
    elif kind == "int":
        group.add_argument(name, type=count, metavar="N", **options)
    elif kind == "float":
        group.add_argument(name, type=_number, metavar="X", **options)
    elif kind == "tuple[str, ...]":
        group.add_argument(name, action="append", metavar="TEXT", **options)
    elif kind == "tuple[int, ...]":
        group.add_argument(name, type=_ids, action="extend", metavar="ID,ID", **options)
    elif kind == "Mapping[int, float]":
        group.add_argument(name, type=_bias, action="append", metavar="ID=X", **options)
    else:
        group.add_argument(name, metavar="VALUE", **options)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(repr(v) for v in value) or "none"
    return str(value)


def add_sampling_flags(parser: argparse.ArgumentParser, defaults: SamplingParams) -> None:
    """A flag for every field of SamplingParams but the Python callable."""
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(SamplingParams):
        if field.name == "structured":
            _form_flags(group)
        elif field.name not in _LIBRARY_ONLY:
            _flag(group, field, SAMPLING_HELP[field.name], getattr(defaults, field.name))


def _form_flags(group: argparse._ArgumentGroup) -> None:
    for name, (takes, _, text) in _FORMS.items():
        flag = "--" + name.replace("_", "-")
        action = "append" if name == "choice" else "store"
        group.add_argument(
            flag, dest=name, metavar=takes, action=action, default=argparse.SUPPRESS, help=text
        )
    group.add_argument(
        "--json-object",
        action="store_true",
        default=argparse.SUPPRESS,
        help="the output is a JSON object",
    )


def _form(args: argparse.Namespace) -> dict[str, StructuredOutput]:
    """What the flags say of the output's form. Errors: ParameterError("structured")."""
    given = _given(args, [*_FORMS, "json_object"])
    for name, (_, is_file, _) in _FORMS.items():
        if is_file and name in given:
            try:
                given[name] = Path(given[name]).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                flag = name.replace("_", "-")
                raise ParameterError("structured", f"--{flag} {given[name]}: {error}") from error
    return {"structured": StructuredOutput.from_dict(given)} if given else {}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of EngineConfig that has more than one legal value."""
    group = parser.add_argument_group("engine")
    for field in dataclasses.fields(EngineConfig):
        if field.name not in _NO_FLAG:
            _flag(group, field, ENGINE_HELP[field.name], field.default)


SERVE_HELP = {
    "host": "address to listen on; anything but this machine's own needs API keys",
    "port": "port to listen on; 0 takes any free one",
    "served_model_name": "what clients call the model; None is the model's own name",
    "allowed_hosts": "a name that requests may call it by, besides localhost and addresses",
    "cors_origins": "an origin whose pages may call this server",
    "shared_prefix_cache": "share cached prompt beginnings across API keys",
    "tool_format": "how the model writes tool calls; auto reads it off the chat template, none "
    "reads no calls (docs/server.md has the names)",
    "reasoning_format": (
        "how the model writes its thoughts: auto, none, think, mistral, seed or harmony"
    ),
    "timeout_ms": "ends requests after so many milliseconds that name no timeout_ms of their own",
    "drain_timeout": "seconds that running requests get to finish in after a signal",
    "health_timeout": "seconds without progress after which /health fails",
    "otlp_endpoint": "address of an OTLP collector that gets each request's trace; needs the extra "
    "`otel`",
    "max_body_bytes": "longest body of a request",
    "max_header_bytes": "longest headers of a request",
    "data_dir": "folder that keeps files and batches; without one there are no /v1/files",
    "max_file_bytes": "longest file that may be uploaded",
    "max_storage_bytes": "what the files of one API key may take",
    "batch_requests": "requests in flight for all batches; 0 is as many as run at once",
}
_KEYS_VARIABLE = "ENGINEROOM_API_KEYS"


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of ServeConfig but the keys: `ps` shows arguments to everybody."""
    group = parser.add_argument_group("server")
    for field in dataclasses.fields(ServeConfig):
        if field.name in SERVE_HELP:
            _flag(group, field, SERVE_HELP[field.name], field.default)
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"API keys, one a line; without it {_KEYS_VARIABLE} is read, separated by commas",
    )


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The parsed flags as a ServeConfig. Errors: ConfigError."""
    given = _given(args, SERVE_HELP)
    for name in ("allowed_hosts", "cors_origins"):
        if name in given:
            given[name] = tuple(given[name])
    return ServeConfig(**given, api_keys=_api_keys(args.api_key_file))


def _api_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return tuple(k for k in os.environ.get(_KEYS_VARIABLE, "").split(",") if k)
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_keys", f"--api-key-file {path}: {error}") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ConfigError("api_keys", f"--api-key-file {path}: it holds no key")
    return keys


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The parsed flags over `defaults`. Errors: ParameterError."""
    given = _given(args, (f.name for f in dataclasses.fields(SamplingParams))) | _form(args)
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if given.get("n", 1) > 1 or given.get("best_of", 1) > 1:
        given.setdefault("temperature", SamplingParams().temperature)  # greedy samples are one
    return defaults.replace(**given)


def engine_config(args: argparse.Namespace, model: str, **defaults: Any) -> EngineConfig:
    """The parsed flags over `defaults` as an EngineConfig. Errors: ConfigError."""
    names = (f.name for f in dataclasses.fields(EngineConfig) if f.name != "model")
    return EngineConfig.from_options(model, {**defaults, **_given(args, names)})


def changed_options(config: EngineConfig) -> dict[str, Any]:
    """The options, of those that have a flag, that are not at their default."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NO_FLAG and getattr(config, field.name) != field.default
    }


def engine_arguments(config: EngineConfig) -> list[str]:
    """Flags from which `engine_config` makes the same options again."""
    arguments = []
    for name, value in changed_options(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


__all__ = [
    "CHAT_DEFAULTS",
    "COMPLETE_DEFAULTS",
    "ENGINE_HELP",
    "SAMPLING_HELP",
    "SERVE_HELP",
    "add_engine_flags",
    "add_sampling_flags",
    "add_serve_flags",
    "changed_options",
    "count",
    "engine_arguments",
    "engine_config",
    "sampling_params",
    "serve_config",
]
