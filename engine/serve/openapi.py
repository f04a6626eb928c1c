"""The operations of the server as data: routes and /openapi.json are made from one table."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from . import (
    answer_schema,
    anthropic,
    batches,
    files,
    requests,
    responses,
    responses_input,
    responses_schema,
    schema,
)
from .dashboard import Snapshot
from .errors import ERRORS
from .query import stated


@dataclass(frozen=True)
class Operation:
    """One method of one path. `open`: no API key is asked for."""

    method: str
    path: str
    handler: str
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    part: type[msgspec.Struct] | None = None  # of a stream, where it also answers as events
    media: str = "application/json"
    takes: str = "application/json"
    open: bool = False
    query: type[msgspec.Struct] | None = None


OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "chat_completions",
        "Answer a conversation",
        schema.ChatRequest,
        answer_schema.ChatCompletion,
        answer_schema.ChatChunk,
    ),
    Operation(
        "POST",
        "/v1/completions",
        "completions",
        "Continue texts",
        schema.CompletionRequest,
        answer_schema.Completion,
        answer_schema.Completion,
    ),
    Operation(
        "POST",
        responses.PATH,
        "responses",
        "Answer a conversation (OpenAI's Responses interface)",
        responses_schema.ResponsesRequest,
        responses_schema.ResponsesAnswer,
        responses_schema.ResponsesEvent,
    ),
    Operation(
        "POST",
        anthropic.PATH,
        "messages",
        "Answer a conversation (Anthropic's interface)",
        anthropic.MessagesRequest,
        anthropic.MessagesAnswer,
        anthropic.MessagesEvent,
    ),
    Operation(
        "POST",
        f"{anthropic.PATH}/count_tokens",
        "count_tokens",
        "Tokens of a conversation (Anthropic's interface)",
        anthropic.CountTokensRequest,
        anthropic.InputTokens,
    ),
    Operation(
        "POST",
        "/v1/embeddings",
        "embeddings",
        "Texts as vectors",
        schema.EmbeddingRequest,
        answer_schema.EmbeddingList,
    ),
    Operation("GET", "/v1/models", "models", "The served model", answer=answer_schema.ModelList),
    Operation("GET", "/v1/models/{model:path}", "model", "One model", answer=answer_schema.Model),
    Operation(
        "POST",
        "/tokenize",
        "tokenize",
        "Text to token ids",
        schema.TokenizeRequest,
        answer_schema.Tokens,
    ),
    Operation(
        "POST",
        "/detokenize",
        "detokenize",
        "Token ids to text",
        schema.DetokenizeRequest,
        answer_schema.Detokenized,
    ),
    Operation(
        "POST",
        "/v1/files",
        "create_file",
        "Keep a file",
        files.FileUpload,
        files.StoredFile,
        takes="multipart/form-data",
    ),
    Operation(
        "GET",
        "/v1/files",
        "files",
        "The kept files",
        answer=files.FileList,
        query=files.FileQuery,
    ),
    Operation("GET", "/v1/files/{file_id}", "file", "One file", answer=files.StoredFile),
    Operation(
        "GET",
        "/v1/files/{file_id}/content",
        "file_content",
        "A file's bytes",
        media="application/octet-stream",
    ),
    Operation(
        "DELETE", "/v1/files/{file_id}", "delete_file", "Drop a file", answer=files.FileDeleted
    ),
    Operation(
        "POST",
        "/v1/batches",
        "create_batch",
        "Answer a file of requests",
        batches.BatchRequest,
        batches.Batch,
    ),
    Operation(
        "GET",
        "/v1/batches",
        "batches",
        "The batches",
        answer=batches.BatchList,
        query=batches.BatchQuery,
    ),
    Operation("GET", "/v1/batches/{batch_id}", "batch", "One batch", answer=batches.Batch),
    Operation(
        "POST",
        "/v1/batches/{batch_id}/cancel",
        "cancel_batch",
        "End a batch with what it has",
        answer=batches.Batch,
    ),
    Operation("GET", "/", "page", "A page to talk to the model", media="text/html"),
    Operation("GET", "/dashboard", "dashboard", "A page that shows the load", media="text/html"),
    Operation("GET", "/dashboard/data", "dashboard_data", "What that page shows", answer=Snapshot),
    Operation("GET", "/health/live", "live", "The server answers", open=True),
    Operation("GET", "/health/ready", "ready", "Requests would be accepted", open=True),
    Operation("GET", "/health", "health", "The engine makes progress", open=True),
    Operation("GET", "/metrics", "metrics", "Prometheus metrics", media="text/plain"),
    Operation("GET", "/openapi.json", "openapi", "This document"),
)


@functools.cache
def document(version: str, vocab_size: int | None = None, hidden_size: int | None = None) -> bytes:
    """OpenAPI 3.1 as JSON. The sizes are of the served model, where it is known already."""
    kinds = {
        kind for op in OPERATIONS for kind in (op.body, op.answer, op.part) if kind is not None
    }
    _, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    components = copy.deepcopy(components)  # parts are the Metas' own
    for kind, refused in (
        (schema.ChatRequest, requests.REFUSED),
        (responses_schema.ResponsesRequest, responses_input.REFUSED),
    ):
        for name, (allowed, why) in refused.items():
            field = components[kind.__name__]["properties"][name]
            kinds = {form.get("type") for form in field.get("anyOf", [field])}
            fitting = [v for v in allowed if not isinstance(v, str) or kinds & {"string", None}]
            field |= {"enum": fitting, "description": f"{why[0].upper()}{why[1:]}."}
    components["TokenizeRequest"]["oneOf"] = [
        {"required": [name], "properties": {name: {"type": kind}}}
        for name, kind in (("prompt", "string"), ("messages", "array"))
    ]
    asked = components["BatchRequest"]["properties"]
    asked["endpoint"]["enum"] = list(batches.ENDPOINTS)
    asked["output_expires_after"] = {"type": "null"}  # all else is refused by name
    components["FileUpload"]["properties"]["file"] = {"type": "string", "format": "binary"}
    if vocab_size is not None:
        for component in components.values():
            _bound_token_ids(component, vocab_size)
    if hidden_size is not None:
        (width, _) = components["EmbeddingRequest"]["properties"]["dimensions"]["anyOf"]
        width["maximum"] = hidden_size
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS:
        paths.setdefault(op.path.replace(":path", ""), {})[op.method.lower()] = _operation(op)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "engineroom",
            "version": version,
            "description": "OpenAI's and Anthropic's interfaces over a local language model.",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "AnthropicError": anthropic.ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(whole)


def _bound_token_ids(value: Any, vocab_size: int) -> None:
    """Say in every schema of a token id within `value` what the model's last one is."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, dict) and value == _TOKEN_ID:
        value["maximum"] = vocab_size - 1
    elif isinstance(inner, list):
        for child in inner:
            _bound_token_ids(child, vocab_size)


