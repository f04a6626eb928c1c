"""A request as it came over the wire -> prompt and SamplingParams, or the field that is refused."""

from __future__ import annotations

import functools
import json
from typing import Any, cast

import msgspec

from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from . import schema, structured
from .dialect import Dialect, Function, ToolUse
from .errors import ApiError

# What a field of ours is called in OpenAI's interface, for the error's `param`.
CHAT_NAMES = {"logprobs": "top_logprobs", "prompt": "messages"}


def chat_params(request: schema.ChatRequest) -> SamplingParams:
    """Errors: ApiError("unsupported"), ParameterError."""
    _refuse_in_chat(request)
    values = _sampling(request)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise ApiError(
                "invalid_value",
                f"max_tokens={request.max_tokens} and max_completion_tokens="
                f"{request.max_completion_tokens} are the same thing; give one",
                param="max_tokens",
            )
        values["max_tokens"] = request.max_completion_tokens
    values.setdefault("max_tokens", None)  # up to the end of the context
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs is not None:
        raise ApiError("invalid_value", "top_logprobs needs logprobs=true", param="top_logprobs")
    try:
        return _params(values)
    except ParameterError as error:
        if error.field == "max_tokens" and request.max_completion_tokens is not None:
            raise ApiError("invalid_value", str(error), param="max_completion_tokens") from None
        raise


def completion_params(request: schema.CompletionRequest) -> SamplingParams:
    """Errors: ApiError("unsupported"), ParameterError."""
    if request.suffix:
        raise ApiError(
            "unsupported",
            "suffix: filling in between two texts is not supported; ask for what follows `prompt`",
            param="suffix",
        )
    _check_stream(request)
    if request.receipt and len(prompts(request.prompt)) > 1:
        raise ApiError("unsupported", "receipt: it is of one prompt; ask for one", param="receipt")
    values = _sampling(request)
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
    if request.echo:
        values["echo"] = True
        if request.logprobs is not None:
            values["prompt_logprobs"] = request.logprobs
    return _params(values)


def prompts(
    prompt: str | list[str | int | list[int]], field: str = "prompt"
) -> list[str | list[int]]:
    """Each prompt of a field. Errors: ApiError for an empty list, or one of several kinds."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("prompt_empty", f"{field} is an empty list", param=field)
    kinds = {type(p) for p in prompt}
    if len(kinds) > 1:
        raise ApiError(
            "invalid_value",
            f"{field} is a text, a list of texts, token ids, or a list of lists of token ids, not "
            "several of them at once",
            param=field,
        )
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    return [p for p in prompt if not isinstance(p, int)]


def template_messages(messages: list[schema.Message]) -> list[dict[str, Any]]:
    """As chat templates read them: text parts joined, arguments as objects, results named."""
    return named_results([_message(m) for m in messages])


def named_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results with the name of the tool whose call they answer, which some templates want."""
    names = {
        call["id"]: call["function"]["name"] for m in messages for call in m.get("tool_calls") or ()
    }
    for message in messages:
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message.setdefault("name", names[message["tool_call_id"]])
    return messages


def tool_use(request: schema.ChatRequest) -> ToolUse:
    """The tools of a request. Errors: ApiError("invalid_value")."""
    choice: Any = request.tool_choice or "auto"
    if isinstance(choice, schema.NamedTool):
        choice = ("name", choice.function.name)
    functions = tuple(
        Function(f.name, f.description, f.parameters, bool(f.strict))
        for f in (tool.function for tool in request.tools or ())
    )
    return ToolUse(functions, choice, request.parallel_tool_calls is not False)


def template_options(request: schema.ChatRequest, dialect: Dialect) -> dict[str, Any]:
    """Keyword arguments of the chat template. Errors: ApiError("unsupported")."""
    options: dict[str, Any] = {}
    effort = request.reasoning_effort
    if effort is not None:
        options = dialect.thinking(effort != "none", "reasoning_effort", effort)
    options |= request.chat_template_kwargs or {}
    if request.documents is not None:
        options["documents"] = request.documents
    if request.add_generation_prompt is not None:
        options["add_generation_prompt"] = request.add_generation_prompt
    return options


