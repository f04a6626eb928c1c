"""The ASGI application: its routes, and the door that every request comes through."""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import hmac
import ipaddress
import logging
import re
import secrets
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answer_schema, anthropic, responses_input, responses_schema, schema
from .accesslog import access
from .body import read
from .chat import Chat
from .completions import Completions
from .dashboard import snapshot
from .embeddings import Embeddings
from .errors import ApiError, as_api_error
from .metrics import CONTENT_TYPE
from .openapi import OPERATIONS, document
from .page import page
from .requests import CHAT_NAMES, template_messages
from .responses import PATH as RESPONSES
from .responses import Responses
from .service import NOBODY, Caller, Service
from .sse import Disconnected, EventStream, dump, event, unless_gone
from .storage_routes import StorageRoutes
from .tracing import TRACEPARENT

log = logging.getLogger(__name__)
# What a parameter of ours is called in the requests of a path, where that differs.
_NAMES = {
    "/v1/chat/completions": CHAT_NAMES,
    anthropic.PATH: anthropic.NAMES,
    RESPONSES: responses_input.NAMES,
    "/v1/embeddings": {"prompt": "input"},
    "/detokenize": {"prompt": "tokens"},
}
_STATS_SECONDS = 2.0  # what /metrics waits for a step to end


def make_app(service: Service) -> ASGIApp:
    """The application over a service whose keeper is, or will be, started."""
    routes = Routes(service)
    router = Router(
        [Route(op.path, getattr(routes, op.handler), methods=[op.method]) for op in OPERATIONS],
        redirect_slashes=False,
    )
    return Door(router, service)


