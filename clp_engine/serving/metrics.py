"""What Prometheus reads at /metrics: requests, tokens, rows, and how long clients wait for tokens."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Counted(Protocol):
    """A batch with rows that run and wait."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class Metrics:
    """The counters of one server, in a registry of its own: two servers in a process do not add up."""

    def __init__(self, batch: Counted):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "clp_engine_requests", "Answered requests", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter("clp_engine_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("clp_engine_completion_tokens", "Tokens drawn", registry=registry)
        self.first_token = Histogram(
            "clp_engine_time_to_first_token_seconds",
            "From a request to the first token of a completion",
            buckets=_FIRST,
            registry=registry,
        )
        self.token = Histogram(
            "clp_engine_time_per_token_seconds",
            "Mean time of a completion's tokens after the first",
            buckets=_TOKEN,
            registry=registry,
        )
        for name, text, count in (
            ("clp_engine_running_rows", "Completions that are being decoded", lambda: batch.running),
            ("clp_engine_queue_length", "Completions that wait for a place", lambda: batch.waiting),
        ):
            Gauge(name, text, registry=registry).set_function(count)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
