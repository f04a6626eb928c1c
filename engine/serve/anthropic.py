"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface.

Source: the Anthropic API reference (messages, streaming messages, errors). As in OpenAI's, a field
is known here or the request is refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from msgspec import Struct

from ..core.answers import CompletionOutput, RequestOutput
from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from ..dialects.parts import CallArguments, CallBegin, Part, Reasoning, Text
from . import answers
from .anthropic_schema import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    AnyChoice,
    CountTokensRequest,
    InputTokens,
    MessagesAnswer,
    MessagesEvent,
    MessagesRequest,
    MessagesUsage,
    NoChoice,
    TextBlock,
    ThinkingAdaptive,
    ThinkingBlock,
    ThinkingOn,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from .bounds import ANSWER_TOKENS
from .dialect import Dialect, Function, Reader, ToolUse
from .errors import ApiError
from .requests import named_results
from .service import Caller, Service, Work
from .sse import NOWHERE, event
from .structured import of_config

PATH = "/v1/messages"
# What a field of ours is called in Anthropic's interface, for the error's sentence.
NAMES = {"stop": "stop_sequences", "prompt": "messages"}


class Messages:
    """One answer: `whole()` or `events()`, once. Errors: ApiError, and those of Service.run()."""

    connection = NOWHERE  # whatever is offered: every part is an output

    def __init__(self, service: Service, request: MessagesRequest, caller: Caller) -> None:
        service.check_model(request.model)
        self._service = service
        self._request = request
        self._caller = caller
        self._params = _params(request)
        self._conversation = _conversation(request, service.dialect)
        self._id = f"msg_{secrets.token_hex(12)}"
        self._reader: Reader | None = None

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        request, service = self._request, self._service
        messages, use, options = self._conversation
        turn = await service.dialect.turn(service.keeper.llm, messages, self._params, use, options)
        self._reader = turn.reader()
        work = Work(
            prompt=turn.prompt,
            params=turn.params,
            caller=self._caller,
            priority=request.priority,
            timeout_ms=request.timeout_ms,
            cache_salt=request.cache_salt,
            final_only=not request.stream,
            request_id=self._id,
            form_field=turn.form_field("output_config"),
        )
        async for output in service.run(work):
            yield output

    async def whole(self) -> MessagesAnswer:
        """The answer when it is complete."""
        last = None
        async for output in self._outputs():
            last = output
        reader = self._reader
        assert last is not None and reader is not None  # run() yields at least the ending
        (completion,) = last.outputs
        reader.feed(completion.text, last=True)
        return self._answer(last, _blocks(reader), *stop_reason(completion, reader))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the message's beginning, its blocks as they come, its end."""
        blocks: _Blocks | None = None
        async for output in self._outputs():
            reader = self._reader
            assert reader is not None
            if blocks is None:  # what the door refuses is refused before the first event
                blocks = _Blocks(reader)
                yield _event("message_start", message=self._answer(output, [], None, None))
            for part in reader.feed(output.deltas[0], last=output.finished):
                for said in blocks.add(part):
                    yield said
            if output.finished:
                for said in blocks.end():
                    yield said
                reason, sequence = stop_reason(output.outputs[0], reader)
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
    of_config(request.output_config)  # what a request for an answer is refused for
    messages, use, options = _conversation(request, service.dialect)
    ids = await service.dialect.render(service.keeper.llm, messages, use, options)
    return InputTokens(len(ids))


def _blocks(reader: Reader) -> list[AnswerBlock]:
    """The blocks of a whole answer; a text at least."""
    answer = reader.answer
    blocks: list[AnswerBlock] = []
    if answer.reasoning:
        blocks.append(AnswerThinking(thinking=answer.reasoning))
    if answer.text or not (blocks or answer.calls):
        blocks.append(AnswerText(text=answer.text))
    for index, call in enumerate(answer.calls or ()):
        try:
            given = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict):
            blocks.append(AnswerToolUse(id=_call_id(reader, index), name=call.name, input=given))
        else:  # the model's own slip, or cut by max_tokens: no input that could be given
            blocks.append(AnswerText(text=f"{call.name}{call.arguments}"))
    return blocks


def _call_id(reader: Reader, index: int) -> str:
    return "toolu_" + reader.call_id(index).removeprefix("call_")


