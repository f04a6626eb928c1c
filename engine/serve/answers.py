"""RequestOutputs as OpenAI's interface shows them: whole answers, and the parts of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import UNSET, UnsetType

from ..core.answers import CompletionOutput, Logprob, RequestOutput
from ..core.cost import total
from . import answer_schema, schema


def usage(output: RequestOutput, reasoning_tokens: int | None = None) -> answer_schema.Usage:
    """Tokens of a request. `reasoning_tokens`: where the interface tells them apart."""
    total = total_usage([output])
    if reasoning_tokens is not None:
        total.completion_tokens_details = answer_schema.CompletionDetails(reasoning_tokens)
    return total


def total_usage(outputs: Sequence[RequestOutput]) -> answer_schema.Usage:
    """Tokens of several prompts of one call."""
    prompt = sum(o.usage.prompt_tokens for o in outputs)
    completion = sum(o.usage.completion_tokens for o in outputs)
    cached = sum(o.usage.cached_tokens for o in outputs)
    details = answer_schema.TokenDetails(cached)
    return answer_schema.Usage(prompt, completion, prompt + completion, details, cost(outputs))


def part_usage(
    options: schema.StreamOptions | None, outputs: Iterable[RequestOutput]
) -> answer_schema.Usage | UnsetType | None:
    """What a part of a stream says of usage: nothing, null where the last part tells it, or so far.

    Thoughts are told apart in the last part alone: they are counted when they are whole.
    """
    if options is None or not options.include_usage:
        return UNSET
    return total_usage(list(outputs)) if options.continuous_usage_stats else None


def cost(outputs: Sequence[RequestOutput]) -> answer_schema.Cost | UnsetType:
    """What they took together; left out where nobody counted."""
    spent = total(output.cost for output in outputs)
    if spent is None:
        return UNSET
    return answer_schema.Cost(spent.joules, spent.money, spent.grams, spent.estimated)


def timings(output: RequestOutput) -> answer_schema.Timings:
    """Where the time went, of the request's first sample."""
    t = output.timings
    tokens = max((len(c.token_ids) for c in output.outputs), default=0)
    first = t.time_to_first_token_s
    return answer_schema.Timings(
        queue_ms=_ms(t.queued_s),
        prefill_ms=_ms(t.prefill_s),
        decode_ms=_ms(t.decode_s),
        total_ms=_ms(t.total_s),
        time_to_first_token_ms=None if first is None else _ms(first),
        per_token_ms=_ms(t.decode_s / (tokens - 1)) if tokens > 1 else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 3)


# ------------------------------------------------------------------------------------- logprobs


def _bytes(token: str) -> list[int] | None:
    # A token that is a part of a character has no text of its own, and OpenAI's field is nullable.
    return None if "�" in token else list(token.encode("utf-8", "surrogatepass"))


def _ranked(row: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(row.items(), key=lambda item: item[1].rank)


def chat_logprobs(
    completion: CompletionOutput, start: int, top: int
) -> answer_schema.ChatLogprobs | None:
    """Of the tokens from `start` on; `top` alternatives each. None where none were asked for."""
    if completion.logprobs is None:
        return None
    entries = []
    for token_id, row in zip(
        completion.token_ids[start:], completion.logprobs[start:], strict=True
    ):
        chosen = row[token_id]
        entries.append(
            answer_schema.TokenLogprob(
                chosen.decoded_token,
                chosen.logprob,
                _bytes(chosen.decoded_token),
                [
                    answer_schema.TopLogprob(p.decoded_token, p.logprob, _bytes(p.decoded_token))
                    for _, p in _ranked(row)[:top]
                ],
            )
        )
    return answer_schema.ChatLogprobs(entries)


def completion_logprobs(
    completion: CompletionOutput,
    start: int,
    top: int,
    *,
    offset: int = 0,
    prompt: tuple[tuple[int, ...], Sequence[Mapping[int, Logprob] | None]] | None = None,
    first_text: str = "",
) -> answer_schema.CompletionLogprobs | None:
    """The older form, of the tokens from `start` on, whose text begins at character `offset`.

    prompt: token ids and rows of an echoed prompt, which come first. first_text: what its first
    token spells, which has no row.
    """
    if completion.logprobs is None:
        return None
    ids: list[int] = list(completion.token_ids[start:])
    rows: list[Mapping[int, Logprob] | None] = list(completion.logprobs[start:])
    if prompt is not None:
        ids, rows = [*prompt[0], *ids], [*prompt[1], *rows]
    made = answer_schema.CompletionLogprobs([], [], [] if top else None, [])
    for token_id, row in zip(ids, rows, strict=True):
        text = row[token_id].decoded_token if row is not None else first_text
        made.tokens.append(text)
        made.token_logprobs.append(None if row is None else row[token_id].logprob)
        if made.top_logprobs is not None:
            best = None if row is None else _ranked(row)[:top]
            made.top_logprobs.append(
                None if best is None else {p.decoded_token: p.logprob for _, p in best}
            )
        made.text_offset.append(offset)
        offset += len(text)
    return made


def prompt_logprobs(output: RequestOutput) -> list[dict[str, dict[str, object]] | None] | UnsetType:
    """engineroom's own, and vLLM's form: per prompt token, token id -> its logprob."""
    if output.prompt_logprobs is None:
        return UNSET
    return [
        None
        if row is None
        else {
            str(token): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in row.items()
        }
        for row in output.prompt_logprobs
    ]


__all__ = [
    "chat_logprobs",
    "completion_logprobs",
    "cost",
    "part_usage",
    "prompt_logprobs",
    "timings",
    "total_usage",
    "usage",
]
