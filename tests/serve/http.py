"""HTTP as a client without manners speaks it: one request on a connection of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .conftest import Running


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the [DONE] that it must end with."""
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == "" and parts[-2] == "data: [DONE]", parts[-2:]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def ask(
    running: Running,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """A JSON body is sent as such; bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    sent = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
    with contextlib.closing(connection):
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        data = response.read()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, data)


def post(running: Running, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
    return ask(running, "POST", path, body, headers)


def get(running: Running, path: str, headers: dict[str, str] | None = None) -> Answer:
    return ask(running, "GET", path, None, headers)


@contextlib.contextmanager
def streaming(running: Running, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
    """An open stream, whose connection is closed where the caller leaves."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(
            "POST",
            path,
            json.dumps({**body, "stream": True}),
            {"Content-Type": "application/json"},
        )
        yield connection.getresponse()


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}


def completion(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": text, **fields}
