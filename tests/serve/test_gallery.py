"""The gallery of errors: each code of the table, provoked by a request, in its documented form."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.serve.errors import ERRORS, RETRY_AFTER_S, ErrorRow
from tests.house.tree import ROOT

from .conftest import Running
from .http import Answer, chat, completion, get, post

CHAT, PLAIN, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
FILES = "/v1/files"
Make = Callable[..., Running]
Provoke = Callable[[Running, Make], Answer]


def _asked(path: str, body: Any, headers: dict[str, str] | None = None) -> Provoke:
    return lambda server, make: post(server, path, body, headers)


def _duplicate(server: Running, make: Make) -> Answer:
    body = completion("slow: it", max_tokens=2000, request_id="mine")
    first = threading.Thread(target=post, args=(server, PLAIN, {**body, "timeout_ms": 700}))
    first.start()
    server.wait_until(lambda: server.service.num_live == 1)
    answer = post(server, PLAIN, body)
    first.join(10)
    return answer


def _draining(server: Running, make: Make) -> Answer:
    ending = make(drain_timeout=5.0)
    ending.service.draining = True
    return post(ending, PLAIN, completion())


def _engine_down(server: Running, make: Make) -> Answer:
    dying = make()
    os.kill(dying.service.info.pid, signal.SIGKILL)
    dying.wait_until(lambda: not dying.service.keeper.is_ready)
    return post(dying, PLAIN, completion())


def _unforeseen(server: Running, make: Make) -> Answer:
    broken = make()

    def check_model(name: str | None) -> None:
        raise KeyError("a bug of ours")

    broken.service.check_model = check_model  # type: ignore[method-assign]
    return post(broken, PLAIN, completion())


def upload(running: Running) -> Answer:
    line = {"custom_id": "a", "method": "POST", "url": PLAIN, "body": completion()}
    parts = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B\r\n'
        b'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
        + json.dumps(line).encode()
        + b"\r\n--B--\r\n"
    )
    return post(running, FILES, parts, {"Content-Type": "multipart/form-data; boundary=B"})


def _over(server: Running, make: Make) -> Answer:
    keeping = make(stores=True)
    asked = {
        "input_file_id": upload(keeping).json["id"],
        "endpoint": PLAIN,
        "completion_window": "24h",
    }
    batch = "/v1/batches/" + post(keeping, "/v1/batches", asked).json["id"]
    keeping.wait_until(lambda: get(keeping, batch).json["status"] == "completed")
    return post(keeping, f"{batch}/cancel", {})


GALLERY: dict[str, Provoke] = {
    "invalid_json": _asked(CHAT, b"{"),
    "invalid_value": _asked(CHAT, chat(temperature="hot")),
    "unsupported": _asked(CHAT, chat(store=True)),
    "context_length_exceeded": _asked(PLAIN, completion("refuse: it")),
    "never_fits": _asked(PLAIN, completion("vast: it")),
    "prompt_empty": _asked(PLAIN, completion([])),
    "token_id": _asked(PLAIN, completion([-1])),
    "chat_template": _asked(CHAT, chat("hostile")),
    "deadline": _asked(EMBED, {"model": "fake", "input": "slow: it", "timeout_ms": 20}),
    "storage_off": lambda server, make: get(server, FILES),
    "storage_full": lambda server, make: upload(make(stores=True, max_storage_bytes=1)),
    "conflict": _over,
    "invalid_api_key": lambda server, make: get(make(api_keys=("sesame-sesame",)), "/v1/models"),
    "host_not_allowed": lambda server, make: get(server, "/health", {"Host": "evil.example.com"}),
    "model_not_found": _asked(CHAT, chat(model="other")),
    "not_found": lambda server, make: get(server, "/nope"),
    "method_not_allowed": lambda server, make: get(server, CHAT),
    "duplicate_id": _duplicate,
    "body_too_large": lambda server, make: post(make(max_body_bytes=1024), CHAT, chat("x" * 2000)),
    "unsupported_media_type": _asked(CHAT, chat(), {"Content-Type": "text/plain"}),
    "queue_full": _asked(PLAIN, completion("crowded: it")),
    "header_too_large": lambda server, make: get(
        make(max_header_bytes=1024), "/health", {"X-Long": "x" * 1500}
    ),
    "engine_error": _asked(PLAIN, completion("bug: it")),
    "internal_error": _unforeseen,
    "draining": _draining,
    "engine_down": _engine_down,
    "loading": lambda server, make: post(make("late", wait=False), PLAIN, completion()),
}


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row.code)
def test_every_error_is_met_and_documented(
    row: ErrorRow, server: Running, serving: Make, tmp_path: Path
) -> None:
    assert row.code in GALLERY, "a new error: say here how it is provoked"

    def make(model: str = "fake", *, stores: bool = False, **options: Any) -> Running:
        return serving(model, data_dir=str(tmp_path) if stores else None, **options)

    answer = GALLERY[row.code](server, make)
    assert (answer.status, answer.error["code"]) == (row.status, row.code), answer.body
    assert answer.error["type"] == row.type and len(answer.error["message"]) > 10
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert (row.code in RETRY_AFTER_S) == (row.status in (429, 503))
    expected = str(RETRY_AFTER_S[row.code]) if row.code in RETRY_AFTER_S else None
    assert answer.headers.get("retry-after") == expected
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    assert f"| {row.status} | `{row.code}` | `{row.type}` | {row.meaning} | {row.mend} |" in page


def test_the_gallery_has_no_error_that_is_none() -> None:
    assert GALLERY.keys() == {row.code for row in ERRORS}
