"""Traces: a span of each request, its parts in order, the caller's trace honoured, no text in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engineroom.engine.config import ConfigError
from engineroom.engine.serve.settings import ServeConfig

from .conftest import Running
from .http import completion, post

export = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter",
    reason="opentelemetry's SDK is not installed",
)
PLAIN = "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced(serving: Callable[..., Running]) -> tuple[Running, Any]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from engineroom.engine.serve.tracing import OpenTelemetry

    exporter, provider = export.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    running = serving()
    running.service.traced = OpenTelemetry(provider).ended
    return running, exporter


def spans(running: Running, exporter: Any, number: int) -> dict[str, Any]:
    running.wait_until(lambda: len(exporter.get_finished_spans()) == number)
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_parts(traced: tuple[Running, Any], stream: bool) -> None:
    running, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = completion("a secret", max_tokens=3, stream=stream)
    assert post(running, PLAIN, body, headers).status == 200
    found = spans(running, exporter, 4)
    request = found["request"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",)
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    assert [p.parent.span_id for p in parts] == [request.context.span_id] * 3
    assert [(p.end_time - p.start_time) / 1e9 for p in parts] == [0.0, 0.25, 1.5]  # the fake's
    assert parts[0].start_time == request.start_time
    assert [p.start_time for p in parts[1:]] == [p.end_time for p in parts[:-1]]
    assert "secret" not in "".join(span.to_json() for span in found.values())


def test_a_refused_request_and_a_header_that_is_none(traced: tuple[Running, Any]) -> None:
    running, exporter = traced
    post(running, PLAIN, completion("refuse: it"), {"traceparent": "no such thing"})
    (request,) = spans(running, exporter, 1).values()
    assert request.status.status_code.name == "ERROR" and request.parent is None


def test_off_unless_asked_for(server: Running) -> None:
    from engineroom.engine.serve.tracing import untraced

    assert ServeConfig().otlp_endpoint is None and server.service.traced is untraced
    with pytest.raises(ConfigError, match="is no address"):
        ServeConfig(otlp_endpoint="127.0.0.1:4318")


def test_spans_go_to_a_collector() -> None:
    """Over HTTP, and the last of them before the server's process ends."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no exporter")
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from engineroom.engine.serve.tracing import exporting

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        traced, flush = exporting(f"http://127.0.0.1:{collector.server_port}/", "0.1")
        traced("fake", "r1", None, 0.5)
        flush()
        collector.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces" and b"engineroom" in body and b"r1" in body
