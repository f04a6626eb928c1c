"""A Responses request -> messages, parameters, tools, or the field that is refused; the store of
conversations that previous_response_id goes on with."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import msgspec

from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from ..core.structured import StructuredOutput
from . import responses_schema as schema
from .bounds import ANSWER_TOKENS
from .dialect import Dialect, Function, ToolUse
from .errors import ApiError, invalid
from .requests import named_results
from .structured import naming

# What a parameter of ours is called in this interface, for the error's `param`.
NAMES = {"max_tokens": "max_output_tokens", "prompt": "input"}
Messages = list[dict[str, Any]]

_NOTHING: tuple[Any, ...] = (None, "", False)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": (_NOTHING, "a response is answered while its client waits"),
    "conversation": (_NOTHING, "conversations are no objects here; use previous_response_id"),
    "max_tool_calls": ((None,), "there are no tools that this server would call itself"),
    "prompt": (_NOTHING, "there are no stored prompts; send input and instructions"),
    "prompt_cache_retention": (
        (None, "in_memory", "in-memory"),
        "the prefix cache is in memory, until its blocks are needed",
    ),
    "service_tier": ((None, "auto", "default"), "there is one tier of service"),
    "top_logprobs": ((None, 0), "/v1/chat/completions gives logprobs"),
    "truncation": ((None, "disabled"), "input that is too long is refused"),
}
_INCLUDED = "reasoning.encrypted_content"  # thoughts are in the answer, in plain text


def sampling_params(request: schema.ResponsesRequest) -> SamplingParams:
    """Errors: ApiError("unsupported"), ParameterError."""
    _refuse(request)
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    values = {n: v for n in names if (v := getattr(request, n)) is not None}
    values["max_tokens"] = request.max_output_tokens  # None: up to the end of the context
    least, _ = ANSWER_TOKENS
    if request.max_output_tokens is not None and request.max_output_tokens < least:
        raise ParameterError(
            "max_tokens", f"max_output_tokens={request.max_output_tokens} must be at least {least}"
        )
    with naming("text.format"):
        match request.text.format if request.text is not None else None:
            case schema.JsonFormat():
                values["structured"] = StructuredOutput(json_object=True)
            case schema.SchemaFormat(schema=wanted):
                values["structured"] = StructuredOutput.json(wanted)
    return SamplingParams(**values)


def tool_use(request: schema.ResponsesRequest) -> ToolUse:
    """Errors: ApiError("invalid_value")."""
    choice: Any = request.tool_choice or "auto"
    if isinstance(choice, schema.NamedTool):
        choice = ("name", choice.name)
    functions = tuple(
        Function(t.name, t.description, t.parameters, bool(t.strict)) for t in request.tools or ()
    )
    return ToolUse(functions, choice, request.parallel_tool_calls is not False)


def template_options(request: schema.ResponsesRequest, dialect: Dialect) -> dict[str, Any]:
    """Variables of the chat template. Errors: ApiError("unsupported")."""
    options: dict[str, Any] = {}
    if request.reasoning is not None and request.reasoning.effort is not None:
        effort = request.reasoning.effort
        options = dialect.thinking(effort != "none", "reasoning.effort", effort)
    return options | (request.chat_template_kwargs or {})


def messages_of(request: schema.ResponsesRequest, earlier: Messages) -> Messages:
    """The conversation, without instructions. Errors: ApiError("invalid_value")."""
    messages = [dict(m) for m in earlier]
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for index, plain in enumerate(request.input):
            add_item(messages, _item(plain, index))
    return named_results(messages)


def add_item(messages: Messages, item: schema.Item) -> None:
    """Add an item as chat templates read it: what an answer was made of is one message."""
    match item:
        case schema.CallOutputItem(call_id=call_id, output=output):
            text = output if isinstance(output, str) else "".join(p.text for p in output)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        case schema.MessageItem(role="assistant"):
            if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"]:
                messages.append({"role": "assistant", "content": ""})
            _assistant(messages)["content"] = _text(item.content)
        case schema.MessageItem(role=role):
            said = "system" if role == "developer" else role
            messages.append({"role": said, "content": _text(item.content)})
        case schema.ReasoningItem():
            text = "".join(part.text for part in item.content or ())
            if text:
                _assistant(messages)["reasoning_content"] = text
        case schema.CallItem(call_id=call_id, name=name, arguments=arguments):
            function = {"name": name, "arguments": arguments_of(arguments)}
            call = {"id": call_id, "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)


def _assistant(messages: Messages) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def arguments_of(text: str) -> Any:
    """A call's arguments as templates read them."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text  # a model's own slip, which it should see again


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(p.refusal if isinstance(p, schema.RefusalPart) else p.text for p in content)


