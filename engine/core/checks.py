"""What a request is refused with at the door, and what it is refused for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .parameter import ParameterError
from .sampling_params import SamplingParams

MAX_VOCAB_SIZE = 1 << 31  # ids are int32 wherever they are packed
MAX_ID_LENGTH = 256
_MAX_SALT = 256
MAX_PRIORITY = (1 << 31) - 1
_WEIGHTS = (0.01, 100.0)


class AdmissionError(ValueError):
    """A request refused at the door. `.code` is one of CODES."""

    CODES = (
        "context_length",
        "never_fits",
        "queue_full",
        "prompt_empty",
        "token_id",
        "duplicate_id",
    )

    def __init__(self, code: str, message: str) -> None:
        if code not in self.CODES:
            raise ValueError(f"unknown admission code {code!r} (known: {', '.join(self.CODES)})")
        super().__init__(message)
        self.code = code


def as_prompt(prompt: object) -> str | list[Any]:
    """Text as it is, or token ids as a list; what the ids are is for check_token_ids().

    Errors: ParameterError("prompt") for anything else.
    """
    to_list = getattr(prompt, "tolist", None)  # numpy arrays and tensors
    listed = prompt if to_list is None else to_list()
    if isinstance(listed, str):
        return listed
    if isinstance(listed, bytes | bytearray | memoryview) or not isinstance(listed, Sequence):
        raise ParameterError(
            "prompt", f"a prompt is text or a list of token ids, not {type(prompt).__name__}"
        )
    return list(listed)


def check_params(params: object) -> None:
    """Errors: ParameterError for what is no SamplingParams."""
    if not isinstance(params, SamplingParams):
        raise ParameterError(
            "params", f"params must be SamplingParams, not {type(params).__name__}"
        )


def check_token_ids(
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    vocab_size: int = MAX_VOCAB_SIZE,
    *,
    bad_word_ids: Sequence[Sequence[int]] = (),
) -> None:
    """The one place where token ids meet the vocabulary: every id must be in 0..vocab_size - 1.

    Without the vocabulary at hand: that they are ids at all.
    Errors: AdmissionError("token_id") for the prompt, ParameterError for a parameter's ids.
    """
    of_this_model = "" if vocab_size == MAX_VOCAB_SIZE else " of this model"
    bad = _first_bad(prompt_token_ids, vocab_size)
    if bad is not None:
        raise AdmissionError(
            "token_id",
            f"prompt token {bad} is {_cut(prompt_token_ids[bad])}; token ids{of_this_model} are "
            f"integers in 0..{vocab_size - 1}",
        )
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", tuple(params.logit_bias or ())),
        ("bad_words", tuple(token for word in bad_word_ids for token in word)),
    ):
        bad = _first_bad(ids, vocab_size)
        if bad is not None:
            raise ParameterError(
                name,
                f"{name} names token {_cut(ids[bad])}; token ids{of_this_model} are 0.."
                f"{vocab_size - 1}",
            )


def _first_bad(ids: Sequence[int], vocab_size: int) -> int | None:
    """Index of the first entry that is no token id; None where all are."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return None
    return next(
        (i for i, t in enumerate(ids) if type(t) is not int or not 0 <= t < vocab_size), None
    )


def _cut(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:80]


def check_weight(weight: float) -> None:
    """Errors: ParameterError for a share of the engine that none can have."""
    if not isinstance(weight, (int, float)) or not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        low, high = _WEIGHTS
        raise ParameterError("weight", f"weight must be in {low:g}..{high:g}, not {_cut(weight)}")


def check_identity(request_id: str, priority: int, cache_salt: bytes, arrival: float = 0.0) -> None:
    """What comes with a request beside its prompt and parameters. Errors: ParameterError."""
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_LENGTH:
        raise ParameterError(
            "request_id",
            f"request_id must be a string of 1..{MAX_ID_LENGTH} characters, not {_cut(request_id)}",
        )
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise ParameterError(
            "priority",
            f"priority must be an integer in {-MAX_PRIORITY}..{MAX_PRIORITY}, not {_cut(priority)}",
        )
    if (
        isinstance(arrival, bool)
        or not isinstance(arrival, (int, float))
        or not math.isfinite(arrival)
    ):
        raise ParameterError("arrival", f"arrival must be finite seconds, not {_cut(arrival)}")
    if not isinstance(cache_salt, bytes) or len(cache_salt) > _MAX_SALT:
        raise ParameterError(
            "cache_salt", f"cache_salt must be at most {_MAX_SALT} bytes, not {_cut(cache_salt)}"
        )
