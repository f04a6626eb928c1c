"""What crosses the wire in OpenAI's Responses interface: strict requests, answers as structs.

Source: the OpenAI API reference (responses, streaming events).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from .answer_schema import CompletionDetails, Timings, TokenDetails
from .bounds import ANSWER_TOKENS, NEVER, NOT_TRUE, TEMPERATURE, TOOLS, between, says, within
from .schema import Priority, Stop, Timeout, ToolName
from .strict import Strict

# --------------------------------------------------------------------------------- items of input


class InputText(Strict, kw_only=True, tag_field="type", tag="input_text"):
    text: str


class OutputText(Strict, kw_only=True, tag_field="type", tag="output_text"):
    """Text of an earlier answer, or of this one."""

    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] | None = None


class RefusalPart(Strict, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class ReasoningText(Strict, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class SummaryText(Strict, kw_only=True, tag_field="type", tag="summary_text"):
    text: str


Status = Literal["in_progress", "completed", "incomplete"] | None


class MessageItem(Strict, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | RefusalPart]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status = None
    phase: str | None = None


class CallItem(Strict, kw_only=True):
    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str
    id: str | None = None
    status: Status = None


class CallOutputItem(Strict, kw_only=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status = None


class ReasoningItem(Strict, kw_only=True):
    """Thoughts of an earlier answer: what `content` has is given to the model's template."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status = None


ITEMS = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
Item = MessageItem | CallItem | CallOutputItem | ReasoningItem


# ------------------------------------------------------------------------------------ the request


class FunctionTool(Strict, kw_only=True, tag_field="type", tag="function"):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Strict, kw_only=True, tag_field="type", tag="function"):
    name: ToolName


class PlainFormat(Strict, kw_only=True, tag_field="type", tag="text"):
    pass


class JsonFormat(Strict, kw_only=True, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Strict, kw_only=True, tag_field="type", tag="json_schema"):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict, kw_only=True):
    format: PlainFormat | JsonFormat | SchemaFormat | None = None
    verbosity: Annotated[str | None, says(enum=[None, "medium"])] = None


class ReasoningOptions(Strict, kw_only=True):
    effort: str | None = None
    summary: Annotated[str | None, NEVER] = None
    generate_summary: Annotated[str | None, NEVER] = None


class StreamOptions(Strict, kw_only=True):
    include_obfuscation: Annotated[bool | None, NOT_TRUE] = None


class ResponsesRequest(Strict, kw_only=True):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], TOOLS] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    temperature: Annotated[float, TEMPERATURE] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    max_output_tokens: Annotated[int, between(*ANSWER_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # engineroom's own
    top_k: Annotated[int, within("top_k")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    seed: Annotated[int, within("seed")] | None = None
    stop: Stop | None = None
    priority: Priority = 0
    timeout_ms: Timeout | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Read, and refused by name where they ask for something (see responses_input.py).
    background: bool | None = None
    conversation: Any = None
    include: list[Annotated[str, says(enum=["reasoning.encrypted_content"])]] | None = None
    max_tool_calls: int | None = None
    prompt: Any = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    top_logprobs: int | None = None
    truncation: str | None = None


# ------------------------------------------------------------------------------------- the answer


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: str = "assistant"
    status: str
    content: list[OutputText]


class OutputReasoning(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText]
    status: str


class OutputCall(Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponsesUsage(Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class Failure(Struct, kw_only=True):
    code: str
    message: str


class Incomplete(Struct, kw_only=True):
    reason: str


class ResponsesAnswer(Struct, kw_only=True):
    """A response; as it begins, while it grows, and whole."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool = False
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningOptions
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: str | NamedTool
    tools: list[FunctionTool]
    top_p: float
    truncation: str = "disabled"
    usage: ResponsesUsage | None
    metadata: dict[str, str]
    user: str | None
    # engineroom's own
    seed: int | UnsetType = UNSET
    complete: bool | UnsetType = UNSET  # whether a form that was asked for was reached
    timings: Timings | UnsetType = UNSET
    system_fingerprint: str


class ResponsesEvent(Struct, kw_only=True, omit_defaults=True):
    """One event of a stream; `type` says what else it has."""

    type: str
    sequence_number: int
    response: ResponsesAnswer | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


__all__ = [
    "ITEMS",
    "CallItem",
    "CallOutputItem",
    "CompletionDetails",
    "Failure",
    "FunctionTool",
    "Incomplete",
    "InputText",
    "Item",
    "JsonFormat",
    "MessageItem",
    "NamedTool",
    "OutputCall",
    "OutputItem",
    "OutputMessage",
    "OutputReasoning",
    "OutputText",
    "PlainFormat",
    "ReasoningItem",
    "ReasoningOptions",
    "ReasoningText",
    "RefusalPart",
    "ResponsesAnswer",
    "ResponsesEvent",
    "ResponsesRequest",
    "ResponsesUsage",
    "SchemaFormat",
    "TextOptions",
    "TokenDetails",
]
