"""A receipt: of one request, what it was computed from and what came out, as one line of JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.answers import CompletionOutput, RequestOutput
from ..core.sampling_params import SamplingParams
from .facts import differences

_FORMAT = 1
_ENDINGS = ("stop", "length")


class ReceiptError(ValueError):
    """What is no receipt, a damaged one, or a request that can have none; the message says why."""


@dataclass(frozen=True)
class Answer:
    """One sample. `logprobs` are of its tokens where they were asked for, a number that JSON cannot
    write as its name. `sha256` is of all that the caller was given: tokens, every logprob, and the
    text where it does not begin with the prompt."""

    token_ids: list[int]
    logprobs: list[float | str] | None
    finish_reason: str
    stop_reason: str | int | None
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """model: facts.all_facts() of the engine. params: those that are not at their default, with the
    seed that was used. prompt: SHA-256 of the prompt's logprobs, None where not asked for."""

    model: dict[str, Any]
    params: dict[str, Any]
    prompt_token_ids: list[int]
    prompt_logprobs: str | None
    answers: list[Answer]

    def as_plain(self) -> dict[str, Any]:
        """For JSON: with the format's number, and a SHA-256 of the rest."""
        body = {"receipt": _FORMAT, **dataclasses.asdict(self)}
        return {**body, "sha256": _digest(body)}

    def to_json(self) -> str:
        """One line, without the newline."""
        return json.dumps(self.as_plain(), separators=(",", ":"))

    @property
    def sampling_params(self) -> SamplingParams:
        """Errors: ParameterError."""
        return SamplingParams.from_dict(self.params)


def make(model: Mapping[str, Any], output: RequestOutput, params: SamplingParams) -> Receipt:
    """The receipt of a finished output that `params` were given with, by the engine of `model`.

    Errors: ReceiptError where the request did not end by itself, or cannot be repeated.
    """
    if not params.replayable:
        raise ReceiptError("a request with a logits_processor cannot be repeated: it is your code")
    reasons = {c.finish_reason for c in output.outputs}
    if not output.finished or not reasons <= {*_ENDINGS}:
        ended = ", ".join(sorted(str(r) for r in reasons)) if output.finished else "not yet"
        raise ReceiptError(
            f"{output.request_id} has no receipt: it ended by {ended}, and only what ended by "
            f"{' or '.join(_ENDINGS)} can be repeated"
        )
    seeded = params.replace(seed=output.outputs[0].seed)
    rows = output.prompt_logprobs
    return Receipt(
        model=_plain(model),
        params=_plain(seeded.to_dict()),
        prompt_token_ids=list(output.prompt_token_ids),
        prompt_logprobs=None if rows is None else _digest(_plain(rows)),
        answers=[_answer(c, echoes=params.echo) for c in output.outputs],
    )


def _answer(c: CompletionOutput, *, echoes: bool) -> Answer:
    logprobs = None
    if c.logprobs is not None:
        logprobs = [
            _number(row[token].logprob) for token, row in zip(c.token_ids, c.logprobs, strict=True)
        ]
    return Answer(
        token_ids=list(c.token_ids),
        logprobs=logprobs,
        finish_reason=c.finish_reason or "",
        stop_reason=c.stop_reason,
        # An echoed prompt may have been given as text that its tokens spell otherwise.
        sha256=_digest(_plain(dataclasses.replace(c, text="") if echoes else c)),
    )


def read(text: str | bytes) -> Receipt:
    """A receipt from JSON: its own, or the line of a batch's output or an answer that carries one.

    Errors: ReceiptError.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"not JSON: {error}") from error
    for key in ("response", "body", "receipt"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or "receipt" not in found:
        raise ReceiptError("there is no receipt in it")
    if found["receipt"] != _FORMAT:
        raise ReceiptError(f"its format is {found['receipt']!r}; this version reads {_FORMAT}")
    body = {name: value for name, value in found.items() if name != "sha256"}
    if _digest(body) != found.get("sha256"):
        raise ReceiptError("it was damaged or changed: its sha256 is not that of its content")
    del body["receipt"]
    try:
        answers = [Answer(**answer) for answer in body.pop("answers")]
        return Receipt(answers=answers, **body)
    except (TypeError, KeyError) as error:
        raise ReceiptError(f"its fields are not a receipt's: {error}") from error


def changes(old: Receipt, new: Receipt) -> list[str]:
    """What decides an answer and is not the same, by name; what a model is called does not."""
    one, two = ({**r.model, "name": None} for r in (old, new))
    return [
        *differences(one, two),
        *differences(old.params, new.params, "params"),
        *differences(old.prompt_token_ids, new.prompt_token_ids, "prompt_token_ids"),
    ]


def first_difference(old: Receipt, new: Receipt) -> str | None:
    """Where the answers part, in words; None where they are the same to the last bit."""
    if old.prompt_logprobs != new.prompt_logprobs:
        return "the prompt's logprobs differ"
    if len(old.answers) != len(new.answers):
        return f"{len(new.answers)} samples, not {len(old.answers)}"
    for number, (one, two) in enumerate(zip(old.answers, new.answers, strict=True)):
        of = f" of sample {number}" if len(old.answers) > 1 else ""
        pairs: tuple[tuple[str, Any, Any], ...] = (
            ("token", one.token_ids, two.token_ids),
            ("the logprob of token", one.logprobs, two.logprobs),
        )
        for what, before, now in pairs:
            at = _parting(before or [], now or [])
            if at is not None:
                return f"{what} {at}{of} is {_at(now, at)}, not {_at(before, at)}"
        if (one.finish_reason, one.stop_reason) != (two.finish_reason, two.stop_reason):
            return (
                f"it ended by {two.finish_reason} {two.stop_reason!r}, not by "
                f"{one.finish_reason} {one.stop_reason!r}{of}"
            )
        if one.sha256 != two.sha256:
            return f"the text or an alternative's logprob differs{of}"
    return None


def _parting(before: list[Any], now: list[Any]) -> int | None:
    for at, (one, two) in enumerate(zip(before, now, strict=False)):
        if one != two:
            return at
    return None if len(before) == len(now) else min(len(before), len(now))


def _at(values: list[Any] | None, index: int) -> str:
    return str(values[index]) if values and index < len(values) else "none"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that what was read and what was made compare."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


__all__ = ["Answer", "Receipt", "ReceiptError", "changes", "first_difference", "make", "read"]
