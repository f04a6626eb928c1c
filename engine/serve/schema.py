"""What OpenAI's interface is asked: requests, read strictly.

Source: the OpenAI API reference (chat completions, completions, models, embeddings). Every field of
a request is known here, or the request is refused; what a field may not ask for is in requests.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from .bounds import (
    BIASES,
    MAX_INPUTS,
    MAX_KEPT,
    NOT_TRUE,
    PRIORITY,
    REQUEST_ID_LENGTH,
    TEMPERATURE,
    TOKEN_KEYS,
    TOOLS,
    entries,
    prompts,
    says,
    text,
    within,
)
from .strict import Name, Strict
from .structured import ResponseFormat, StructuredOutputs

TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Timeout = Annotated[int, Meta(ge=1, le=86_400_000)]
Priority = Annotated[int, PRIORITY]
RequestId = Annotated[str, Meta(max_length=REQUEST_ID_LENGTH)]
Stop = Annotated[str, text("stop")] | Annotated[list[Annotated[str, text("stop")]], entries("stop")]


# ------------------------------------------------------------------------------------- messages


class TextPart(Strict, kw_only=True, tag_field="type", tag="text"):
    text: str


class OnlyText(Strict, kw_only=True):
    """A text part where there is no other kind: unlike a tag alone, its type must be there."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


Text = str | list[OnlyText]


class SystemMessage(Strict, kw_only=True, tag_field="role", tag="system"):
    content: Text
    name: str | None = None


class DeveloperMessage(Strict, kw_only=True, tag_field="role", tag="developer"):
    content: Text
    name: str | None = None


class UserMessage(Strict, kw_only=True, tag_field="role", tag="user"):
    content: Text
    name: str | None = None


class FunctionCall(Strict, kw_only=True):
    name: Name
    arguments: str


class ToolCall(Strict, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None  # as it was streamed


class AssistantMessage(Strict, kw_only=True, tag_field="role", tag="assistant"):
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of the same
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None  # as an answer of ours carries it


class ToolMessage(Strict, kw_only=True, tag_field="role", tag="tool"):
    content: Text
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


# ---------------------------------------------------------------------------------------- tools

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.:/-]{1,64}$")]


class Function(Strict, kw_only=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True, tag_field="type", tag="function"):
    function: Function


class NamedFunction(Strict, kw_only=True):
    name: ToolName


class NamedTool(Strict, kw_only=True, tag_field="type", tag="function"):
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


# -------------------------------------------------------------------------------- the requests


class StreamOptions(Strict, kw_only=True):
    """continuous_usage_stats is vLLM's: each part tells the usage so far."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[bool, says("Needs include_usage=true.")] | None = None
    include_obfuscation: Annotated[bool | None, NOT_TRUE] = None


class Sampling(Strict, kw_only=True):
    """SamplingParams under their own names; None is the default. A test holds them equal."""

    n: Annotated[int, within("n", "Above 1 needs a temperature above 0.")] | None = None
    best_of: (
        Annotated[int, within("best_of", "At least n; above 1 needs a temperature above 0.")] | None
    ) = None
    temperature: Annotated[float, TEMPERATURE] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    top_k: Annotated[int, within("top_k")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    typical_p: Annotated[float, within("typical_p")] | None = None
    top_n_sigma: Annotated[float, within("top_n_sigma")] | None = None
    xtc_probability: Annotated[float, within("xtc_probability")] | None = None
    xtc_threshold: Annotated[float, within("xtc_threshold")] | None = None
    repetition_penalty: Annotated[float, within("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, within("frequency_penalty")] | None = None
    dry_multiplier: Annotated[float, within("dry_multiplier")] | None = None
    dry_base: Annotated[float, within("dry_base")] | None = None
    dry_allowed_length: Annotated[int, within("dry_allowed_length")] | None = None
    dry_range: Annotated[int, within("dry_range")] | None = None
    dry_sequence_breakers: (
        Annotated[
            list[Annotated[str, text("dry_sequence_breakers")]], entries("dry_sequence_breakers")
        ]
        | None
    ) = None
    no_repeat_ngram_size: Annotated[int, within("no_repeat_ngram_size")] | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, TOKEN_KEYS], Annotated[float, within("logit_bias")]], BIASES]
        | None
    ) = None
    bad_words: Annotated[list[Annotated[str, text("bad_words")]], entries("bad_words")] | None = (
        None
    )
    allowed_token_ids: (
        Annotated[
            list[Annotated[int, within("allowed_token_ids")]], entries("allowed_token_ids", 1)
        ]
        | None
    ) = None
    seed: Annotated[int, within("seed")] | None = None
    stop: Stop | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, within("stop_token_ids")]], entries("stop_token_ids")] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, within("min_tokens", "At most max_tokens.")] | None = None
    max_tokens: (
        Annotated[
            int, within("max_tokens", "0 needs prompt_logprobs, or an echo where there is one.")
        ]
        | None
    ) = None
    truncate_prompt_tokens: Annotated[int, within("truncate_prompt_tokens")] | None = None
    prompt_logprobs: Annotated[int, within("prompt_logprobs")] | None = None
    skip_special_tokens: bool | None = None
    keep_special_tokens: (
        Annotated[list[Annotated[str, text("keep_special_tokens")]], Meta(max_length=MAX_KEPT)]
        | None
    ) = None


class Common(Sampling, kw_only=True):
    """What chat and plain completions share beside sampling."""

    model: str
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, says("Needs stream=true.")] = None
    user: str | None = None
    # engineroom's own
    priority: Priority = 0
    timeout_ms: Timeout | None = None
    cache_salt: str | None = None
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    # The form of the output: OpenAI's way to say it, and ours.
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[StructuredOutputs | None, says("Not beside response_format.")] = (
        None
    )
    receipt: Annotated[bool, says("Of one prompt, and not beside stream=true.")] | None = None


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, says("At least one token.")]
        | Annotated[list[str | int | list[int]], prompts()]
    )
    echo: bool | None = None
    logprobs: Annotated[int, within("logprobs")] | None = None
    suffix: Annotated[str, says("Not supported: leave it out.", maxLength=0)] | None = None


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: (
        Annotated[int, within("max_tokens", "The newer name of max_tokens: give one.")] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, within("logprobs", "Needs logprobs=true.")] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: Annotated[list[Tool], TOOLS] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Read, and refused by name where they ask for something (see requests.py).
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class EmbeddingRequest(Strict, kw_only=True):
    """POST /v1/embeddings."""

    input: (
        Annotated[str, says("At least one token.")]
        | Annotated[list[str | int | list[int]], prompts(MAX_INPUTS)]
    )
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, says("At most the width of the served model.", minimum=1)] | None = (
        None
    )
    user: str | None = None
    # engineroom's own
    truncate_prompt_tokens: Annotated[int, within("truncate_prompt_tokens")] | None = None
    priority: Priority = 0
    timeout_ms: Timeout | None = None
    request_id: RequestId | None = None


class TokenizeRequest(Strict, kw_only=True):
    """POST /tokenize: a text, or messages as the chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None
