"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface.

Source: the Anthropic API reference (messages, streaming messages, errors). As in OpenAI's, a field
is known here or the request is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ..core.request import CompletionOutput, ParameterError, RequestOutput, SamplingParams
from . import answers, schema
from .errors import ApiError
from .schema import Strict
from .service import Caller, Service, Work
from .sse import event

PATH = "/v1/messages"
# What a field of ours is called in Anthropic's interface, for the error's sentence.
NAMES = {"stop": "stop_sequences"}


# -------------------------------------------------------------------------------- the requests


class CacheControl(Strict, kw_only=True):
    """Read and not needed: every prompt's beginning is cached."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(Strict, kw_only=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None  # as an answer carries it


class Turn(Strict, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[TextBlock]


class CountTokensRequest(Strict, kw_only=True):
    """POST /v1/messages/count_tokens: the part of a request that becomes the prompt."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None
    # Read, and refused where they ask for something.
    thinking: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class Metadata(Strict, kw_only=True):
    user_id: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # engineroom's own
    seed: int | None = None
    priority: int = 0
    timeout_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    cache_salt: str | None = None


# ---------------------------------------------------------------------------------- the answers


class InputTokens(Struct):
    input_tokens: int


class MessagesUsage(Struct, kw_only=True):
    """input_tokens were computed; those found in the prefix cache are counted apart."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    cost: schema.Cost | UnsetType = UNSET


class AnswerBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class MessagesAnswer(Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesEvent(Struct, kw_only=True):
    """One event of a stream; `type` is its name, which says what else it has."""

    type: str
    message: MessagesAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnswerBlock | UnsetType = UNSET
    delta: dict[str, str | None] | UnsetType = UNSET
    usage: MessagesUsage | UnsetType = UNSET


class Messages:
    """One answer: `whole()` or `events()`, once. Errors: ApiError, and those of Service.run()."""

    def __init__(self, service: Service, request: MessagesRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._caller = caller
        self._params = _params(request)
        self._messages = _template_messages(request)
        self._id = f"msg_{secrets.token_hex(12)}"

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        request = self._request
        work = Work(
            prompt=await _render(self._service, self._messages),
            params=self._params,
            caller=self._caller,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            cache_salt=request.cache_salt,
            final_only=not request.stream,
            request_id=self._id,
        )
        async for output in self._service.run(work):
            yield output

    async def whole(self) -> MessagesAnswer:
        """The answer when it is complete."""
        last = None
        async for output in self._outputs():
            last = output
        assert last is not None  # run() yields at least the ending
        (completion,) = last.outputs
        return self._answer(last, [AnswerBlock(text=completion.text)], *stop_reason(completion))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the message's beginning, one block of text as it comes, its end."""
        begun = False
        async for output in self._outputs():
            if not begun:  # what the door refuses is refused before the first event
                begun = True
                yield _event("message_start", message=self._answer(output, [], None, None))
                block = AnswerBlock(text="")
                yield _event("content_block_start", index=0, content_block=block)
            if output.deltas[0]:
                delta = {"type": "text_delta", "text": output.deltas[0]}
                yield _event("content_block_delta", index=0, delta=delta)
            if output.finished:
                yield _event("content_block_stop", index=0)
                reason, sequence = stop_reason(output.outputs[0])
                end = {"stop_reason": reason, "stop_sequence": sequence}
                yield _event("message_delta", delta=end, usage=_usage(output))
        yield _event("message_stop")

    def _answer(
        self,
        output: RequestOutput,
        content: list[AnswerBlock],
        stop_reason: str | None,
        stop_sequence: str | None,
    ) -> MessagesAnswer:
        return MessagesAnswer(
            id=self._id,
            model=self._service.model_name,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=_usage(output),
        )


async def count_tokens(service: Service, request: CountTokensRequest) -> InputTokens:
    """Tokens of the prompt that the conversation becomes. Errors: ApiError, the template's."""
    service.check_model(request.model)
    return InputTokens(len(await _render(service, _template_messages(request))))


async def _render(service: Service, messages: list[dict[str, Any]]) -> list[int]:
    # Templates of models that can think ask for this name; others do not read it.
    return await service.keeper.llm.render_chat(messages, enable_thinking=False)


def _params(request: MessagesRequest) -> SamplingParams:
    given = {
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
    }
    if request.max_tokens < 1:
        raise ParameterError("max_tokens", f"max_tokens={request.max_tokens} must be at least 1")
    return SamplingParams(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def _template_messages(request: CountTokensRequest) -> list[dict[str, Any]]:
    """As chat templates read them: the system prompt first, turns of one role in a row as one."""
    _refuse(request)
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
    for turn in request.messages:
        if messages and messages[-1]["role"] == turn.role:
            messages[-1]["content"] += "\n\n" + _text(turn.content)
        else:
            messages.append({"role": turn.role, "content": _text(turn.content)})
    return messages


def _refuse(request: CountTokensRequest) -> None:
    if request.thinking is not None and request.thinking != {"type": "disabled"}:
        raise ApiError(
            "unsupported",
            'thinking: this server answers without it; send {"type": "disabled"} or nothing',
            param="thinking",
        )
    if request.tools or request.tool_choice not in (None, {"type": "none"}):
        name = "tools" if request.tools else "tool_choice"
        raise ApiError("unsupported", f"{name}: tools are not supported here yet", param=name)
    if request.messages[-1].role == "assistant":
        raise ApiError(
            "unsupported",
            "messages: the last one is the assistant's; an answer always begins a message of its "
            "own, so end with the user's",
            param="messages",
        )


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


_REASONS = {"stop": "end_turn", "length": "max_tokens"}  # the others keep our names


def stop_reason(completion: CompletionOutput) -> tuple[str, str | None]:
    """Anthropic's stop_reason and stop_sequence."""
    if isinstance(completion.stop_reason, str):
        return "stop_sequence", completion.stop_reason
    reason = completion.finish_reason or "abort"
    return _REASONS.get(reason, reason), None


def _usage(output: RequestOutput) -> MessagesUsage:
    usage = output.usage
    return MessagesUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        cost=answers.cost([output]),
    )


def _event(name: str, **fields: Any) -> bytes:
    return event(MessagesEvent(type=name, **fields), name)


# ------------------------------------------------------------------------------------- errors

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}

ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"enum": ["invalid_request_error", *_TYPES.values()]},
                "message": {"type": "string"},
            },
        },
    },
}


def is_ours(path: str) -> bool:
    """True where errors are told in Anthropic's form."""
    return path == PATH or path.startswith(PATH + "/")


def envelope(error: ApiError) -> dict[str, object]:
    """Anthropic's form of an error, which has no field for `param`: the message names it."""
    text = str(error)
    if error.param and error.param not in text:
        text = f"{error.param}: {text}"
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": text}}


__all__ = [
    "ERROR",
    "NAMES",
    "PATH",
    "CountTokensRequest",
    "InputTokens",
    "Messages",
    "MessagesAnswer",
    "MessagesEvent",
    "MessagesRequest",
    "count_tokens",
    "envelope",
    "is_ours",
    "stop_reason",
]
