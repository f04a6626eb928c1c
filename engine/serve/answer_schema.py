"""What OpenAI's interface answers, as plain structs.

Source: the OpenAI API reference (chat completions, completions, models, embeddings).
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from .schema import FunctionCall


class TokenDetails(Struct):
    cached_tokens: int


class CompletionDetails(Struct):
    reasoning_tokens: int


class Cost(Struct):
    """engineroom's own: energy, and what it comes to where prices are configured, else null."""

    joules: float
    money: float | None
    grams: float | None
    estimated: bool


class Usage(Struct):
    """Tokens of a request. cached_tokens were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    cost: Cost | UnsetType = UNSET
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class Timings(Struct):
    """engineroom's own: where the time of a request went, in milliseconds."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float
    time_to_first_token_ms: float | None
    per_token_ms: float | None  # decode, a token after the first


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerCall(Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class AnswerMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    seed: int
    token_ids: tuple[int, ...] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET  # whether the text is whole in the form asked for


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    prompt_logprobs: Any = UNSET
    receipt: Any = UNSET  # what `engineroom replay` repeats it from; null: it was cut short
    system_fingerprint: str


class FunctionDelta(Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, kw_only=True):
    """The beginning of a call has id, type and name; its arguments follow in pieces."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class Delta(Struct, kw_only=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET  # whether the text is whole in the form asked for


class ChatChunk(Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET


class CompletionLogprobs(Struct):
    """OpenAI's older form: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET  # whether the text is whole in the form asked for


class Completion(Struct, kw_only=True):
    """The whole answer, and each part of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    receipt: Any = UNSET


class Embedding(Struct, kw_only=True):
    """Of unit length; base64 of its little-endian float32 values where that was asked for."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "engineroom"
    max_model_len: int
    tool_format: str | None
    reasoning_format: str | None


class ModelList(Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Struct):
    prompt: str
