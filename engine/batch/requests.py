"""A request, and a line of OpenAI's batch format as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.checks import as_prompt
from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from ..core.structured import StructuredOutput
from ..load.mapped import CheckpointError
from ..load.strict_json import parse_object
from .errors import LineError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
_MAX_ID = 512  # characters of a custom_id
_SAMPLING = {f.name for f in dataclasses.fields(SamplingParams)} - {"logits_processor"}
_ONCE = {"model", "user", "metadata", "stream", "store"}  # known, and without influence
_FIELDS = {
    COMPLETIONS: _SAMPLING | _ONCE | {"prompt", "response_format"},
    CHAT: (_SAMPLING - {"echo"})
    | _ONCE
    | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "chat_template_kwargs",
        "response_format",
    },
    EMBEDDINGS: _ONCE | {"input", "encoding_format", "dimensions", "truncate_prompt_tokens"},
}


@dataclass(frozen=True, slots=True)
class Vector:
    """The form of an embedding. dimensions: None is all."""

    dimensions: int | None = None
    as_base64: bool = False


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request. Either `prompt` (text or token ids) or `messages` and `template` are given.

    vector: what is wanted is the prompt's embedding, in this form.
    """

    custom_id: str
    url: str
    params: SamplingParams
    prompt: str | list[int] = ""
    messages: tuple[dict[str, Any], ...] = ()
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vector: Vector | None = None

    @property
    def text(self) -> str:
        """What requests are put in order by: equal beginnings are shared prefixes."""
        if self.messages:
            return "\0".join(f"{m['role']}\0{m['content']}" for m in self.messages)
        if isinstance(self.prompt, str):
            return self.prompt
        return "".join(map(chr, (min(t, 0x10FFFF) for t in self.prompt)))


def check_id(custom_id: Any) -> str:
    """Errors: LineError."""
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        raise LineError(f"custom_id must be a text of 1 to {_MAX_ID} characters", field="custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise LineError("custom_id has a lone surrogate", field="custom_id") from None
    return custom_id


def from_json(
    line: bytes, params: SamplingParams, models: frozenset[str], only: str | None = None
) -> BatchRequest:
    """A line of OpenAI's batch format; what its body leaves out comes from `params`.

    models: the names that a body may call the model by. only: the url that it must have, where one
    is given. Errors: LineError.
    """
    try:
        value = parse_object(line, "the line")
    except CheckpointError as error:
        raise LineError(str(error)) from None
    custom_id = check_id(value.get("custom_id"))
    try:
        if only is not None and value.get("url") != only:
            raise LineError(f"url must be the batch's endpoint, {only}", field="url")
        return _request(value, custom_id, params, models)
    except LineError as error:
        error.custom_id = custom_id
        raise
    except ParameterError as error:
        raise LineError(str(error), field=error.field, custom_id=custom_id) from None


def _request(
    value: Mapping[str, Any], custom_id: str, params: SamplingParams, models: frozenset[str]
) -> BatchRequest:
    for name in value:
        if name not in ("custom_id", "method", "url", "body"):
            raise LineError(f"unknown field {name[:64]!r} beside custom_id, method, url and body")
    if value.get("method", "POST") != "POST":
        raise LineError("method must be POST", field="method")
    url, body = value.get("url"), value.get("body")
    if not isinstance(url, str) or url not in _FIELDS:
        raise LineError(f"url must be one of {', '.join(_FIELDS)}", field="url")
    if not isinstance(body, dict):
        raise LineError("body must be an object", field="body")
    body = {name: field for name, field in body.items() if field is not None}
    for name in body:
        if name not in _FIELDS[url]:
            raise LineError(f"body.{name[:64]}: not supported in a batch to {url}", field=name)
    if body.get("stream") or body.get("store"):
        raise LineError("stream and store must be false: a batch has one file", field="stream")
    if body.get("model", "") not in models | {""}:
        known = ", ".join(sorted(models))
        raise LineError(f"body.model is not the model that was loaded ({known})", field="model")
    if url == COMPLETIONS:
        changes = {name: body[name] for name in _SAMPLING & body.keys()} | _form(body)
        if body.get("echo") and "logprobs" in body:
            changes.setdefault("prompt_logprobs", body["logprobs"])
        prompt = _prompt(body, "prompt")
        return BatchRequest(custom_id, url, params.replace(**changes), prompt)
    if url == EMBEDDINGS:
        return _embedding(body, custom_id)
    return BatchRequest(
        custom_id,
        url,
        params.replace(**_chat_changes(body)),
        messages=_messages(body.get("messages")),
        template=_template(body.get("chat_template_kwargs", {})),
    )


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's `response_format` as our parameter. Errors: LineError."""
    asked = body.get("response_format")
    if asked is None:
        return {}
    if "structured" in body:
        raise LineError("give response_format or structured, not both", field="response_format")
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text" and len(asked) == 1:
        return {}
    if kind == "json_object" and len(asked) == 1:
        return {"structured": StructuredOutput(json_object=True)}
    named = asked.get("json_schema") if kind == "json_schema" else None
    if not isinstance(named, dict) or len(asked) != 2:
        raise LineError(
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}',
            field="response_format",
        )
    if unknown := named.keys() - {"name", "schema", "description", "strict"}:
        raise LineError(
            f"response_format.json_schema has no {min(unknown)[:64]!r}", field="response_format"
        )
    return {"structured": StructuredOutput(json_schema=json.dumps(named.get("schema", {})))}


