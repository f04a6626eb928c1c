"""OpenTelemetry traces: a span for each request, with queue, prefill and decode below it.

Off unless an endpoint is given; the extra `otel` brings the packages. Spans are made when a request
has ended, from the timings that its answer carries, so that a running one pays nothing. A caller's
`traceparent` header (W3C Trace Context) is the parent; names of attributes are those of
OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..config import ConfigError
from ..core.answers import RequestOutput

__all__ = ["TRACEPARENT", "OpenTelemetry", "Traced", "exporting", "untraced"]

# The header of the request that is being answered, set at the door.
TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
# Called with a request's model, id, last output (None where it was refused) and length in seconds.
Traced = Callable[[str, str, RequestOutput | None, float], None]


def untraced(model: str, request_id: str, last: RequestOutput | None, seconds: float) -> None:
    """Traces are off."""


def exporting(endpoint: str, version: str) -> tuple[Traced, Callable[[], None]]:
    """Spans go to an OTLP collector over HTTP; and what sends the last of them.

    Errors: ConfigError where the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "otlp_endpoint",
            f"traces need the package {error.name}, which is not installed here; "
            "pip install 'engineroom[otel]' brings it",
        ) from None
    resource = Resource.create({"service.name": "engineroom", "service.version": version})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetry(provider).ended, provider.shutdown


class OpenTelemetry:
    """Makes spans with a TracerProvider of the SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._tracer = provider.get_tracer("engineroom")
        self._propagator = TraceContextTextMapPropagator()

    def ended(
        self, model: str, request_id: str, last: RequestOutput | None, seconds: float
    ) -> None:
        """Spans of a request that has just ended; time preempted counts as queued."""
        api, end = self._api, time.time_ns()
        start = end - round(seconds * 1e9)
        header = TRACEPARENT.get()
        parent = self._propagator.extract({"traceparent": header} if header else {})
        span = self._tracer.start_span(
            "request",
            context=parent,
            kind=api.SpanKind.SERVER,
            start_time=start,
            attributes={"gen_ai.request.model": model, "gen_ai.response.id": request_id},
        )
        if last is None:
            span.set_status(api.StatusCode.ERROR, "refused, or the engine ended")
        else:
            self._describe(span, last)
            below, at = api.set_span_in_context(span), start
            t = last.timings
            for name, length in (
                ("queue", t.queued_s),
                ("prefill", t.prefill_s),
                ("decode", t.decode_s),
            ):
                child = self._tracer.start_span(name, context=below, start_time=at)
                at += round(length * 1e9)
                child.end(at)
        span.end(end)

    def _describe(self, span: Any, last: RequestOutput) -> None:
        reasons = [completion.finish_reason or "abort" for completion in last.outputs]
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": last.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": last.usage.completion_tokens,
                "gen_ai.response.finish_reasons": reasons,
                "engineroom.cached_tokens": last.usage.cached_tokens,
            }
        )
        if "error" in reasons:
            span.set_status(self._api.StatusCode.ERROR, "the engine ended the request")
