"""What crosses the wire in Anthropic's interface: requests read strictly, answers as plain structs.

Source: the Anthropic API reference (messages, streaming messages, tool use, extended thinking).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from .answer_schema import Cost
from .bounds import ANSWER_TOKENS, TEMPERATURE, TOOLS, between, entries, text, within
from .schema import Priority, Timeout, ToolName
from .strict import Strict
from .structured import OutputConfig

# -------------------------------------------------------------------------------- the requests


class CacheControl(Strict, kw_only=True):
    """Read and not needed: every prompt's beginning is cached."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(Strict, kw_only=True, tag_field="type", tag="text"):
    text: str
    cache_control: CacheControl | None = None
    citations: None = None  # as an answer carries it


class ThinkingBlock(Strict, kw_only=True, tag_field="type", tag="thinking"):
    """Thoughts of an earlier answer. `signature` is read and not needed."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(Strict, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: ToolName
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict, kw_only=True, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(Strict, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class CustomTool(Strict, kw_only=True):
    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AutoChoice(Strict, kw_only=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Strict, kw_only=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Strict, kw_only=True, tag_field="type", tag="tool"):
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class NoChoice(Strict, kw_only=True, tag_field="type", tag="none"):
    pass


class ThinkingOn(Strict, kw_only=True, tag_field="type", tag="enabled"):
    """budget_tokens must be below max_tokens, as Anthropic has it; max_tokens is what bounds."""

    budget_tokens: Annotated[int, Meta(ge=1, description="Below max_tokens.")]


class ThinkingAdaptive(Strict, kw_only=True, tag_field="type", tag="adaptive"):
    pass


class ThinkingOff(Strict, kw_only=True, tag_field="type", tag="disabled"):
    pass


class CountTokensRequest(Strict, kw_only=True):
    """POST /v1/messages/count_tokens: the part of a request that becomes the prompt."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None
    thinking: ThinkingOn | ThinkingAdaptive | ThinkingOff | None = None
    tools: Annotated[list[CustomTool], TOOLS] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    output_config: OutputConfig | None = None  # of the answer: it adds nothing to the prompt


class Metadata(Strict, kw_only=True):
    user_id: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, between(*ANSWER_TOKENS)]
    stream: bool | None = None
    stop_sequences: Annotated[list[Annotated[str, text("stop")]], entries("stop")] | None = None
    temperature: Annotated[float, TEMPERATURE] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    top_k: Annotated[int, within("top_k")] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # engineroom's own
    seed: Annotated[int, within("seed")] | None = None
    priority: Priority = 0
    timeout_ms: Timeout | None = None
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
    cost: Cost | UnsetType = UNSET


class AnswerText(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class AnswerThinking(Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class AnswerToolUse(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


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


__all__ = [
    "AnswerBlock",
    "AnswerText",
    "AnswerThinking",
    "AnswerToolUse",
    "AnyChoice",
    "CountTokensRequest",
    "InputTokens",
    "MessagesAnswer",
    "MessagesEvent",
    "MessagesRequest",
    "MessagesUsage",
    "NoChoice",
    "TextBlock",
    "ThinkingAdaptive",
    "ThinkingBlock",
    "ThinkingOn",
    "ToolChoice",
    "ToolResultBlock",
    "ToolUseBlock",
    "Turn",
]