def _item(plain: dict[str, Any], index: int) -> schema.Item:
    kind = plain.get("type", "message")
    if kind not in schema.ITEMS:
        raise ApiError(
            "invalid_value",
            f"input[{index}].type is {str(kind)[:100]!r}; known are {', '.join(schema.ITEMS)}",
            param=f"input[{index}].type",
        )
    try:
        item: schema.Item = msgspec.convert(plain, schema.ITEMS[kind])
    except msgspec.ValidationError as error:
        found = invalid(error)
        where = f"input[{index}]" + (f".{found.param}" if found.param else "")
        raise ApiError("invalid_value", f"{where}: {found}", param=where) from None
    return item


def _refuse(request: schema.ResponsesRequest) -> None:
    for name, (allowed, why) in REFUSED.items():
        if getattr(request, name) not in allowed:
            raise ApiError("unsupported", f"{name}: {why}", param=name)
    for name in request.include or ():
        if name != _INCLUDED:
            raise ApiError(
                "unsupported", f"include: {name[:100]!r} is nothing that is here", param="include"
            )
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise ApiError(
            "unsupported",
            "text.verbosity: say it in the instructions; models served here have no such control",
            param="text.verbosity",
        )
    reasoning = request.reasoning or schema.ReasoningOptions()
    if reasoning.summary is not None or reasoning.generate_summary is not None:
        raise ApiError(
            "unsupported",
            "reasoning.summary: thoughts are given as they are, not summed up",
            param="reasoning.summary",
        )
    options = request.stream_options
    if options is not None and options.include_obfuscation:
        raise ApiError(
            "unsupported",
            "stream_options.include_obfuscation: parts are sent as they are",
            param="stream_options.include_obfuscation",
        )


class ResponseStore:
    """Conversations of the latest responses, in memory, each for the API key that made it alone."""

    MAX_BYTES = 64 << 20  # of JSON, all together
    MAX_ENTRIES = 4096

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._size = 0

    def keep(self, caller: str, response_id: str, messages: Messages) -> None:
        """Keep a conversation; the oldest make room for it."""
        data = msgspec.json.encode(messages)
        self._kept[caller, response_id] = data
        self._size += len(data)
        while self._size > self.MAX_BYTES or len(self._kept) > self.MAX_ENTRIES:
            self._size -= len(self._kept.popitem(last=False)[1])

    def get(self, caller: str, response_id: str) -> Messages:
        """Errors: ApiError("invalid_value") for one that is not kept, or is another key's."""
        data = self._kept.get((caller, response_id))
        if data is None:
            raise ApiError(
                "invalid_value",
                f"previous_response_id: {response_id[:100]!r} is not kept here: it was sent with "
                "store=false, is another key's, is older than the latest "
                f"{self.MAX_BYTES >> 20} MB, or the server was started since; send its items in "
                "`input`",
                param="previous_response_id",
            )
        messages: Messages = msgspec.json.decode(data)
        return messages


__all__ = [
    "NAMES",
    "REFUSED",
    "Messages",
    "ResponseStore",
    "arguments_of",
    "messages_of",
    "sampling_params",
    "template_options",
    "tool_use",
]