class Routes(StorageRoutes):
    """One method per operation of openapi.OPERATIONS."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # -------------------------------------------------------------------------- generation

    async def chat_completions(self, request: Request) -> Any:
        body = await read(request, schema.ChatRequest, self._service.settings)
        return await self._answer(request, Chat(self._service, body, _caller(request)), body)

    async def completions(self, request: Request) -> Any:
        body = await read(request, schema.CompletionRequest, self._service.settings)
        call = Completions(self._service, body, _caller(request))
        return await self._answer(request, call, body)

    async def messages(self, request: Request) -> Any:
        body = await read(request, anthropic.MessagesRequest, self._service.settings)
        call = anthropic.Messages(self._service, body, _caller(request))
        return await self._answer(request, call, body)

    async def responses(self, request: Request) -> Any:
        body = await read(request, responses_schema.ResponsesRequest, self._service.settings)
        call = Responses(self._service, body, _caller(request))
        return await self._answer(request, call, body)

    async def count_tokens(self, request: Request) -> Response:
        body = await read(request, anthropic.CountTokensRequest, self._service.settings)
        return _json(await anthropic.count_tokens(self._service, body))

    async def _answer(
        self,
        request: Request,
        call: Chat | Completions | anthropic.Messages | Responses,
        body: schema.Common | anthropic.MessagesRequest | responses_schema.ResponsesRequest,
    ) -> Any:
        if body.stream:
            events = call.events()
            first = await unless_gone(request.receive, anext(events))
            failure = functools.partial(_failure_event, request.scope["path"])
            return EventStream(first, events, failure, call)
        return _json(await unless_gone(request.receive, call.whole()))

    async def embeddings(self, request: Request) -> Response:
        body = await read(request, schema.EmbeddingRequest, self._service.settings)
        call = Embeddings(self._service, body, _caller(request))
        return _json(await unless_gone(request.receive, call.whole()))

    # -------------------------------------------------------------------------- the model

    async def models(self, request: Request) -> Response:
        return _json(answer_schema.ModelList(data=[self._model()]))

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["model"])
        return _json(self._model())

    def _model(self) -> answer_schema.Model:
        info, dialect = self._service.info, self._service.dialect
        return answer_schema.Model(
            id=self._service.model_name,
            created=self._service.created,
            max_model_len=info.config.max_model_len or info.model.max_position,
            tool_format=dialect.tools.name if dialect.tools else None,
            reasoning_format=dialect.reasoning.name if dialect.reasoning else None,
        )

    async def tokenize(self, request: Request) -> Response:
        body = await read(request, schema.TokenizeRequest, self._service.settings)
        self._service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("invalid_value", "give prompt or messages, one of them", param="prompt")
        llm = self._service.keeper.llm
        if body.messages is not None:
            ids = await llm.render_chat(template_messages(body.messages))
        else:
            ids = await llm.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
        answer = answer_schema.Tokens(len(ids), self._model().max_model_len, ids)
        if body.return_token_strs:
            answer.token_strs = [await llm.detokenize([i]) for i in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = await read(request, schema.DetokenizeRequest, self._service.settings)
        self._service.check_model(body.model)
        return _json(
            answer_schema.Detokenized(await self._service.keeper.llm.detokenize(body.tokens))
        )

    # -------------------------------------------------------------------------- the server

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        service = self._service
        if service.draining:
            raise ApiError("draining", "the server is ending and takes no more requests")
        _ = service.keeper.llm
        return _json({"status": "ready"})

    async def health(self, request: Request) -> Response:
        service, keeper = self._service, self._service.keeper
        status = service.status
        report = {
            "status": status,
            "stalled_s": round(keeper.stalled_s, 3),
            "running_requests": service.num_live,
            "engine_restarts": keeper.num_restarts,
        }
        return _json(report, 200 if status in ("ok", "draining") else 503)

    async def page(self, request: Request) -> Response:
        return page("chat")

    async def dashboard(self, request: Request) -> Response:
        return page("dashboard")

    async def dashboard_data(self, request: Request) -> Response:
        answer = _json(snapshot(self._service, await self._stats()))
        answer.headers["cache-control"] = "no-store"
        return answer

    async def _stats(self) -> dict[str, Any] | None:
        keeper = self._service.keeper
        if keeper.is_ready:
            try:
                async with asyncio.timeout(_STATS_SECONDS):
                    return await keeper.llm.stats()
            except Exception:  # a long step or a dying engine: the rest is still worth having
                log.debug("no engine statistics", exc_info=True)
        return None

    async def metrics(self, request: Request) -> Response:
        keeper, stats = self._service.keeper, await self._stats()
        page = self._service.metrics.page(
            stats, ready=keeper.is_ready, restarts=keeper.num_restarts
        )
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        service = self._service
        sizes: tuple[int, ...] = ()
        if service.keeper.is_ready:
            model = service.info.model
            sizes = (model.vocab_size, model.hidden_size)
        return Response(document(service.version, *sizes), media_type="application/json")


# ------------------------------------------------------------------------------------- the door


class Door:
    """Host, key, limits and the log: what every request passes, in this order. Pure ASGI."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        settings = service.settings
        shared = settings.shared_prefix_cache
        self._keys = [
            (key.encode(), Caller.of(key, shared_cache=shared, weight=weight))
            for key, weight in settings.weights.items()
        ]
        self._hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        self._open = {op.path for op in OPERATIONS if op.open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = secrets.token_hex(8)
        status = 0
        headers = _headers(scope)
        cors = self._cors(headers)
        TRACEPARENT.set(headers.get(b"traceparent", b"").decode("latin-1"))

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),  # as Anthropic's clients read it
                    (b"x-content-type-options", b"nosniff"),
                    *cors,
                ]
            await send(message)

        try:
            try:
                caller = self._admit(scope, headers)
                scope.setdefault("state", {})["caller"] = caller
                scope["app"] = self  # the router raises what it cannot route
                if cors and scope["method"] == "OPTIONS":
                    await Response(status_code=204)(scope, receive, sending)
                else:
                    await self._app(scope, receive, sending)
            except Disconnected:
                status = 499
            except Exception as error:
                answer = _as_answer(scope, error)
                if answer is None:
                    log.exception("request %s failed", request_id)
                    answer = ApiError(
                        "internal_error",
                        f"an error that was not foreseen; the server's log has it under "
                        f"{request_id}",
                    )
                if status:  # its beginning is sent: nothing can be said any more
                    raise
                await _error(scope["path"], answer)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", None) or "unknown"
            self._service.metrics.answered(route, status)
            access(scope, request_id, status, time.monotonic() - started)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller:
        size = sum(len(k) + len(v) for k, v in scope["headers"])
        limit = self._service.settings.max_header_bytes
        if size > limit:
            raise ApiError("header_too_large", f"the headers take {size} bytes; at most {limit}")
        self._check_host(headers.get(b"host", b""))
        if not self._keys or scope["path"] in self._open or scope["method"] == "OPTIONS":
            return NOBODY
        given = _given_key(headers)
        found = None
        for key, caller in self._keys:  # all of them: the time tells nothing
            if hmac.compare_digest(key, given):
                found = caller
        if found is None:
            raise ApiError(
                "invalid_api_key",
                "this server wants an API key: send `Authorization: Bearer KEY`"
                if not given
                else "the API key is not known here",
            )
        return found

    def _check_host(self, value: bytes) -> None:
        host = re.sub(r":\d+$", "", value.decode("latin-1")).strip("[]").lower()
        if host in self._hosts:
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            # A page of another site could have its name resolve to this machine (DNS rebinding).
            raise ApiError(
                "host_not_allowed",
                f"this server does not answer for the host {host[:100]!r}; serve with "
                "--allowed-hosts NAME if it should",
            ) from None

    def _cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", b"").decode("latin-1")
        origins = self._service.settings.cors_origins
        if not origin or not (origin in origins or "*" in origins):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (
                b"access-control-allow-headers",
                b"authorization, content-type, x-api-key, anthropic-version",
            ),
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"vary", b"Origin"),
        ]


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _given_key(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request, from whichever header carries one."""
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic":  # what a browser asks its user for: the key is the password
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return headers.get(b"x-api-key", b"")


# --------------------------------------------------------------------------------- the details


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["state"]["caller"]
    return caller


def _json(value: Any, status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")


def _error(path: str, error: ApiError) -> Response:
    body = anthropic.envelope(error) if anthropic.is_ours(path) else error.envelope()
    return Response(dump(body), error.status, error.headers, media_type="application/json")


def _failure_event(path: str, error: Exception) -> bytes:
    """The last event of a stream that failed."""
    answer = as_api_error(error)
    if answer is None:
        log.error("a stream failed", exc_info=error)
        answer = ApiError("internal_error", "an error that was not foreseen; the log has it")
    if anthropic.is_ours(path):
        return event(anthropic.envelope(answer), "error")
    return event(answer.envelope())


def _as_answer(scope: Scope, error: Exception) -> ApiError | None:
    if not isinstance(error, HTTPException):
        return as_api_error(error, _NAMES.get(scope["path"]))
    path = scope["path"][:100]
    if error.status_code == 405:
        text = f"{path!r} has no method {scope['method']}"
        return ApiError("method_not_allowed", text, headers=error.headers)  # Allow
    return ApiError("not_found", f"{path!r}: no such path; /openapi.json lists them")


__all__ = ["Door", "Routes", "make_app"]
