"""What /metrics tells: Prometheus counters and histograms of requests, gauges of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..core.answers import RequestOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_RECENT = 1000  # requests
_TOKENS = tuple(2.0**n for n in range(15))
# Of EngineStats, as the engine last told them; they begin anew with its process, so all are gauges.
_GAUGES = {
    "num_running": "requests that run",
    "num_waiting": "requests that wait",
    "free_blocks": "blocks of the KV cache that are empty",
    "cached_blocks": "blocks that hold a prefix nobody uses",
    "owned_blocks": "blocks that running requests hold",
    "num_preemptions": "preemptions since the engine started",
    "num_cached_tokens": "prompt tokens found in the prefix cache since the engine started",
}
# Of Cost, of requests that ended. Money and grams are there where a price or an intensity is set.
_SPENT = {
    "joules": "electrical energy of requests",
    "money": "what requests cost, in the currency of the configured prices",
    "grams": "grams of CO2 equivalent of requests",
}
# Of EnergyStats.
_ENERGY = {
    "joules": "energy that the meter has counted since the engine started",
    "idle_joules": "of it, nobody's",
    "estimated": "1 where a model estimates the energy, 0 where a meter counts it",
}


class Metrics:
    """One registry of its own: a program that embeds two servers keeps them apart."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._model = model
        name = ["model"]
        self._requests = Counter(
            "engineroom_requests",
            "requests that ended, by how",
            ["model", "finish_reason"],
            registry=registry,
        )
        self._http = Counter(
            "engineroom_http_responses",
            "answers, by route and status",
            ["route", "status"],
            registry=registry,
        )
        self._prompt = Counter(
            "engineroom_prompt_tokens", "tokens of prompts", name, registry=registry
        )
        self._cached = Counter(
            "engineroom_cached_tokens",
            "of them, found in the prefix cache",
            name,
            registry=registry,
        )
        self._generated = Counter(
            "engineroom_generated_tokens", "tokens made", name, registry=registry
        )
        self._spent = {
            field: Counter(f"engineroom_request_{field}", text, name, registry=registry)
            for field, text in _SPENT.items()
        }
        self._ttft = self._histogram("time_to_first_token", "from admission", _SECONDS)
        self._total = self._histogram("request", "from admission to the end", _SECONDS)
        self._queued = self._histogram("queued", "waiting, preemptions included", _SECONDS)
        self._per_token = self._histogram("per_token", "between two tokens, a mean", _TOKEN_SECONDS)
        self._length = Histogram(
            "engineroom_output_tokens",
            "tokens of an answer",
            name,
            buckets=_TOKENS,
            registry=self._registry,
        )
        self._engine = {
            field: Gauge(f"engineroom_{field}", text, name, registry=registry)
            for field, text in _GAUGES.items()
        }
        self._batches = Counter(
            "engineroom_batches",
            "batches that ended, by how",
            ["model", "status"],
            registry=registry,
        )
        self._energy = {
            field: Gauge(f"engineroom_energy_{field}", text, name, registry=registry)
            for field, text in _ENERGY.items()
        }
        # Of the latest requests, for the dashboard: seconds to the first token, and per token.
        self.recent_ttft: deque[float] = deque(maxlen=_RECENT)
        self.recent_per_token: deque[float] = deque(maxlen=_RECENT)
        self._up = Gauge("engineroom_up", "1 while requests are accepted", name, registry=registry)
        self._restarts = Gauge(
            "engineroom_engine_restarts", "of the engine's process", name, registry=registry
        )

    def _histogram(self, what: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"engineroom_{what}_seconds", text, ["model"], buckets=buckets, registry=self._registry
        )

    def answered(self, route: str, status: int) -> None:
        """One HTTP answer."""
        self._http.labels(route, str(status)).inc()

    def batch_ended(self, status: str) -> None:
        """One of /v1/batches; its requests are counted with all others."""
        self._batches.labels(self._model, status).inc()

    def ended(self, output: RequestOutput | None, seconds: float) -> None:
        """One request's end; no output where it was refused or its engine died."""
        model = self._model
        self._total.labels(model).observe(seconds)
        if output is None:
            self._requests.labels(model, "refused").inc()
            return
        for completion in output.outputs:
            self._requests.labels(model, completion.finish_reason or "abort").inc()
            self._length.labels(model).observe(len(completion.token_ids))
        self._prompt.labels(model).inc(output.usage.prompt_tokens)
        self._cached.labels(model).inc(output.usage.cached_tokens)
        self._generated.labels(model).inc(output.usage.completion_tokens)
        for field, counter in self._spent.items():
            amount = getattr(output.cost, field, None)
            if amount is not None:
                counter.labels(model).inc(amount)
        t = output.timings
        self._queued.labels(model).observe(t.queued_s)
        if t.time_to_first_token_s is not None:
            self._ttft.labels(model).observe(t.time_to_first_token_s)
            self.recent_ttft.append(t.time_to_first_token_s)
        tokens = max((len(c.token_ids) for c in output.outputs), default=0)
        if tokens > 1:
            self._per_token.labels(model).observe(t.decode_s / (tokens - 1))
            self.recent_per_token.append(t.decode_s / (tokens - 1))

    def page(self, stats: Mapping[str, Any] | None, *, ready: bool, restarts: int) -> bytes:
        """The text that Prometheus scrapes. stats: EngineStats as plain data, where it is known."""
        self._up.labels(self._model).set(ready)
        self._restarts.labels(self._model).set(restarts)
        for field, gauge in self._engine.items():
            value = (stats or {}).get("scheduler", {}).get(field)
            if value is not None:
                gauge.labels(self._model).set(value)
        for field, gauge in self._energy.items():
            value = (stats or {}).get("energy", {}).get(field)
            if value is not None:
                gauge.labels(self._model).set(value)
        return generate_latest(self._registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