def _sampling(request: schema.Common) -> dict[str, Any]:
    """The fields of SamplingParams that were given."""
    names = schema.Sampling.__struct_fields__
    given = {name: getattr(request, name) for name in names}
    given["structured"] = structured.structured(request.response_format, request.structured_outputs)
    return {name: value for name, value in given.items() if value is not None}


_SHORT = 1024  # bytes of parameters that are kept


def _params(values: dict[str, Any]) -> SamplingParams:
    """Errors: ParameterError."""
    if "structured" in values:
        return SamplingParams(**values)
    try:
        data = msgspec.msgpack.encode(values)
    except OverflowError:  # an integer that no parameter may be
        return SamplingParams(**values)
    return _known(data) if len(data) <= _SHORT else SamplingParams(**values)


@functools.lru_cache(maxsize=64)
def _known(data: bytes) -> SamplingParams:
    """Many requests ask for the same, and a tenth of a request's time would go into checking it."""
    return SamplingParams(**msgspec.msgpack.decode(data))


def _check_stream(request: schema.Common) -> None:
    if request.receipt and request.stream:
        raise ApiError(
            "unsupported", "receipt: it is of a whole answer; use stream=false", param="receipt"
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError("invalid_value", "stream_options needs stream=true", param="stream_options")
    options = request.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise ApiError(
            "invalid_value",
            "stream_options.continuous_usage_stats needs stream_options.include_usage=true",
            param="stream_options.continuous_usage_stats",
        )
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise ApiError(
            "unsupported",
            "stream_options.include_obfuscation: parts are sent as they are",
            param="stream_options.include_obfuscation",
        )


_NOTHING: tuple[Any, ...] = (None, "", False)
# Fields of the interface that may be sent only with these values, and why not with others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "continue_final_message": (_NOTHING, "the answer always begins a message of its own"),
    "functions": (_NOTHING, "functions is the older name of tools"),
    "function_call": ((*_NOTHING, "none"), "function_call is the older name of tool_choice"),
    "modalities": ((None, ["text"]), "this server answers in text alone"),
    "audio": (_NOTHING, "this server answers in text alone"),
    "prediction": (_NOTHING, "predicted outputs are not supported"),
    "store": (_NOTHING, "answers are not stored"),
    "service_tier": ((None, "auto", "default"), "there is one tier of service"),
    "verbosity": (_NOTHING, "say it in the messages; models served here have no such control"),
    "web_search_options": (_NOTHING, "this server searches nothing"),
    "prompt_cache_retention": (
        (None, "in_memory", "in-memory"),
        "the prefix cache is in memory, until its blocks are needed",
    ),
}


def _refuse_in_chat(request: schema.ChatRequest) -> None:
    _check_stream(request)
    for name, (allowed, why) in REFUSED.items():
        value = getattr(request, name)
        if value not in allowed:
            raise ApiError("unsupported", f"{name}: {why}", param=name)
    if request.best_of is not None and request.stream:
        raise ApiError(
            "unsupported",
            "best_of: its samples are ranked at the end; use stream=false",
            param="best_of",
        )


def _text(content: str | list[Any] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(
        part.refusal if isinstance(part, schema.RefusalPart) else part.text for part in content
    )


def _message(message: schema.Message) -> dict[str, Any]:
    match message:
        case schema.AssistantMessage():
            plain: dict[str, Any] = {"role": "assistant", "content": _text(message.content)}
            if plain["content"] is None:
                plain["content"] = message.refusal or ""
            reasoning = message.reasoning_content or message.reasoning
            if reasoning is not None:
                plain["reasoning_content"] = reasoning
            if message.tool_calls:
                plain["tool_calls"] = [_call(call) for call in message.tool_calls]
        case schema.ToolMessage():
            plain = {
                "role": "tool",
                "content": _text(message.content),
                "tool_call_id": message.tool_call_id,
            }
        case schema.DeveloperMessage():  # what "system" is called in newer clients
            plain = {"role": "system", "content": _text(message.content)}
        case schema.SystemMessage():
            plain = {"role": "system", "content": _text(message.content)}
        case schema.UserMessage():
            plain = {"role": "user", "content": _text(message.content)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _call(call: schema.ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = call.function.arguments  # a model's own slip, which it should see again
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


__all__ = [
    "CHAT_NAMES",
    "REFUSED",
    "chat_params",
    "completion_params",
    "named_results",
    "prompts",
    "template_messages",
    "template_options",
    "tool_use",
]
