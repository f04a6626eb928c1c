"""Every refusal: its status, code, the field that it names; and that each code has been met."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engineroom.engine.config import ConfigError
from engineroom.engine.serve.errors import ERRORS, RETRY_AFTER_S, ApiError
from engineroom.engine.serve.settings import ServeConfig

from .conftest import Running
from .http import ask, chat, completion, get, post

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
REFUSALS: list[tuple[str, Any, str, str | None]] = [
    (CHAT, b"{", "invalid_json", None),
    (CHAT, b"\xff", "invalid_json", None),
    (CHAT, b'{"documents":[' + b'{"a":' * 100_000, "invalid_json", None),
    (CHAT, chat(foo=1), "invalid_value", "foo"),
    (CHAT, {"model": "fake"}, "invalid_value", "messages"),
    (CHAT, chat(messages=[]), "invalid_value", "messages"),
    (CHAT, chat(messages=[{"role": "robot", "content": ""}]), "invalid_value", "messages[0].role"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (CHAT, chat(temperature="hot"), "invalid_value", "temperature"),
    (CHAT, chat(temperature=-1), "invalid_value", "temperature"),
    (CHAT, chat(logprobs=True, top_logprobs=99), "invalid_value", "top_logprobs"),
    (CHAT, chat(top_logprobs=2), "invalid_value", "top_logprobs"),
    (CHAT, chat(max_tokens=1, max_completion_tokens=2), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=-1), "invalid_value", "max_tokens"),
    (CHAT, chat(max_completion_tokens=-1), "invalid_value", "max_completion_tokens"),
    (CHAT, chat(stream_options={}), "invalid_value", "stream_options"),
    (CHAT, chat(store=True), "unsupported", "store"),
    (CHAT, chat(modalities=["audio"]), "unsupported", "modalities"),
    (CHAT, chat(service_tier="priority"), "unsupported", "service_tier"),
    (CHAT, chat("hostile"), "chat_template", None),
    (CHAT, chat(model="gpt-4"), "model_not_found", "model"),
    (PLAIN, completion("refuse: it"), "context_length_exceeded", None),
    (PLAIN, completion(suffix="x"), "unsupported", "suffix"),
    (PLAIN, completion([]), "prompt_empty", "prompt"),
    (PLAIN, completion([1, "a"]), "invalid_value", "prompt"),
    (PLAIN, completion([1, -1]), "token_id", None),
    (PLAIN, completion("raise: it"), "engine_error", None),
    (PLAIN, completion("bug: it"), "engine_error", None),
    ("/detokenize", {"tokens": [10**6]}, "token_id", None),
    ("/detokenize", {"tokens": [2**64]}, "invalid_value", "tokens[0]"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"text": "a"}]}]), "invalid_value", None),
    ("/tokenize", {}, "invalid_value", "prompt"),
]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"), REFUSALS, ids=[f"{i}-{r[2]}" for i, r in enumerate(REFUSALS)]
)
def test_a_refusal_names_what_is_wrong(
    serving: Any, server: Running, path: str, body: Any, code: str, param: str | None
) -> None:
    # A step that raises ends the fake's engine, so it gets a server of its own.
    running = serving() if code == "engine_error" and "raise" in str(body) else server
    answer = post(running, path, body)
    if running is not server:
        assert answer.error["code"] in ("engine_down", "engine_error")
        return
    row = ApiError(code, "").row
    assert (answer.status, answer.error["code"]) == (row.status, code), answer.body
    assert answer.error["type"] == row.type
    if param is not None:
        assert answer.error["param"] == param
    assert len(answer.error["message"]) > 10


def test_what_is_no_route(server: Running) -> None:
    assert get(server, "/nope").error["code"] == "not_found"
    refused = get(server, CHAT)
    assert refused.error["code"] == "method_not_allowed" and refused.headers["allow"] == "POST"
    answer = post(server, CHAT, chat(), {"Content-Type": "text/plain"})
    assert answer.error["code"] == "unsupported_media_type"


def test_limits_of_size(serving: Any) -> None:
    running = serving(max_body_bytes=2000, max_header_bytes=1024)
    assert post(running, CHAT, chat("x" * 2000)).error["code"] == "body_too_large"
    assert get(running, "/health", {"X-Long": "x" * 1500}).error["code"] == "header_too_large"
    with pytest.raises(ConnectionError):  # collected no further
        get(running, "/health", {f"X-{i}": "x" * 1000 for i in range(50)})
    assert get(running, "/health").status == 200


def test_a_foreign_host_is_refused(serving: Any) -> None:
    running = serving(allowed_hosts=("llm.example.org",))
    for host in ("evil.example.com", "localhost.evil.com", ""):
        assert get(running, "/health", {"Host": host}).error["code"] == "host_not_allowed"
    for host in ("localhost:9", "127.0.0.1", "[::1]:8000", "LLM.example.org", "10.0.0.7:80"):
        assert get(running, "/health", {"Host": host}).status == 200, host


def test_no_other_site_may_call(serving: Any, server: Running) -> None:
    origin = {"Origin": "https://app.example.org"}
    assert "access-control-allow-origin" not in get(server, "/v1/models", origin).headers
    running = serving(cors_origins=("https://app.example.org",))
    answer = ask(running, "OPTIONS", CHAT, None, origin)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"


def test_every_route_but_health_wants_the_key(serving: Any) -> None:
    from engineroom.engine.serve.openapi import OPERATIONS

    running = serving(api_keys=("sesame-sesame", "open-open-open"))
    for op in OPERATIONS:
        path = op.path.replace("{model:path}", "fake")
        status = ask(running, op.method, path, {} if op.body else None).status
        assert (status != 401) == path.startswith("/health"), path
    for headers in (
        {"Authorization": "Bearer open-open-open"},
        {"Authorization": "bearer sesame-sesame"},
        {"x-api-key": "sesame-sesame"},
        {"Authorization": "Basic eDpzZXNhbWUtc2VzYW1l"},  # x:sesame-sesame
    ):
        assert get(running, "/v1/models", headers).status == 200
    for headers in (
        {"Authorization": "Bearer sesame-sesam"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic !!"},
        {"x-api-key": ""},
    ):
        answer = get(running, "/v1/models", headers)
        assert answer.error["code"] == "invalid_api_key" and "www-authenticate" in answer.headers


def test_options_that_would_let_strangers_in() -> None:
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        ServeConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="at least 8"):
        ServeConfig(api_keys=("short",))
    with pytest.raises(ConfigError, match="port must be"):
        ServeConfig(port=70_000)
    assert ServeConfig(host="0.0.0.0", api_keys=("long-enough",)).api_keys


def test_the_table_of_errors() -> None:
    assert len({row.code for row in ERRORS}) == len(ERRORS)
    assert set(RETRY_AFTER_S) <= {row.code for row in ERRORS if row.status in (429, 503)}


def test_the_document_knows_every_route(server: Running) -> None:
    document = get(server, "/openapi.json").json
    assert document["openapi"] == "3.1.0" and "/v1/models/{model}" in document["paths"]
    references = json.dumps(document).split('"#/components/schemas/')[1:]
    assert {r.partition('"')[0] for r in references} <= set(document["components"]["schemas"])


def test_a_waiting_request_that_gave_its_place_to_another_key_s(
    serving: Callable[..., Running],
) -> None:
    running, answers = serving(), []
    waits = completion("slow: it waits", max_tokens=4000, request_id="waits")
    thread = threading.Thread(target=lambda: answers.append(post(running, PLAIN, waits)))
    thread.start()
    running.wait_until(lambda: running.service.num_live == 1)
    assert post(running, PLAIN, completion("displace:cmpl-waits", max_tokens=1)).status == 200
    thread.join(10)
    (answer,) = answers
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    assert "retry-after" in answer.headers
