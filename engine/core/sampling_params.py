"""SamplingParams: what a user may ask of one request's tokens, every number with its bounds."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .parameter import ParameterError
from .parameter import show as _show
from .structured import StructuredOutput

__all__ = ["MIN_TEMPERATURE", "TOKEN_ID_TEXT", "SamplingParams", "check_choice"]

_MAX_TOKENS = 1 << 24  # longer than any context; keeps every derived number an int32
_MAX_ID = (1 << 31) - 1
TOKEN_ID_TEXT = r"0|[1-9][0-9]{0,9}"  # JSON has no other way to write a key than as text
_NOT_STRUCTURED = ("min_tokens", "allowed_token_ids", "bad_words", "no_repeat_ngram_size")
MIN_TEMPERATURE = 1e-5  # below it logits / temperature overflows fp32 long before it helps


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end. Names and defaults are vLLM's.

    Frozen; lists become tuples. Errors: ParameterError naming the field, its value and the range.
    """

    n: int = 1
    best_of: int | None = None  # samples drawn, of which the n most likely are returned
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off; 0 keeps the most likely token alone
    top_k: int = 0  # 0 and -1 = off
    min_p: float = 0.0  # 0 = off
    typical_p: float = 1.0  # 1 = off
    top_n_sigma: float = 0.0  # 0 = off
    xtc_probability: float = 0.0  # 0 = off
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0  # 1 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0  # 0 = off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0  # tokens looked back at; 0 = the whole context
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    no_repeat_ngram_size: int = 0  # 0 = off
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None  # None: drawn at the door and returned with the result
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16  # None: up to the end of the context
    truncate_prompt_tokens: int | None = None  # keep this many of the prompt's last tokens
    logprobs: int | None = None  # 0 = of the chosen token only
    prompt_logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True
    keep_special_tokens: tuple[str, ...] = ()  # shown all the same
    structured: StructuredOutput | None = None  # the form that the output must have
    logits_processor: Callable[..., Any] | None = None  # library face only; not replayable

    # Inclusive ranges. Every numeric field has one; docs and tests read them from here.
    BOUNDS: ClassVar[dict[str, tuple[float, float]]] = {
        "n": (1, 128),
        "best_of": (1, 128),
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "top_k": (-1, _MAX_ID),
        "min_p": (0.0, 1.0),
        "typical_p": (0.0, 1.0),
        "top_n_sigma": (0.0, 1000.0),
        "xtc_probability": (0.0, 1.0),
        "xtc_threshold": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
        "dry_multiplier": (0.0, 100.0),
        "dry_base": (1.0, 100.0),
        "dry_allowed_length": (1, _MAX_TOKENS),
        "dry_range": (0, _MAX_TOKENS),
        "no_repeat_ngram_size": (0, _MAX_TOKENS),
        "seed": (0, 2**64 - 1),
        "min_tokens": (0, _MAX_TOKENS),
        "max_tokens": (0, _MAX_TOKENS),
        "truncate_prompt_tokens": (1, _MAX_TOKENS),
        "logprobs": (0, 20),
        "prompt_logprobs": (0, 20),
        # the values inside a collection
        "logit_bias": (-100.0, 100.0),
        "allowed_token_ids": (0, _MAX_ID),
        "stop_token_ids": (0, _MAX_ID),
    }
    # Collections: how many entries, and for strings how many characters each.
    LIMITS: ClassVar[dict[str, tuple[int, int | None]]] = {
        "stop": (64, 256),
        "bad_words": (1024, 256),
        "keep_special_tokens": (80, 256),
        "dry_sequence_breakers": (64, 64),
        "stop_token_ids": (1024, None),
        "allowed_token_ids": (1 << 20, None),
        "logit_bias": (1 << 16, None),
    }

    def __post_init__(self) -> None:
        for name, kind, optional in _PLAN:
            value = getattr(self, name)
            if value is None:
                if not optional:
                    raise ParameterError(name, f"{name} must not be None; leave it out instead")
                continue
            object.__setattr__(self, name, _CHECKS[kind](name, value))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_together()

    def _check_together(self) -> None:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ParameterError(
                "temperature",
                f"temperature={self.temperature!r} is between 0 and {MIN_TEMPERATURE}; "
                "use 0 for greedy choice",
            )
        if self.allowed_token_ids == ():
            raise ParameterError("allowed_token_ids", "allowed_token_ids=[] allows no token at all")
        if self.best_of is not None and self.best_of < self.n:
            raise ParameterError(
                "best_of", f"best_of={self.best_of} is below n={self.n}: cannot return more"
            )
        if self.num_samples > 1 and self.temperature == 0:
            name = "n" if self.n > 1 else "best_of"
            raise ParameterError(
                name,
                f"{name}={self.num_samples} with temperature=0 would give identical outputs; "
                f"use {name}=1 or a temperature above 0",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens", f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}"
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ParameterError(
                "max_tokens",
                "max_tokens=0 asks for nothing; it needs echo=True or prompt_logprobs",
            )

        if self.structured is not None:
            for name in _NOT_STRUCTURED:
                if getattr(self, name):
                    raise ParameterError(
                        name,
                        f"{name} cannot be combined with structured: together they could allow no "
                        "token at all, or no end; say what is wanted in the form itself",
                    )

    @property
    def num_samples(self) -> int:
        """How many sequences are generated: best_of, or n."""
        return self.best_of or self.n

    @property
    def reads_output(self) -> bool:
        """Whether choosing a token takes the tokens before it, or how many there are."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.dry_multiplier
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.min_tokens
            or self.structured
            or self.logits_processor
        )

    @property
    def replayable(self) -> bool:
        """Whether these parameters with a seed tell the output; a Python callback hides it."""
        return self.logits_processor is None

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values. Errors: ParameterError; an unknown name gets its nearest."""
        if not isinstance(options, Mapping):
            raise ParameterError(
                "sampling_params", f"sampling parameters must be a mapping, not {_show(options)}"
            )
        for name in options:
            check_choice("sampling parameter", name, _FIELDS)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the default, as plain values: from_dict() reads it back."""
        changed = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                changed[f.name] = _plain(value)
        return changed

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked anew. Errors: ParameterError."""
        for name in changes:
            check_choice("sampling parameter", name, _FIELDS)
        return dataclasses.replace(self, **changes)


def check_choice(what: str, name: object, known: Iterable[str]) -> None:
    """Refuse a name that is not among `known`, naming the nearest one and then all of them."""
    names = sorted(known)
    if isinstance(name, str) and name in names:
        return
    near = difflib.get_close_matches(name[:64], names, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ParameterError(
        str(name)[:64], f"unknown {what} {_show(name)}{hint} (known: {', '.join(names)})"
    )


# ------------------------------------------------------------------------------------- checks


def _range_text(name: str) -> str:
    low, high = SamplingParams.BOUNDS[name]
    return f"{low}..{high}"


def _int(name: str, value: object) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = operator.index(value)
        low, high = SamplingParams.BOUNDS[name]
        if low <= number <= high:
            return number
    raise ParameterError(name, f"{name}={_show(value)} must be an integer in {_range_text(name)}")


def _float(name: str, value: object) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        low, high = SamplingParams.BOUNDS[name]
        # Compared before float(): an int beyond float's range is out of bounds, not an overflow.
        # NaN and the infinities compare as out of bounds too.
        if low <= value <= high:  # type: ignore[operator]
            return float(value)
    raise ParameterError(name, f"{name}={_show(value)} must be a number in {_range_text(name)}")


def _bool(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ParameterError(name, f"{name}={_show(value)} must be True or False")


def _entries(name: str, value: object) -> Sequence[Any]:
    limit, _ = SamplingParams.LIMITS[name]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise ParameterError(name, f"{name}={_show(value)} must be a list")
    if len(value) > limit:
        raise ParameterError(name, f"{name} has {len(value)} entries; at most {limit} are allowed")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    entries = _entries(name, [value] if isinstance(value, str) else value)
    _, length = SamplingParams.LIMITS[name]
    for text in entries:
        if not isinstance(text, str):
            raise ParameterError(name, f"{name} must hold strings, not {_show(text)}")
        if not text:
            raise ParameterError(name, f"{name} must not hold an empty string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ParameterError(
                name, f"{name} holds {_show(text)}, which has a lone surrogate and is no text"
            ) from None
        if length is not None and len(text) > length:
            raise ParameterError(
                name, f"{name} has a string of {len(text)} characters; at most {length} are allowed"
            )
    return tuple(entries)


def _ids(name: str, value: object) -> tuple[int, ...]:
    return tuple(_int(name, entry) for entry in _entries(name, value))


def _bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ParameterError(
            name, f"{name}={_show(value)} must map token ids to numbers in {_range_text(name)}"
        )
    limit, _ = SamplingParams.LIMITS[name]
    if len(value) > limit:
        raise ParameterError(name, f"{name} has {len(value)} entries; at most {limit} are allowed")
    checked: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and re.fullmatch(TOKEN_ID_TEXT, key) else key
        if (
            isinstance(token, bool)
            or not isinstance(token, numbers.Integral)
            or not 0 <= operator.index(token) <= _MAX_ID
        ):
            raise ParameterError(
                name, f"{name} has the key {_show(key)}; keys are token ids in 0..{_MAX_ID}"
            )
        if operator.index(token) in checked:
            raise ParameterError(name, f"{name} names token {token} twice")
        checked[operator.index(token)] = _float(name, bias)
    return checked


def _structured(name: str, value: object) -> StructuredOutput:
    if isinstance(value, Mapping):  # as to_dict() writes it
        return StructuredOutput.from_dict(value)
    if isinstance(value, StructuredOutput):
        return value
    raise ParameterError(name, f"{name}={_show(value)} must be a StructuredOutput")


def _plain(value: object) -> object:
    if isinstance(value, StructuredOutput):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _callable(name: str, value: object) -> object:
    if callable(value):
        return value
    raise ParameterError(name, f"{name}={_show(value)} must be callable")


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "tuple[str, ...]": _strings,
    "tuple[int, ...]": _ids,
    "Mapping[int, float]": _bias,
    "StructuredOutput": _structured,
    "Callable[..., Any]": _callable,
}
# (field, kind, may be None), read off the annotations so that no field can go unchecked.
_PLAN = tuple(
    (f.name, str(f.type).removesuffix(" | None"), str(f.type).endswith(" | None"))
    for f in dataclasses.fields(SamplingParams)
)
_FIELDS = tuple(name for name, _, _ in _PLAN)
