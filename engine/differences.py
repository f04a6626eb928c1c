"""A RequestOutput as the difference to the one sent before, and back: O(new tokens) a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .core.answers import CompletionOutput, RequestOutput
from .wire import Choice, Output, Prompt, WireError

PROMPT_ROWS = 4096  # prompt-logprob positions in one frame: 20 alternatives each stay below 5 MB


def difference(sent: RequestOutput | None, new: RequestOutput) -> Iterator[Output]:
    """The messages that turn `sent` (None: nothing yet) into `new`; the last has more=False.

    Text and tokens only grow, so that a step costs its new tokens; this is checked by lengths and
    the last known token, and once over the whole when a request finishes. What did not grow is
    sent whole.
    """
    rows = new.prompt_logprobs
    known = len(sent.prompt_logprobs or ()) if sent else 0
    while rows is not None and len(rows) - known > PROMPT_ROWS:
        known += PROMPT_ROWS
        outputs = sent.outputs if sent else ()
        partial = dataclasses.replace(
            new, outputs=outputs, deltas=(), finished=False, prompt_logprobs=rows[:known]
        )
        message = _difference(sent, partial, more=True)
        sent = apply(sent, message)
        yield message
    yield _difference(sent, new, more=False)


def _difference(sent: RequestOutput | None, new: RequestOutput, *, more: bool) -> Output:
    choices = []
    for position, completion in enumerate(new.outputs):
        old = sent.outputs[position] if sent and position < len(sent.outputs) else None
        delta = new.deltas[position] if position < len(new.deltas) else ""
        if old is None or delta or completion != old:
            choices.append(_choice(position, old, completion, delta, final=new.finished))
    rows = new.prompt_logprobs
    if rows is not None and sent is not None:
        rows = rows[len(sent.prompt_logprobs or ()) :]
    same_prompt = sent is not None and (
        (sent.prompt_token_ids is new.prompt_token_ids)  # else compared, O(prompt) but in C
        or (sent.prompt == new.prompt and sent.prompt_token_ids == new.prompt_token_ids)
    )
    return Output(
        request_id=new.request_id,
        num_choices=len(new.outputs),
        choices=tuple(choices),
        finished=new.finished,
        usage=new.usage,
        timings=new.timings,
        prompt=None if same_prompt else Prompt(text=new.prompt, token_ids=new.prompt_token_ids),
        prompt_logprobs=rows,
        more=more,
        cost=new.cost,
        embedding=new.embedding,
    )


def _choice(
    position: int,
    old: CompletionOutput | None,
    new: CompletionOutput,
    delta: str,
    *,
    final: bool,
) -> Choice:
    grown = old is None or _extends(old, new, wholly=final)
    base = old if grown and old is not None else _NOTHING
    text = new.text[len(base.text) :]
    return Choice(
        position=position,
        index=new.index,
        text=text,
        token_ids=new.token_ids[len(base.token_ids) :],
        logprobs=None if new.logprobs is None else new.logprobs[len(base.logprobs or ()) :],
        cumulative_logprob=new.cumulative_logprob,
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
        seed=new.seed,
        error=new.error,
        complete=new.complete,
        reset=not grown,
        delta=None if delta == text else delta,
    )


def _extends(old: CompletionOutput, new: CompletionOutput, *, wholly: bool) -> bool:
    """True where `new` is `old` and more; without `wholly`, by evidence of constant cost."""
    text, tokens, rows = len(old.text), len(old.token_ids), len(old.logprobs or ())
    if len(new.text) < text or len(new.token_ids) < tokens or len(new.logprobs or ()) < rows:
        return False
    if tokens and new.token_ids[tokens - 1] != old.token_ids[-1]:
        return False
    return not wholly or (
        new.text.startswith(old.text)
        and new.token_ids[:tokens] == old.token_ids
        and (new.logprobs or ())[:rows] == (old.logprobs or ())
    )


_NOTHING = CompletionOutput(
    index=0,
    text="",
    token_ids=(),
    cumulative_logprob=None,
    logprobs=None,
    finish_reason=None,
    stop_reason=None,
    seed=0,
)


def apply(sent: RequestOutput | None, message: Output) -> RequestOutput:
    """What `difference` started from, a message later. Errors: WireError if it cannot follow."""
    outputs = list(sent.outputs) if sent else []
    del outputs[message.num_choices :]
    deltas = [""] * message.num_choices
    for choice in message.choices:
        if not 0 <= choice.position <= len(outputs) or choice.position >= message.num_choices:
            raise WireError(
                f"{message.request_id!r}: choice {choice.position} of {message.num_choices}, "
                f"where {len(outputs)} are known"
            )
        if choice.position == len(outputs):
            outputs.append(_NOTHING)
        base = _NOTHING if choice.reset else outputs[choice.position]
        outputs[choice.position] = CompletionOutput(
            index=choice.index,
            text=base.text + choice.text,
            token_ids=base.token_ids + choice.token_ids,
            cumulative_logprob=choice.cumulative_logprob,
            logprobs=None if choice.logprobs is None else (base.logprobs or ()) + choice.logprobs,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            seed=choice.seed,
            error=choice.error,
            complete=choice.complete,
        )
        deltas[choice.position] = choice.text if choice.delta is None else choice.delta
    if len(outputs) != message.num_choices:
        raise WireError(
            f"{message.request_id!r}: {len(outputs)} choices of {message.num_choices} are known"
        )
    rows = message.prompt_logprobs
    if rows is not None and sent is not None:
        rows = (sent.prompt_logprobs or ()) + rows
    if message.prompt is not None:
        prompt, prompt_token_ids = message.prompt.text, message.prompt.token_ids
    elif sent is not None:
        prompt, prompt_token_ids = sent.prompt, sent.prompt_token_ids
    else:
        raise WireError(f"{message.request_id!r}: the first output has no prompt")
    return RequestOutput(
        request_id=message.request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=rows,
        outputs=tuple(outputs),
        finished=message.finished,
        usage=message.usage,
        timings=message.timings,
        deltas=tuple(deltas),
        cost=message.cost,
        embedding=message.embedding,
    )


__all__ = ["PROMPT_ROWS", "apply", "difference"]