_TOKEN_ID = msgspec.json.schema(schema.TokenId)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"enum": [row.code for row in ERRORS]},
            },
        }
    },
}


def _operation(op: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {op.media: {"schema": _ref(op.answer)}}
    if op.part is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    statuses = sorted({row.status for row in ERRORS})
    said: dict[str, Any] = {
        "operationId": op.handler,
        "summary": op.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{str(status): _refusal(op, status) for status in statuses},
        },
        "security": [] if op.open else [{"key": []}, {}],
    }
    if op.body is not None:
        said["requestBody"] = {
            "required": True,
            "content": {op.takes: {"schema": _ref(op.body)}},
        }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", op.path)
    ]
    if op.query is not None:
        parameters += [
            {"name": name, "in": "query", "schema": inner}
            for name, inner in stated(op.query).items()
        ]
    if parameters:
        said["parameters"] = parameters
    return said


def _ref(kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    return {} if kind is None else {"$ref": f"#/components/schemas/{kind.__name__}"}


def _refusal(op: Operation, status: int) -> dict[str, Any]:
    name = "AnthropicError" if anthropic.is_ours(op.path) else "Error"
    codes = ", ".join(row.code for row in ERRORS if row.status == status)
    return {
        "description": codes,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }


__all__ = ["OPERATIONS", "Operation", "document"]
