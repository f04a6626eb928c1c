"""Every error that the server answers with: one table, its envelope, and what maps onto it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ..async_llm import EngineDeadError, EngineError, EngineStartError, RequestRefused
from ..core.checks import AdmissionError
from ..core.parameter import ParameterError


@dataclass(frozen=True)
class ErrorRow:
    """One row of docs/server.md. `type` is OpenAI's class of error."""

    code: str
    status: int
    type: str
    meaning: str
    mend: str


_REQUEST, _AUTH, _LIMIT, _SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
ERRORS = (
    ErrorRow("invalid_json", 400, _REQUEST, "the body is no JSON", "send a JSON object"),
    ErrorRow(
        "invalid_value",
        400,
        _REQUEST,
        "a field is unknown, missing, or of a wrong type or value",
        "the message and `param` name it; /openapi.json has every field",
    ),
    ErrorRow(
        "unsupported",
        400,
        _REQUEST,
        "a field asks for what this server does not do",
        "leave it out; the message says what there is instead",
    ),
    ErrorRow(
        "context_length_exceeded",
        400,
        _REQUEST,
        "prompt and max_tokens exceed the context",
        "a shorter prompt, fewer tokens, or truncate_prompt_tokens",
    ),
    ErrorRow(
        "never_fits",
        400,
        _REQUEST,
        "the request needs more KV cache than there is",
        "a shorter request, or serve with a larger --memory-budget",
    ),
    ErrorRow("prompt_empty", 400, _REQUEST, "the prompt has no tokens", "give some text"),
    ErrorRow(
        "token_id",
        400,
        _REQUEST,
        "a token id lies outside the model's vocabulary",
        "the message names the id and the range",
    ),
    ErrorRow(
        "chat_template",
        400,
        _REQUEST,
        "the model has no chat template, or its template refuses the messages",
        "the message has the template's words; a base model has /v1/completions alone",
    ),
    ErrorRow(
        "deadline",
        400,
        _REQUEST,
        "timeout_ms is too short for what was asked",
        "a longer timeout_ms, or fewer requests at once",
    ),
    ErrorRow(
        "storage_off",
        400,
        _REQUEST,
        "files and batches need a folder to be kept in, and this server has none",
        "serve with --data-dir FOLDER",
    ),
    ErrorRow(
        "invalid_api_key",
        401,
        _AUTH,
        "no API key, or one that this server does not know",
        "send `Authorization: Bearer KEY` or `x-api-key: KEY`",
    ),
    ErrorRow(
        "host_not_allowed",
        403,
        _AUTH,
        "the Host header names a host that this server does not answer for",
        "use its address, or serve with --allowed-hosts NAME",
    ),
    ErrorRow(
        "model_not_found",
        404,
        _REQUEST,
        "no model by that name is served",
        "/v1/models lists the name",
    ),
    ErrorRow(
        "not_found",
        404,
        _REQUEST,
        "no such path, or no file or batch of this key's by that id",
        "/openapi.json lists the paths; GET /v1/files and /v1/batches the ids",
    ),
    ErrorRow(
        "method_not_allowed", 405, _REQUEST, "the path has no such method", "see /openapi.json"
    ),
    ErrorRow(
        "duplicate_id", 409, _REQUEST, "a request with this id runs already", "choose another id"
    ),
    ErrorRow(
        "conflict",
        409,
        _REQUEST,
        "the batch is over already",
        "GET /v1/batches/ID has its status",
    ),
    ErrorRow(
        "storage_full",
        413,
        _REQUEST,
        "the files of this key would exceed what they may take",
        "delete files, or serve with a larger --max-storage-bytes",
    ),
    ErrorRow(
        "body_too_large",
        413,
        _REQUEST,
        "the body exceeds the limit",
        "a shorter request, or serve with a larger --max-body-bytes (of files: --max-file-bytes)",
    ),
    ErrorRow(
        "unsupported_media_type",
        415,
        _REQUEST,
        "the body is not declared as JSON",
        "send `Content-Type: application/json`",
    ),
    ErrorRow(
        "queue_full",
        429,
        _LIMIT,
        "too many requests wait already",
        "try again after Retry-After seconds, or serve with a larger --max-waiting",
    ),
    ErrorRow(
        "header_too_large", 431, _REQUEST, "the headers exceed the limit", "send fewer or shorter"
    ),
    ErrorRow(
        "engine_error",
        500,
        _SERVER,
        "the engine ended this request with an error; others go on",
        "the server's log has the cause",
    ),
    ErrorRow(
        "internal_error", 500, _SERVER, "an error that was not foreseen: a bug", "report the log"
    ),
    ErrorRow(
        "draining",
        503,
        _SERVER,
        "the server is ending and takes no more requests",
        "ask another instance, or again after Retry-After seconds",
    ),
    ErrorRow(
        "engine_down",
        503,
        _SERVER,
        "the engine's process has ended; a new one is being started",
        "try again after Retry-After seconds",
    ),
    ErrorRow("loading", 503, _SERVER, "the model is still being loaded", "wait for /health/ready"),
)
_ROWS = {row.code: row for row in ERRORS}
RETRY_AFTER_S = {"queue_full": 1, "draining": 30, "engine_down": 5, "loading": 5}


