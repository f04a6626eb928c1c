"""What a sampled token tells: the text that it adds, or that its request ends with it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .answers import FinishReason
from .request import Request

__all__ = ["NOTHING_ALLOWED", "Ending", "tell", "whole_text"]

# Why a request ends that was sampled no token.
NOTHING_ALLOWED = (
    "no token is allowed at this position: allowed_token_ids, bad_words, no_repeat_ngram_size and "
    "min_tokens together forbid the whole vocabulary"
)


class Ending(NamedTuple):
    """A request's last token: the text before its end, and why it ends.

    silent: it is a stop token, which shows in the text no more than a stop string does. stop: the
    stop string, or the stop token of the caller's.
    """

    delta: str
    reason: FinishReason
    stop: str | int | None = None
    silent: bool = False
    error: str | None = None


def tell(request: Request, token: int) -> Ending | str:
    """What the token sampled last, which is in its place, adds to the text, or that it is the end.

    Of a quiet request no text is made before its end.
    """
    params = request.params
    text = None if request.quiet else request.text
    num_output = request.num_computed + 1 - request.num_prompt_tokens
    delta = ""
    stop: str | int | None = None
    reason: FinishReason | None = None
    silent = False
    try:
        if token in request.stop_ids and num_output >= params.min_tokens:
            reason = FinishReason.STOP
            if params.ignore_eos or token not in request.eos_token_ids:
                stop = token
            silent = not params.include_stop_str_in_output
        elif request.form.take(token):
            reason = FinishReason.LENGTH if request.form.cut else FinishReason.STOP
        elif num_output >= request.max_tokens:
            reason = FinishReason.LENGTH
        if text is not None:
            if not silent:
                delta = text.push(token)
            if reason is not None:
                delta += text.finish()
            if text.matched is not None:
                reason, stop = FinishReason.STOP, text.matched
    except Exception as problem:  # one request's text must not end the step of all
        error = f"token {token} could not be made text: {type(problem).__name__}: {problem}"
        return Ending(delta, FinishReason.ERROR, stop, silent, error)
    return delta if reason is None else Ending(delta, reason, stop, silent)


def whole_text(request: Request, token_ids: Sequence[int], reason: FinishReason) -> str:
    """The text of a quiet request, made at its end; what is cut short is not finished."""
    if request.text is None:
        return ""
    text = request.text.extend(token_ids)
    by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
    return text + request.text.finish() if by_itself else text