class _Blocks:
    """The events of an answer's blocks: one is open at a time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._index = -1
        self._open: type[Struct] | None = None
        self._num_calls = 0

    def add(self, part: Part) -> Iterator[bytes]:
        """The events of one part."""
        match part:
            case Text(text=text):
                yield from self._start(AnswerText, AnswerText(text=""))
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text=text):
                yield from self._start(AnswerThinking, AnswerThinking(thinking=""))
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegin(name=name):
                call_id = _call_id(self._reader, self._num_calls)
                self._num_calls += 1
                yield from self._stop()
                yield from self._start(
                    AnswerToolUse, AnswerToolUse(id=call_id, name=name, input={})
                )
            case CallArguments(text=text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self) -> Iterator[bytes]:
        """The last events; a text without any where there was nothing else."""
        if self._index < 0:
            yield from self._start(AnswerText, AnswerText(text=""))
        yield from self._stop()

    def _start(self, kind: type[Struct], block: AnswerBlock) -> Iterator[bytes]:
        if self._open is kind:
            return
        yield from self._stop()
        self._open = kind
        self._index += 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _stop(self) -> Iterator[bytes]:
        if self._open is AnswerThinking:
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, str | None]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _params(request: MessagesRequest) -> SamplingParams:
    given = {
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "structured": of_config(request.output_config),
    }
    least, _ = ANSWER_TOKENS
    if request.max_tokens < least:
        raise ParameterError(
            "max_tokens", f"max_tokens={request.max_tokens} must be at least {least}"
        )
    thinking = request.thinking
    if isinstance(thinking, ThinkingOn) and thinking.budget_tokens >= request.max_tokens:
        raise ApiError(
            "invalid_value",
            f"thinking.budget_tokens={thinking.budget_tokens} must be below max_tokens="
            f"{request.max_tokens}, which counts thoughts and answer",
            param="thinking.budget_tokens",
        )
    return SamplingParams(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


_Conversation = tuple[list[dict[str, Any]], ToolUse, dict[str, Any]]


def _conversation(request: CountTokensRequest, dialect: Dialect) -> _Conversation:
    """What the template is given: messages, tools, and its own variables. Errors: ApiError."""
    if request.messages[-1].role == "assistant":
        raise ApiError(
            "unsupported",
            "messages: the last one is the assistant's; an answer always begins a message of its "
            "own, so end with the user's",
            param="messages",
        )
    if isinstance(request.thinking, ThinkingOn | ThinkingAdaptive):
        options = dialect.thinking(True, "thinking")
    else:  # templates of models that can think ask for this name; others do not read it
        options = {"enable_thinking": False}
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
    for turn in request.messages:
        for message in _messages_of(turn):
            _append(messages, message)
    return named_results(messages), _tool_use(request), options


def _tool_use(request: CountTokensRequest) -> ToolUse:
    choice: str | tuple[str, str] = "auto"
    match request.tool_choice:
        case AnyChoice():
            choice = "required"
        case NoChoice():
            choice = "none"
        case ToolChoice(name=name):
            choice = ("name", name)
    single = getattr(request.tool_choice, "disable_parallel_tool_use", None)
    functions = tuple(
        Function(t.name, t.description, t.input_schema, bool(t.strict)) for t in request.tools or ()
    )
    return ToolUse(functions, choice, not single)


def _messages_of(turn: Turn) -> Iterator[dict[str, Any]]:
    """A turn as chat templates read it: results of tools are messages of their own, before text."""
    blocks = [TextBlock(text=turn.content)] if isinstance(turn.content, str) else turn.content
    message: dict[str, Any] = {"role": turn.role, "content": ""}
    thoughts = ""
    calls = []
    said = isinstance(turn.content, str)
    for block in blocks:
        match block:
            case TextBlock(text=text):
                message["content"] += text
                said = True
            case ToolResultBlock() if turn.role == "user":
                content = _text(block.content)
                yield {
                    "role": "tool",
                    "tool_call_id": block.tool_use_id,
                    "content": f"Error: {content}" if block.is_error else content,
                }
            case ThinkingBlock(thinking=text) if turn.role == "assistant":
                thoughts += text
            case ToolUseBlock() if turn.role == "assistant":
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise ApiError(
                    "invalid_value",
                    f"messages: a {turn.role} turn cannot have a {type(block).__name__}",
                    param="messages",
                )
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    if said or calls or thoughts:
        yield message


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Add a message; two texts of one role in a row become one."""
    last = messages[-1] if messages else {"role": ""}
    plain = set(last) == set(message) == {"role", "content"}
    if plain and last["role"] == message["role"]:
        last["content"] += "\n\n" + message["content"]
    else:
        messages.append(message)


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


_REASONS = {"stop": "end_turn", "length": "max_tokens"}  # the others keep our names


def stop_reason(
    completion: CompletionOutput, reader: Reader | None = None
) -> tuple[str, str | None]:
    """Anthropic's stop_reason and stop_sequence."""
    if reader is not None and reader.finish_reason(completion) == "tool_calls":
        return "tool_use", None
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
