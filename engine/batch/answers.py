"""A finished request as its line of the output: OpenAI's result format, and nothing that a second
run could not repeat: no clock, no cache, no timing."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from ..core.answers import CompletionOutput, Logprob, RequestOutput
from ..core.vectors import handed_out
from .errors import LineError
from .requests import CHAT, BatchRequest, Vector


class Lines:
    """Makes lines. `digest` is the manifest's, from which ids and seeds derive."""

    def __init__(self, digest: bytes, model: str) -> None:
        self._digest = digest
        self._model = model

    def seed(self, custom_id: str) -> int:
        """The seed of a request that names none: the same whenever it runs."""
        return int.from_bytes(self._hash(b"seed", custom_id)[:8], "little")

    def answer(
        self, request: BatchRequest, output: RequestOutput, receipt: Any | None = None
    ) -> bytes:
        """The line of a request that was answered, with its receipt where there is one.

        Errors: LineError; ValueError for an embedding that is none.
        """
        if request.vector is not None:
            return self._line(request.custom_id, 200, self._embedding(request.vector, output))
        chat = request.url == CHAT
        make = _chat_choice if chat else _completion_choice
        usage = output.usage
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._name(request.custom_id)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": self._model,
            "choices": [make(request, output, c) for c in output.outputs],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if chat and output.prompt_logprobs is not None:
            body["prompt_logprobs"] = [_row(row) for row in output.prompt_logprobs]
        if receipt is not None:
            body["receipt"] = receipt
        return self._line(request.custom_id, 200, body)

    def _embedding(self, form: Vector, output: RequestOutput) -> dict[str, Any]:
        unit, tokens = output.embedding or (), output.usage.prompt_tokens
        if not unit or not all(map(math.isfinite, unit)):
            raise ValueError("the model's hidden states of the input are not finite numbers")
        wanted = len(unit) if form.dimensions is None else form.dimensions
        if wanted > len(unit):
            raise LineError(
                f"dimensions={wanted}, and the model has {len(unit)}", field="dimensions"
            )
        vector = handed_out(unit, wanted, as_base64=form.as_base64)
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def refusal(self, custom_id: str | None, place: int, message: str, field: str) -> bytes:
        """The line of a bad line (the `place`th) or of a request that the engine refused."""
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": field or None,
            "code": "invalid_request",
        }
        return self._line(custom_id, 400, {"error": error}, place)

    def failure(self, custom_id: str, message: str) -> bytes:
        """The line of a request that ended with an error inside the engine."""
        error = {"message": message, "type": "server_error", "param": None, "code": "failed"}
        return self._line(custom_id, 500, {"error": error})

    def _line(self, custom_id: str | None, status: int, body: Any, place: int = 0) -> bytes:
        name = self._name(custom_id if custom_id is not None else f"\0{place}")
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        value = {
            "id": f"batch_req_{name}",
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    def _name(self, custom_id: str) -> str:
        return self._hash(b"id", custom_id)[:12].hex()

    def _hash(self, purpose: bytes, custom_id: str) -> bytes:
        return hashlib.sha256(self._digest + purpose + b"\0" + custom_id.encode()).digest()


def _ending(c: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": c.finish_reason, "stop_reason": c.stop_reason, "seed": c.seed}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no -inf


def _ranked(row: dict[int, Logprob], most: int) -> list[Logprob]:
    return sorted(row.values(), key=lambda p: p.rank)[:most]


def _row(row: dict[int, Logprob] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        str(token): {
            "logprob": _number(p.logprob),
            "rank": p.rank,
            "decoded_token": p.decoded_token,
        }
        for token, p in row.items()
    }


def _chat_choice(request: BatchRequest, output: RequestOutput, c: CompletionOutput) -> Any:
    def entry(p: Logprob) -> dict[str, Any]:
        text = p.decoded_token
        # A part of a character has no bytes of its own, and OpenAI's field may be null.
        spelt = None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass"))
        return {"token": text, "logprob": _number(p.logprob), "bytes": spelt}

    logprobs = None
    if c.logprobs is not None:
        most = request.params.logprobs or 0
        content = [
            {**entry(row[token]), "top_logprobs": [entry(p) for p in _ranked(row, most)]}
            for token, row in zip(c.token_ids, c.logprobs, strict=True)
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": c.text, "refusal": None}
    return {"index": c.index, "message": message, "logprobs": logprobs, **_ending(c)}


def _completion_choice(request: BatchRequest, output: RequestOutput, c: CompletionOutput) -> Any:
    logprobs = None
    if c.logprobs is not None:
        logprobs = _completion_logprobs(request, output, c)
    return {"index": c.index, "text": c.text, "logprobs": logprobs, **_ending(c)}


def _completion_logprobs(request: BatchRequest, output: RequestOutput, c: CompletionOutput) -> Any:
    """OpenAI's older form: parallel lists, one entry a token, an echoed prompt's first."""
    pairs: list[tuple[int, dict[int, Logprob] | None]] = []
    if request.params.echo:
        rows = output.prompt_logprobs or (None,) * len(output.prompt_token_ids)
        pairs += zip(output.prompt_token_ids, rows, strict=True)
    pairs += zip(c.token_ids, c.logprobs or (), strict=True)
    most = request.params.logprobs or 0
    tokens = ["" if row is None else row[token].decoded_token for token, row in pairs]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    tops = [
        None if row is None else {p.decoded_token: _number(p.logprob) for p in _ranked(row, most)}
        for _, row in pairs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [
            None if row is None else _number(row[token].logprob) for token, row in pairs
        ],
        "top_logprobs": tops if most else None,
        "text_offset": offsets,
    }


__all__ = ["Lines"]