def _chat_changes(body: Mapping[str, Any]) -> dict[str, Any]:
    changes = {name: body[name] for name in _SAMPLING & body.keys()} | _form(body)
    if "max_completion_tokens" in body:
        most = body["max_completion_tokens"]
        if changes.setdefault("max_tokens", most) != most:
            raise LineError(
                "max_tokens and max_completion_tokens are the same thing; give one",
                field="max_completion_tokens",
            )
    wanted = changes.pop("logprobs", False)
    if not isinstance(wanted, bool):
        raise LineError("logprobs must be true or false in chat", field="logprobs")
    if wanted:
        changes["logprobs"] = body.get("top_logprobs", 0)
    elif "top_logprobs" in body:
        raise LineError("top_logprobs needs logprobs=true", field="top_logprobs")
    return changes


def _embedding(body: Mapping[str, Any], custom_id: str) -> BatchRequest:
    form, dimensions = body.get("encoding_format", "float"), body.get("dimensions")
    if form not in ("float", "base64"):
        raise LineError("encoding_format must be float or base64", field="encoding_format")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise LineError("dimensions must be a number from 1 up", field="dimensions")
    return BatchRequest(
        custom_id,
        EMBEDDINGS,
        SamplingParams(truncate_prompt_tokens=body.get("truncate_prompt_tokens")),
        _prompt(body, "input"),
        vector=Vector(dimensions, form == "base64"),
    )


def _prompt(body: Mapping[str, Any], name: str) -> str | list[int]:
    prompt = body.get(name)
    if not isinstance(prompt, str) and name == "input" and not isinstance(prompt, list):
        raise LineError("input must be one text or one list of token ids", field=name)
    if isinstance(prompt, list) and not all(type(t) is int for t in prompt):
        raise LineError(
            f"{name} must be one text or one list of token ids; give each its own line",
            field=name,
        )
    checked = as_prompt(prompt)
    return checked if isinstance(checked, str) else list(checked)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise LineError("messages must be a list of at least one message", field="messages")
    return tuple([_message(message) for message in value])


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError("a message must be an object with a role", field="messages")
    content = message.get("content") or ""
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) < len(content):
            raise LineError("content may have parts of text alone", field="messages")
        content = "".join(parts)
    if not isinstance(content, str):
        raise LineError("content must be a text or a list of parts of text", field="messages")
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}


def _template(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineError("chat_template_kwargs must be an object", field="chat_template_kwargs")
    return value


__all__ = ["CHAT", "COMPLETIONS", "BatchRequest", "Vector", "check_id", "from_json"]