class ApiError(Exception):
    """An answer that is an error. `param` is the field at fault, where it is one."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.row = _ROWS[code]
        self.param = param
        self._headers = headers or {}

    @property
    def status(self) -> int:
        return self.row.status

    @property
    def headers(self) -> dict[str, str]:
        headers = dict(self._headers)
        if self.row.code in RETRY_AFTER_S:
            headers["retry-after"] = str(RETRY_AFTER_S[self.row.code])
        if self.row.code == "invalid_api_key":
            headers["www-authenticate"] = 'Bearer, Basic realm="engineroom", charset="UTF-8"'
        return headers

    def envelope(self) -> dict[str, object]:
        """OpenAI's form."""
        return {
            "error": {
                "message": str(self),
                "type": self.row.type,
                "param": self.param,
                "code": self.row.code,
            }
        }


_ADMISSION = {
    "context_length": "context_length_exceeded",
    "never_fits": "never_fits",
    "queue_full": "queue_full",
    "prompt_empty": "prompt_empty",
    "token_id": "token_id",
    "duplicate_id": "duplicate_id",
}
_OF_THE_PROMPT = ("prompt_empty", "token_id")


def as_api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError | None:
    """What to answer for an exception; None for one that was not foreseen.

    `names`: what a parameter of ours is called in the caller's request, where that differs.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, msgspec.ValidationError):
        return invalid(error)
    if isinstance(error, ParameterError):
        param = (names or {}).get(error.field, error.field)
        return ApiError("invalid_value", str(error), param=param)
    if isinstance(error, AdmissionError):
        prompt = (names or {}).get("prompt", "prompt")
        at_fault = prompt if error.code in _OF_THE_PROMPT else None
        return ApiError(_ADMISSION[error.code], str(error), param=at_fault)
    if isinstance(error, RequestRefused):
        code = "chat_template" if error.kind == "TemplateError" else "invalid_value"
        return ApiError(code, str(error), param=error.field or None)
    if isinstance(error, EngineDeadError | EngineStartError):
        return ApiError("engine_down", str(error))
    if isinstance(error, EngineError):
        return ApiError("engine_error", str(error))
    return None


_AT = re.compile(r"^(?P<what>.*) - at (?:`key` in )?`\$(?P<path>.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>.*)`", re.DOTALL)


def invalid(error: msgspec.ValidationError) -> ApiError:
    """msgspec's "... - at `$.messages[0].role`" as a message with a `param`."""
    text = str(error)
    match = _AT.match(text)
    path = ""
    if match is not None:
        text = match["what"]
        path = match["path"].lstrip(".").replace("[...]", "")
    named = _UNKNOWN.search(text) or _MISSING.search(text)
    if named is not None:
        path = f"{path}.{named['name']}".lstrip(".")
    where = f" (at {path})" if path and path not in text else ""
    return ApiError("invalid_value", f"{text}{where}", param=path or None)


__all__ = ["ERRORS", "RETRY_AFTER_S", "ApiError", "ErrorRow", "as_api_error", "invalid"]
